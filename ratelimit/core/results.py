"""What the verbs answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ratelimit.core.numbers import to_seconds

if TYPE_CHECKING:
    from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
    from ratelimit.core.token_bucket.state import BandwidthState

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ConsumptionProbe:
    """The answer of ``try_consume_and_return_remaining``; true where the tokens were consumed.

    :param consumed: whether the tokens were consumed.
    :param remaining_tokens: what is left; not below 0.
    :param nanos_to_wait_for_refill: until the tokens asked for will be there, in nanoseconds; 0 when consumed,
        ``NEVER`` when more was asked for than a bandwidth can hold.
    :param nanos_to_wait_for_reset: until the bucket is full again, in nanoseconds.
    :param degraded: whether the store has failed, and the answer is that of the ``OnError`` policy.
    """

    consumed: bool
    remaining_tokens: int
    nanos_to_wait_for_refill: int
    nanos_to_wait_for_reset: int
    degraded: bool = False

    def __bool__(self) -> bool:
        return self.consumed

    @property
    def retry_after(self) -> float | None:
        """``nanos_to_wait_for_refill`` in seconds, rounded up to a microsecond; None for never."""
        return to_seconds(self.nanos_to_wait_for_refill)

    @property
    def reset_after(self) -> float | None:
        """``nanos_to_wait_for_reset`` in seconds, rounded up to a microsecond; None for never."""
        return to_seconds(self.nanos_to_wait_for_reset)


@dataclass(frozen=True, slots=True)
class EstimationProbe:
    """The answer of ``estimate_ability_to_consume``; true where the tokens could be consumed now.

    :param can_be_consumed: whether the tokens are there.
    :param remaining_tokens: what is there now; not below 0.
    :param nanos_to_wait_for_refill: until the tokens asked for will be there, in nanoseconds; 0 when they are,
        ``NEVER`` when more was asked for than a bandwidth can hold.
    :param degraded: whether the store has failed, and the answer is that of the ``OnError`` policy.
    """

    can_be_consumed: bool
    remaining_tokens: int
    nanos_to_wait_for_refill: int
    degraded: bool = False

    def __bool__(self) -> bool:
        return self.can_be_consumed

    @property
    def retry_after(self) -> float | None:
        """``nanos_to_wait_for_refill`` in seconds, rounded up to a microsecond; None for never."""
        return to_seconds(self.nanos_to_wait_for_refill)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A bucket as it was when it was asked for, refilled.

    :param configuration: what is stored with the bucket.
    :param configuration_version: the version stored with it, if any.
    :param bandwidth_states: tokens and times, in the order of the bandwidths.
    :param consumed_tokens: tokens consumed since the bucket was made.
    """

    configuration: BucketConfiguration
    configuration_version: int | None
    bandwidth_states: tuple[BandwidthState, ...]
    consumed_tokens: int

    @property
    def available_tokens(self) -> int:
        """The tokens of the scarcest bandwidth; negative in debt."""
        return min(state.current_size for state in self.bandwidth_states)


@dataclass(frozen=True, slots=True)
class VerboseResult(Generic[T]):
    """The answer of a verb, and the bucket right after it (refilled, also where nothing was stored).

    :param value: what the plain verb answers.
    :param operation_time_nanos: the time the decision was made at, in nanoseconds since the epoch.
    :param available_tokens: may be negative.
    :param available_tokens_per_bandwidth: in the order of the bandwidths.
    :param full_refilling_time_nanos: until every bandwidth is full, in nanoseconds.
    :param configuration: what is stored with the bucket; None where the key is not limited.
    :param bandwidth_states: in the order of the bandwidths.
    :param degraded: whether the store has failed, and the answer is that of the ``OnError`` policy.
    """

    value: T
    operation_time_nanos: int
    available_tokens: int
    available_tokens_per_bandwidth: tuple[int, ...]
    full_refilling_time_nanos: int
    configuration: BucketConfiguration | None
    bandwidth_states: tuple[BandwidthState, ...]
    degraded: bool = False
