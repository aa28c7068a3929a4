"""Translate the errors of redis-py into those of this library; this happens nowhere else."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import redis.asyncio.sentinel
import redis.sentinel
from redis import exceptions

from ratelimit.errors import StoreError, StoreTimeoutError, StoreUnavailableError

EXPECTED: Final = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
"""Errors that redis-py documents, other than replies of the server."""


class UnexpectedError(exceptions.RedisError):
    """The client has failed with an error of another type, which is the cause."""


@contextmanager
def client_errors() -> Generator[None]:
    """Raise whatever a client of redis-py fails with as one of ``EXPECTED``.

    Use this around the client's code only. Elsewhere an exception of another type interrupts the caller, from the
    handler of a signal for instance, and must be raised as it is.
    """
    try:
        yield
    except (StoreError, *EXPECTED):
        raise
    except Exception as error:
        raise UnexpectedError(str(error)) from error


_NO_MASTER: Final = (redis.sentinel.MasterNotFoundError, redis.asyncio.sentinel.MasterNotFoundError)

# An error is recognised by its class where redis-py has one, since redis-py then removes the code from the text. It is
# recognised by its code where redis-py has no class, and where an older server puts words of its own before the code of
# an error inside a script.
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
    "max number of clients": "Redis has too many clients",
}
_LASTING: Final = {
    "WRONGTYPE": "Redis holds a value of another type there, not a bucket",
    "NOPERM": "this Redis user may not do that",
    "WRONGPASS": "Redis refused the user name or password",
    "NOAUTH": "Redis wants a password",
}
_LONGEST_QUOTE: Final = 300
_CODES_OF_CLASSES: Final[dict[type[Exception], str]] = {
    exceptions.ReadOnlyError: "READONLY",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.AuthenticationError: "WRONGPASS",
    exceptions.AuthorizationError: "WRONGPASS",
    exceptions.AuthenticationWrongNumberOfArgsError: "WRONGPASS",
}


def translated(error: Exception, key: bytes, *, in_doubt: bool) -> StoreError:
    """Return the error of this library for an error of any type; raise it ``from`` that one.

    :param in_doubt: whether the request may have been carried out, for errors that do not show it themselves.
    """
    if isinstance(error, UnexpectedError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, _NO_MASTER):
        return _no_master(error, key)
    if isinstance(error, exceptions.RedisClusterException) and isinstance(error.__cause__, exceptions.RedisError):
        # redis-py has wrapped the answer of a node.
        error = error.__cause__
    code = _code(error)
    if code in _LASTING:
        return StoreError(key, _LASTING[code] + _in_its_words(error))
    if code in _TEMPORARY:
        return StoreUnavailableError(key, _TEMPORARY[code] + _in_its_words(error))
    if isinstance(error, exceptions.ResponseError):
        # The server has answered that it did not carry out the command.
        return StoreError(key, "Redis refused" + _in_its_words(error))
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return StoreTimeoutError(key, "Redis did not answer in time" + _in_its_words(error), in_doubt)
    is_expected = isinstance(error, EXPECTED)
    what = "Redis cannot be reached" if is_expected else f"the Redis client failed with {type(error).__name__}"
    return StoreUnavailableError(key, what + _in_its_words(error), in_doubt)


def _no_master(error: Exception, key: bytes) -> StoreError:
    """Return the error for sentinels that have named no master, with the reason of each.

    redis-py puts the errors of all sentinels into one text, each after a description of its client that is longer than
    the longest quote allowed here.
    """
    text = str(error)
    addresses = re.findall(r"\bhost=([^,)]+),port=(\d+)", text)
    kinds = re.findall(r" - (?:\w+:)?(\w+)", text)
    if len(addresses) == len(kinds):
        kinds = [f"{host}:{port}: {kind}" for (host, port), kind in zip(addresses, kinds, strict=True)]
    words = "; ".join([text.partition(" : ")[0], *kinds])
    if any("Authentication" in kind or "Authorization" in kind for kind in kinds):
        return StoreError(key, f"Sentinel refused the user name or password, or wants one ({words})")
    return StoreUnavailableError(key, f"Sentinel names no master ({words})")


def concerns_server(error: StoreError) -> bool:
    """Return whether a failure says something of the server, and not of a pool whose connections are all in use."""
    return not re.search(r"Too many connections|No connection available", str(error.__cause__))


def _in_its_words(error: Exception) -> str:
    """Return the text of an error on one line, cut short: a server may quote a command, with a key of any length."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_QUOTE:
        text = f"{text[:_LONGEST_QUOTE]}..."
    return f" ({text})" if text else ""


def _code(error: Exception) -> str:
    if "uthentication required" in str(error) or "NOAUTH" in str(error):
        return "NOAUTH"
    for kind, code in _CODES_OF_CLASSES.items():
        if isinstance(error, kind):
            return code
    found = (code for code in (*_LASTING, *_TEMPORARY) if re.search(rf"\b{code}\b", str(error)))
    return next(found, "")
