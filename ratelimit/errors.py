"""The errors of this library.

::

    RateLimitError
    ├── InvalidConfigurationError (ValueError)
    ├── InvalidArgumentError (ValueError)
    ├── BucketNotFoundError
    ├── ContentionError
    ├── CorruptStateError
    │   └── UnsupportedStateError
    ├── ReservationOverflowError
    ├── RateLimitExceeded
    └── StoreError
        ├── StoreUnavailableError
        └── StoreTimeoutError

Errors of other libraries (``redis.exceptions``, ``OSError``) are translated once, in the store, and chained as the
cause. ``key`` is always the key as the caller gave it.
"""

from __future__ import annotations

import sys
from typing import Any

from ratelimit.keys import Key, shown

if getattr(sys.modules.get("ratelimit"), "__distribution__", None) != "ratelimit-redis":
    raise ImportError(
        "the package 'ratelimit' that was imported is not that of 'ratelimit-redis' but that of another distribution"
        " with the same import name; run: pip uninstall ratelimit && pip install --force-reinstall ratelimit-redis"
    )


class RateLimitError(Exception):
    """Base of all errors that this library raises. Messages and ``repr`` are short, however long the key is.

    It is raised itself by the verbs of a manager that was closed.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class InvalidConfigurationError(RateLimitError, ValueError):
    """A limit, an expiration, a URL or another setting is not valid. ``field`` names the offending value, if any."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class InvalidArgumentError(RateLimitError, ValueError):
    """An argument of a verb outside its range; nothing was read or written."""


class BucketNotFoundError(RateLimitError):
    """The bucket under ``key`` has vanished (``Recovery.RAISE``), or there is none to speak of."""

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"no bucket under the key {shown(self.key)}"


class ContentionError(RateLimitError):
    """Other writers changed the bucket under ``key`` before each of ``attempts`` swaps; nothing was consumed."""

    def __init__(self, key: Key, attempts: int) -> None:
        super().__init__(key, attempts)
        self.key = key
        self.attempts = attempts

    def __str__(self) -> str:
        return (
            f"the bucket under the key {shown(self.key)} was changed by others before each of {self.attempts} attempts"
        )


class CorruptStateError(RateLimitError):
    """What is stored under ``key`` is not a bucket; ``state`` holds the bytes, which are left as they are.

    There may be more of them in Redis: ``state`` may end after 16,385 bytes, one more than a bucket can have.
    """

    def __init__(self, key: Key, state: bytes, reason: str = "not the state of a bucket") -> None:
        super().__init__(key, state, reason)
        self.key = key
        self.state = state
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.state, self.reason)

    def __str__(self) -> str:
        return f"the value under the key {shown(self.key)} cannot be read as a bucket: {self.reason}"


class UnsupportedStateError(CorruptStateError):
    """The state under ``key`` is written in a ``format`` that this version does not know, perhaps a newer one."""

    def __init__(self, key: Key, state: bytes, reason: str, format: int) -> None:
        super().__init__(key, state, reason)
        self.format = format

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.state, self.reason, self.format)


class ReservationOverflowError(RateLimitError):
    """The tokens asked for could never be paid back: the debt, or the wait for it, exceeds 64 bits."""


class RateLimitExceeded(RateLimitError):  # noqa: N818  # the name that this has in every such library
    """A call was refused by a limit: of a function that is ``limited``, or of an API that is called through a limit.

    :ivar key: the key of that limit; of several buckets, that of the one with the longest wait.
    :ivar retry_after: in seconds, rounded up; None where waiting does not help, because more is wanted than the bucket
        can hold.
    :ivar probe: the ``ConsumptionProbe`` of the refusal, or the ``CombinedProbe`` of several buckets; None where no
        bucket was asked, as during a hold that this process knows of.
    """

    def __init__(self, key: Key, retry_after: float | None, probe: Any = None) -> None:
        super().__init__(key, retry_after, probe)
        self.key = key
        self.retry_after = retry_after
        self.probe = probe

    def __str__(self) -> str:
        wait = "never" if self.retry_after is None else f"in {self.retry_after:g} s"
        return f"the limit of the key {shown(self.key)} is exceeded; retry {wait}"


class StoreError(RateLimitError):
    """The store could not do what was asked; the foreign error is chained as the cause.

    ``in_doubt`` says whether the request may have been carried out all the same: if its reply was lost, tokens may have
    been taken without an answer. It is False where the store refused, or was never reached.
    """

    def __init__(self, key: Key, message: str, in_doubt: bool = False) -> None:
        super().__init__(key, message, in_doubt)
        self.key = key
        self.message = message
        self.in_doubt = in_doubt

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.message, self.in_doubt)

    def __str__(self) -> str:
        doubt = " (the request may have been carried out)" if self.in_doubt else ""
        return f"{self.message}, for the key {shown(self.key)}{doubt}"


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or cannot serve at present."""


class StoreTimeoutError(StoreError):
    """The store did not answer in time."""
