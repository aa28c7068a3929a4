"""The settings of a manager, besides its store and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from inspect import iscoroutinefunction
from typing import Final, TypedDict

from ratelimit.checks import boolean, instance, refusal, stored_key, timeout_seconds, whole_number
from ratelimit.core.expiration import Expiration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import MAX, MIN, Duration
from ratelimit.engine.observing import Listener
from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.engine.optimization import Optimization
from ratelimit.errors import InvalidArgumentError
from ratelimit.keys import Key, brief
from ratelimit.runtime.clock import Clock

DEFAULT_TIMEOUT: Final = 0.5
"""Seconds: long enough for a server that is busy, or for a connection that has to be made first, over some distance."""


class Recovery(Enum):
    """What happens when a bucket is missing that the same handle has made before."""

    RECONSTRUCT = "reconstruct"
    """It is made again, with its initial tokens."""
    RAISE = "raise"
    """``BucketNotFoundError`` is raised until another handle makes it again. Expired buckets are missing, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a manager can be given besides its store and its limits.

    :raises InvalidArgumentError: for a value that is not allowed.
    """

    clock: Clock | None = None
    """The clock that buckets go by. None: the store's clock, which for Redis is the time of the server."""

    expiration: Expiration | None = None
    """When idle buckets are forgotten. None: ``Expiration.automatic()``."""

    recovery: Recovery = Recovery.RECONSTRUCT
    """What to do when a bucket has vanished."""

    configuration_version: int | None = None
    """Replaces the configuration of stored buckets that have a lower version, or none. None: nothing is replaced."""

    inheritance: TokensInheritance = TokensInheritance.RESET
    """How the tokens of such a bucket pass to its new configuration."""

    prefix: Key = ""
    """Is put before every key. Without a prefix the same key is the same bucket for every Bucket4j client."""

    timeout: Duration = DEFAULT_TIMEOUT
    """How long a decision may take, in seconds or as a ``timedelta``, above 0; then ``StoreTimeoutError``.

    This includes connecting and waiting for other calls of this process, but not waiting for tokens."""

    on_error: ErrorPolicy | None = None
    """What is answered where the store fails: an ``OnError``, or a callable that chooses one by the key and the error.

    None: the error is raised; integrations that are given this manager answer with 503."""

    listener: Listener | None = None
    """Is notified of every decision."""

    max_attempts: int = 100
    """Swaps that one decision may lose to others before ``ContentionError``; 1 or more."""

    memory_limit_bytes: int = 16 * 2**20
    """Roughly the memory for states last seen; a key that does not fit costs a round trip."""

    merging: bool = True
    """Whether calls that want the same bucket at the same time share a swap; it changes no answer."""

    optimization: Optimization | None = None
    """What may be decided without the store; None: nothing."""

    def __post_init__(self) -> None:
        if self.clock is not None:
            instance(self.clock, Clock, "clock", "an object with now_nanos(), sleep() and asleep()")
        if self.expiration is not None:
            checked_expiration(self.expiration)
        checked_recovery(self.recovery)
        checked_version(self.configuration_version)
        checked_inheritance(self.inheritance)
        stored_key(b"", self.prefix)
        timeout_seconds(self.timeout)
        if self.on_error is not None:
            checked_policy(self.on_error)
        _checked_listener(self.listener)
        whole_number(self.max_attempts, "max_attempts")
        whole_number(self.memory_limit_bytes, "memory_limit_bytes", least=0)
        boolean(self.merging, "merging")
        if self.optimization is not None:
            checked_optimization(self.optimization)


class SettingsByName(TypedDict, total=False):
    """The settings as keyword arguments; see :class:`Settings`."""

    clock: Clock | None
    expiration: Expiration | None
    recovery: Recovery
    configuration_version: int | None
    inheritance: TokensInheritance
    prefix: Key
    timeout: Duration
    on_error: ErrorPolicy | None
    listener: Listener | None
    max_attempts: int
    memory_limit_bytes: int
    merging: bool
    optimization: Optimization | None


def checked_version(version: int | None) -> int | None:
    """Return a version of a configuration.

    :raises InvalidArgumentError: for what is neither None nor an int of 64 bits.
    """
    return None if version is None else whole_number(version, "configuration_version", least=MIN, most=MAX)


def checked_expiration(expiration: Expiration) -> Expiration:
    """Return an expiration; InvalidArgumentError for anything else."""
    return instance(expiration, Expiration, "expiration", "an Expiration")


def checked_inheritance(inheritance: TokensInheritance) -> TokensInheritance:
    """Return a way of inheriting; InvalidArgumentError for anything else."""
    return instance(inheritance, TokensInheritance, "inheritance", "a TokensInheritance")


def checked_optimization(optimization: Optimization) -> Optimization:
    """Return an optimization; InvalidArgumentError for anything else."""
    return instance(optimization, Optimization, "optimization", "an Optimization")


def checked_policy(policy: ErrorPolicy) -> ErrorPolicy:
    """Return a policy for errors; InvalidArgumentError for anything else."""
    if not isinstance(policy, OnError) and not callable(policy):
        raise refusal("on_error", "an OnError, or a callable that gives one", policy)
    return policy


def checked_recovery(recovery: Recovery) -> Recovery:
    """Return a recovery; InvalidArgumentError for anything else."""
    return instance(recovery, Recovery, "recovery", "a Recovery")


def _checked_listener(listener: Listener | None) -> None:
    methods = [getattr(listener, name, None) for name in ("on_decision", "on_interrupted")]
    if listener is not None and not all(callable(one) and not iscoroutinefunction(one) for one in methods):
        raise InvalidArgumentError(
            f"listener must have on_decision() and on_interrupted(), which are not awaited; got {brief(listener)}"
        )
