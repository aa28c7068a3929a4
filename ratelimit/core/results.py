"""What the verbs answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from ratelimit.core.numbers import to_seconds
from ratelimit.keys import Key

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
class CombinedProbe:
    """The answer of an ``all_of`` about all of its buckets; true where the tokens were consumed.

    :param consumed: whether each bucket was charged; otherwise none was. An estimate charges none: there it says
        whether all could be.
    :param refused_by: the keys of all buckets that refuse; empty when consumed.
    :param nanos_to_wait_for_refill: the longest wait of a bucket that refuses, in nanoseconds; 0 when consumed,
        ``NEVER`` when more was asked for than one of them can hold.
    :param parts: what each bucket shows, in the order in which they were given. ``consumed`` is that of the whole; a
        bucket that has its tokens while another one refuses has a wait of 0.
    :param degraded: whether the store has failed, and the answer is that of the ``OnError`` policies.
    """

    consumed: bool
    refused_by: tuple[Key, ...]
    nanos_to_wait_for_refill: int
    parts: tuple[ConsumptionProbe, ...]
    degraded: bool = False

    @classmethod
    def of(cls, keys: Sequence[Key], probes: Sequence[ConsumptionProbe]) -> Self:
        """Return the answer for buckets that each would give one of these."""
        refused_by = tuple([key for key, probe in zip(keys, probes, strict=True) if not probe.consumed])
        parts = tuple([replace(probe, consumed=False) for probe in probes] if refused_by else probes)
        longest = max([probe.nanos_to_wait_for_refill for probe in probes], default=0)
        return cls(not refused_by, refused_by, longest, parts, any(probe.degraded for probe in probes))

    def __bool__(self) -> bool:
        return self.consumed

    @property
    def retry_after(self) -> float | None:
        """``nanos_to_wait_for_refill`` in seconds, rounded up to a microsecond; None for never."""
        return to_seconds(self.nanos_to_wait_for_refill)


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
