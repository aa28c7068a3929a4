"""Checks of arguments, in one wording: ``<argument> must be <allowed>; got <value>``.

They raise :class:`InvalidArgumentError`, which is for verbs, or the error that they are given: settings raise
:class:`InvalidConfigurationError`, whose ``field`` is the name of the argument.
"""

from __future__ import annotations

from typing import Final, TypeAlias, TypeVar

from ratelimit.core.numbers import MAX, NANOS_PER_SECOND, Duration, to_nanos
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError
from ratelimit.keys import Key, brief, shown

T = TypeVar("T")

Refusal: TypeAlias = InvalidArgumentError | InvalidConfigurationError

_LONGEST_TIMEOUT: Final = 10.0**8  # seconds; more than that does not fit into what systems wait for


def refusal(name: str, allowed: str, value: object, error: type[Refusal] = InvalidArgumentError) -> Refusal:
    """Return the error for an argument that is not what is allowed."""
    return _error(error, f"{name} must be {allowed}; got {brief(value)}", name)


def _error(error: type[Refusal], message: str, name: str) -> Refusal:
    if issubclass(error, InvalidConfigurationError):
        return error(message, name)
    return error(message)


def instance(
    value: T,
    kinds: type | tuple[type, ...],
    name: str,
    allowed: str,
    error: type[Refusal] = InvalidArgumentError,
) -> T:
    """Return a value of one of these types.

    :raises InvalidArgumentError: for any other value.
    """
    if not isinstance(value, kinds):
        raise refusal(name, allowed, value, error)
    return value


def whole_number(
    value: int, name: str, *, least: int = 1, most: int = MAX, error: type[Refusal] = InvalidArgumentError
) -> int:
    """Return an int in a range; ``bool`` is not a number here.

    :raises InvalidArgumentError: for any other value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        up_to = "2**63 - 1" if most == MAX else str(most)
        raise refusal(name, f"an int from {least} to {up_to}", value, error)
    return value


def boolean(value: bool, name: str, error: type[Refusal] = InvalidArgumentError) -> bool:
    """Return True or False.

    :raises InvalidArgumentError: for any other value, also for 0 and 1.
    """
    return instance(value, bool, name, "True or False", error)


def function(value: T, name: str, error: type[Refusal] = InvalidArgumentError) -> T:
    """Return something that can be called.

    :raises InvalidArgumentError: for any other value.
    """
    if not callable(value):
        raise refusal(name, "a callable", value, error)
    return value


def token_count(tokens: int, name: str = "tokens") -> int:
    """Return a number of tokens.

    :raises InvalidArgumentError: for what is not an int from 1 to 2**63 - 1.
    """
    return whole_number(tokens, name)


def duration_nanos(duration: Duration, name: str, error: type[Refusal] = InvalidArgumentError) -> int:
    """Return a duration above 0 in nanoseconds.

    :raises InvalidArgumentError: for a shorter one, and for what is not a duration.
    """
    return _nanos(duration, name, 1, "above 0", error)


def nanos_from_zero(duration: Duration, name: str, error: type[Refusal] = InvalidArgumentError) -> int:
    """Return a duration of 0 or more in nanoseconds.

    :raises InvalidArgumentError: for a negative one, and for what is not a duration.
    """
    return _nanos(duration, name, 0, "0 or more", error)


def max_wait_nanos(max_wait: Duration, name: str = "max_wait") -> int:
    """Return the longest wait that is accepted, in nanoseconds; 0 stands for not waiting at all.

    :raises InvalidArgumentError: for a negative duration, and for what is not a duration.
    """
    return nanos_from_zero(max_wait, name)


def _nanos(duration: Duration, name: str, least: int, allowed: str, error: type[Refusal]) -> int:
    try:
        nanos = to_nanos(duration)
    except (TypeError, ValueError) as fault:
        raise _error(error, f"{name} {fault}", name) from None
    if nanos < least:
        raise refusal(name, allowed, duration, error)
    return nanos


def timeout_seconds(timeout: Duration, name: str = "timeout") -> float:
    """Return how long a call may take, in seconds.

    :raises InvalidArgumentError: for what is not a duration above 0.
    """
    return min(duration_nanos(timeout, name) / NANOS_PER_SECOND, _LONGEST_TIMEOUT)


def stored_key(prefix: bytes, key: Key) -> bytes:
    """Return the bytes that a key is stored under.

    :raises InvalidArgumentError: for what is neither ``str`` nor ``bytes``, and for text that has no UTF-8 form.
    """
    if isinstance(key, bytes):
        return prefix + key
    if not isinstance(key, str):
        raise refusal("key", "a str or bytes", key)
    try:
        return prefix + key.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"key must be text that has a UTF-8 form; got {shown(key)}: {error.reason}"
        ) from None
