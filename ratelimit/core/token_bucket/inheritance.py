"""What the bandwidths of a new configuration inherit from those of the old one."""

from __future__ import annotations

from ratelimit.core.algorithm import State
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import MIN, truncated, wrap
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.core.token_bucket.state import BandwidthState, BucketState, initial_state


def replaced(
    state: State, configuration: BucketConfiguration, version: int | None, inheritance: TokensInheritance, now: int
) -> BucketState:
    """Return a state, refilled at this time under its old configuration, under another configuration."""
    configuration = configuration.at(now)
    if inheritance is TokensInheritance.RESET or not isinstance(state, BucketState):
        states = BucketState.initial(configuration, version, now).bandwidth_states
    else:
        match_without_id = _without_id(state.configuration) <= 1 and _without_id(configuration) <= 1
        states = tuple(_inherited(state, bandwidth, inheritance, match_without_id, now) for bandwidth in configuration)
    return BucketState(configuration, version, state.consumed_tokens, states)


def _without_id(configuration: BucketConfiguration) -> int:
    return sum(bandwidth.id is None for bandwidth in configuration)


def _inherited(
    state: BucketState, new: Bandwidth, inheritance: TokensInheritance, match_without_id: bool, now: int
) -> BandwidthState:
    for old, old_state in zip(state.configuration, state.bandwidth_states, strict=True):
        if old.id == new.id and (new.id is not None or match_without_id):
            if inheritance is TokensInheritance.PROPORTIONALLY:
                return _proportionally(old, old_state, new)
            grown = max(0, new.capacity - old.capacity) if inheritance is TokensInheritance.ADDITIVE else 0
            return _plus(old, old_state, new, grown)
    return initial_state(new, now)


def _plus(old: Bandwidth, state: BandwidthState, new: Bandwidth, grown: int) -> BandwidthState:
    last, size, error = state
    size += grown
    if size >= new.capacity:
        return BandwidthState(last, new.capacity, 0)
    if old.refill_intervally or new.refill_intervally:
        return BandwidthState(last, size, 0)
    # Bucket4j truncates the ratio of the periods before it multiplies: 1.9 counts as 1, and a shorter period as 0.
    scaled = wrap(truncated(float(new.refill_period_nanos) / float(old.refill_period_nanos)) * error)
    return BandwidthState(last, size, min(scaled, wrap(new.refill_period_nanos - 1)))


def _proportionally(old: Bandwidth, state: BandwidthState, new: Bandwidth) -> BandwidthState:
    last, size, error = state
    if size >= old.capacity:
        return BandwidthState(last, new.capacity, 0)
    exact = (float(size) + float(error) / float(old.refill_period_nanos)) * (float(new.capacity) / float(old.capacity))
    new_size = truncated(exact)
    if new_size >= new.capacity:
        return BandwidthState(last, new.capacity, 0)
    fraction = exact - float(new_size)
    if new_size == MIN or fraction == 0:
        return BandwidthState(last, new_size, 0)
    if exact < 0:
        # A part of a token is there: this rounds the debt up, and keeps the part.
        new_size -= 1
        fraction += 1
    unfinished = 0 if new.refill_intervally else truncated(fraction * float(new.refill_period_nanos))
    return BandwidthState(last, new_size, unfinished)
