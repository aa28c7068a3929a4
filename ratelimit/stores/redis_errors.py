"""redis-py's errors as ours; the one place where they are translated."""

from __future__ import annotations

import re
from typing import Final

from redis import exceptions

from ratelimit.errors import StoreError, StoreTimeoutError, StoreUnavailableError

FOREIGN: Final = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
"""What a redis-py client raises, when it is not a reply of the server."""

# Older servers put the code of an error inside a script behind words of their own, so that it may stand anywhere.
_TEMPORARY: Final = {
    "READONLY": "Redis is a read-only replica",
    "OOM": "Redis is out of memory",
    "LOADING": "Redis is loading its data",
    "MASTERDOWN": "Redis has lost its master",
    "CLUSTERDOWN": "the Redis cluster is down",
    "TRYAGAIN": "the Redis cluster is moving the key",
    "NOREPLICAS": "Redis has too few replicas to write",
    "MISCONF": "Redis cannot persist and refuses writes",
    "BUSY": "Redis is busy with a script",
    "maxclients": "Redis has too many clients",
}
_LASTING: Final = {
    "WRONGTYPE": "Redis holds a value of another type there, not a bucket",
    "NOPERM": "this Redis user may not do that",
    "WRONGPASS": "Redis refused the user name or password",
    "invalid password": "Redis refused the password",
    "NOAUTH": "Redis wants a password",
    "without any password": "Redis has no password, but one was given",
}


def translated(error: Exception, key: bytes, *, in_doubt: bool) -> StoreError:
    """The error of ours that says the same; to be raised ``from`` the other.

    :param in_doubt: whether the request may have been carried out, where the error does not tell by itself.
    """
    words = f"{type(error).__name__}: {error}"
    for code, meaning in _LASTING.items():
        if _says(code, words):
            return StoreError(key, f"{meaning} ({error})")
    for code, meaning in _TEMPORARY.items():
        if _says(code, words):
            return StoreUnavailableError(key, f"{meaning} ({error})")
    if isinstance(error, exceptions.ResponseError):  # the server has answered: it has not done it
        return StoreError(key, f"Redis refused: {error}")
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return StoreTimeoutError(key, f"Redis did not answer in time ({error})", in_doubt)
    if isinstance(error, exceptions.ReadOnlyError | exceptions.BusyLoadingError):
        return StoreUnavailableError(key, f"Redis cannot serve at present ({error})")
    return StoreUnavailableError(key, f"Redis cannot be reached ({error})", in_doubt)


def _says(code: str, words: str) -> bool:
    return re.search(rf"\b{code}\b", words) is not None
