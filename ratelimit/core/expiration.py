"""How long a store keeps a bucket that nobody uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from ratelimit.core.algorithm import State
from ratelimit.core.numbers import NANOS_PER_MILLISECOND, NEVER, Duration, quotient, to_nanos, wrap
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

NO_EXPIRY: Final = -1

_MARGIN_MILLIS: Final = 10_000
_IDLE_MILLIS: Final = 30 * 86_400_000


@dataclass(frozen=True, slots=True)
class Expiration:
    """When the store may forget a bucket; every write begins the time again.

    It is made by :meth:`none`, :meth:`fixed`, :meth:`after_refill` or :meth:`automatic`, which is the default.
    """

    kind: Literal["none", "fixed", "after_refill", "automatic"]
    duration_millis: int = 0

    shortest_ttl_nanos: int = field(init=False, repr=False, compare=False)
    """The shortest time to live that any bucket gets, in nanoseconds."""

    _fixed_ttl: int | None = field(init=False, repr=False, compare=False)
    """The time to live of every bucket, in milliseconds; None where it depends on the bucket."""

    def __post_init__(self) -> None:
        fixed = {"none": NO_EXPIRY, "fixed": self.duration_millis}.get(self.kind)
        object.__setattr__(self, "_fixed_ttl", fixed)
        shortest = {"automatic": _MARGIN_MILLIS, "fixed": self.duration_millis, "after_refill": 1}.get(self.kind)
        nanos = NEVER if shortest is None else shortest * NANOS_PER_MILLISECOND
        object.__setattr__(self, "shortest_ttl_nanos", nanos)

    @classmethod
    def none(cls) -> Expiration:
        """Keep every key that was ever used."""
        return cls("none")

    @classmethod
    def fixed(cls, duration: Duration) -> Expiration:
        """Expire this long after the last write, whatever the bucket needs to fill up.

        A bucket that is forgotten before it is full comes back with its initial tokens, which its users gain.

        :raises InvalidConfigurationError: for less than a millisecond.
        """
        millis = _whole_millis(duration, "duration")
        if millis < 1:
            raise InvalidConfigurationError(
                f"duration must be at least a millisecond; got {brief(duration)}", "duration"
            )
        return cls("fixed", millis)

    @classmethod
    def after_refill(cls, keep: Duration = 0) -> Expiration:
        """Expire ``keep`` after the bucket has filled up, and never before: the time is rounded up to a millisecond.

        A bucket whose initial tokens differ from its capacity does not come back as it was.

        :raises InvalidConfigurationError: for a negative duration.
        """
        millis = _whole_millis(keep, "keep")
        if millis < 0:
            raise InvalidConfigurationError(f"keep must be 0 or more; got {brief(keep)}", "keep")
        return cls("after_refill", millis)

    @classmethod
    def automatic(cls) -> Expiration:
        """Expire ten seconds after the bucket has filled up, if a new bucket would be the same as the full one.

        Where it would not (initial tokens other than the capacity, or a size forced above it), forgetting would give
        tokens or take them; such a bucket is kept for thirty days after its last write.
        """
        return cls("automatic")

    def ttl_millis(self, state: State, now: int) -> int:
        """Return the time to live of this state, in milliseconds; ``NO_EXPIRY`` where it does not expire."""
        fixed = self._fixed_ttl
        if fixed is not None:
            return fixed
        try:
            full = state.nanos_until_full(now)
        except ArithmeticError:
            # A stored period or rate of zero: at such a rate the bucket never fills up.
            full = NEVER
        return self.ttl_until(full, is_new_when_full=state.is_new_when_full)

    def ttl_until(self, full: int, *, is_new_when_full: bool) -> int:
        """Return the time to live of a bucket that is full after so many nanoseconds, in milliseconds."""
        fixed = self._fixed_ttl
        if fixed is not None:
            return fixed
        if self.kind == "automatic":
            keep = _MARGIN_MILLIS if is_new_when_full else _IDLE_MILLIS
            # A time below 0 has wrapped around.
            return keep + (NEVER if full < 0 else full) // NANOS_PER_MILLISECOND
        # The time is rounded up, because a bucket that is forgotten before it is full comes back full. The sum wraps
        # as all stored arithmetic does.
        return max(1, wrap(self.duration_millis - -full // NANOS_PER_MILLISECOND))


def _whole_millis(duration: Duration, name: str) -> int:
    try:
        return quotient(to_nanos(duration), NANOS_PER_MILLISECOND)
    except (TypeError, ValueError) as error:
        raise InvalidConfigurationError(f"{name} {error}", name) from None
