"""The state of a bucket, and what time and consumption do to it.

A bandwidth keeps three numbers: when it was last refilled, how many whole tokens it holds, and the part of a token
that had come by then and was not whole yet (in units of token x nanosecond, so that nothing is ever rounded away).
Every function computes and changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from ratelimit.core.algorithm import Level, State, Surplus
from ratelimit.core.numbers import (
    MAX,
    MIN,
    NANOS_PER_MILLISECOND,
    NEVER,
    quotient,
    remainder,
    saturating_product,
    truncated,
    wrap,
)
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration

# This makes a named tuple without the function that would only name its fields.
_new = tuple.__new__

# What is missing to one token is still a number of 64 bits.
_LARGEST_DEBT = MIN + 2


class BandwidthState(NamedTuple):
    """What is kept of one bandwidth: nanoseconds since the epoch, tokens (a debt when negative), unfinished token."""

    last_refill_time_nanos: int
    current_size: int
    rounding_error: int


class BucketState(NamedTuple):
    """What is stored under a key: the configuration, its version, tokens consumed so far, and a state per bandwidth."""

    configuration: BucketConfiguration
    configuration_version: int | None
    consumed_tokens: int
    bandwidth_states: tuple[BandwidthState, ...]

    @classmethod
    def initial(cls, configuration: BucketConfiguration, version: int | None, now: int) -> BucketState:
        """Return the state of a bucket that is made at this time, before any refill."""
        configuration = configuration.at(now)
        return cls(configuration, version, 0, tuple(initial_state(bandwidth, now) for bandwidth in configuration))

    def refilled(self, now: int) -> BucketState:
        """Return the state with everything that has come in until this time; a clock that went back changes nothing."""
        configuration, version, consumed, states = self
        refilled = tuple([_refilled(*pair, now) for pair in zip(configuration.bandwidths, states, strict=True)])
        return BucketState(configuration, version, consumed, refilled)

    def refilled_and_consumed(self, tokens: int, now: int) -> BucketState | None:
        """Refill and consume in one step; return None where the tokens are not all there."""
        configuration, version, consumed, states = self
        greedy = configuration.only_greedy
        if greedy is not None:
            # The commonest case does without a function for each part.
            (one,) = states
            last, size, error = refilled_in_short(greedy, one, now) or _refilled(configuration.bandwidths[0], one, now)
            if tokens > size:
                return None
            consumed += tokens
            # The tokens are there, so that the difference does not overflow.
            after_one = (_new(BandwidthState, (last, size - tokens, error)),)
            counted = consumed if consumed <= MAX else wrap(consumed)
            return _new(BucketState, (configuration, version, counted, after_one))
        after = []
        for bandwidth, state in zip(configuration.bandwidths, states, strict=True):
            last, size, error = _refilled(bandwidth, state, now)
            if tokens > size:
                return None
            after.append(_new(BandwidthState, (last, wrap(size - tokens), error)))
        return _new(BucketState, (configuration, version, wrap(consumed + tokens), tuple(after)))

    @property
    def available_tokens(self) -> int:
        """The tokens that can be consumed, those of the scarcest bandwidth; negative in debt."""
        if len(self.bandwidth_states) == 1:
            return self.bandwidth_states[0].current_size
        return min([state.current_size for state in self.bandwidth_states])

    @property
    def is_new_when_full(self) -> bool:
        """Whether this bucket, once it is full, is what a new one would be.

        It is not where new buckets begin with other tokens than the capacity, and where a bandwidth holds more than it.
        """
        configuration = self.configuration
        states = self.bandwidth_states
        if not configuration.starts_full:
            return False
        if len(states) == 1:
            return states[0].current_size <= configuration.bandwidths[0].capacity
        pairs = zip(configuration.bandwidths, states, strict=True)
        return all(state.current_size <= bandwidth.capacity for bandwidth, state in pairs)

    @property
    def reserves_beyond_capacity(self) -> bool:
        """Whether more than the capacity may be reserved: yes, as in Bucket4j."""
        return True

    def consumed(self, tokens: int) -> BucketState:
        """Return the state less these tokens, whether they are there or not."""
        configuration, version, consumed, states = self
        after = tuple([BandwidthState(last, wrap(size - tokens), error) for last, size, error in states])
        return BucketState(configuration, version, wrap(consumed + tokens), after)

    def reserved(self, tokens: int, wait: int, now: int) -> tuple[BucketState, tuple[Surplus, ...]]:
        """Return the state less these tokens, which are not used before this wait is over, and what else was taken.

        One of several bandwidths may make the others wait. What those gain meanwhile above their capacity would be lost
        if the tokens were taken at the end of the wait, but is not lost to a bandwidth in debt. So it is taken as well.

        :returns: the state, and what was taken beside the tokens, by bandwidth; empty: nothing.
        """
        after = self.consumed(tokens)
        if wait <= 0 or len(self.bandwidth_states) == 1:
            return after, ()
        limits, states = self.configuration.bandwidths, after.bandwidth_states
        lowered = tuple([_due_after(*pair, tokens, wait, now) for pair in zip(limits, states, strict=True)])
        if lowered == states:
            return after, ()
        surplus = tuple([_surplus(*parts) for parts in zip(limits, states, lowered, strict=True)])
        return after._replace(bandwidth_states=lowered), surplus

    def given_back(self, tokens: int) -> BucketState:
        """Return the state as if these tokens had not been consumed, up to the capacity; no size gets smaller."""
        return self._given_back(tokens, 0)

    def cancelled(self, tokens: int, noted: int, surplus: tuple[Surplus, ...]) -> BucketState | None:
        """Return the state as if a reservation had not been made; None where the tokens must not come back.

        Reservations that were made later count on this place being taken. While any of them may wait, only the last one
        is undone. Where none waits, no more comes back than can be there beside what was consumed later.

        :param noted: what was counted as consumed right after the reservation.
        :param surplus: what was taken beside the tokens, by bandwidth.
        """
        # The counter of consumed tokens shows what was consumed or reserved after the reservation.
        later = max(0, wrap(self.consumed_tokens - noted))
        if later:
            return None if self.available_tokens < 0 else self._given_back(tokens, later)
        state = self._given_back(tokens, 0)
        if not surplus:
            return state
        raised = list(state.bandwidth_states)
        # The limits may have been replaced by fewer since.
        for place, (bandwidth, part) in enumerate(zip(self.configuration.bandwidths, surplus, strict=False)):
            raised[place] = _raised(bandwidth, raised[place], *part, bandwidth.capacity)
        return state._replace(bandwidth_states=tuple(raised))

    def _given_back(self, tokens: int, later: int) -> BucketState:
        pairs = zip(self.configuration.bandwidths, self.bandwidth_states, strict=True)
        raised = [_raised(bandwidth, state, tokens, 0, bandwidth.capacity - later) for bandwidth, state in pairs]
        return self._replace(consumed_tokens=wrap(self.consumed_tokens - tokens), bandwidth_states=tuple(raised))

    def added(self, tokens: int) -> BucketState:
        """Return the state with these tokens put in, up to the capacity; a size above it falls to it."""
        return self._replace(
            bandwidth_states=tuple(
                _added(bandwidth, state, tokens)
                for bandwidth, state in zip(self.configuration, self.bandwidth_states, strict=True)
            )
        )

    def force_added(self, tokens: int) -> BucketState:
        """Return the state with these tokens put in, above the capacity if need be."""
        return self._replace(bandwidth_states=tuple(_force_added(state, tokens) for state in self.bandwidth_states))

    def reset(self) -> BucketState:
        """Return the state with every bandwidth at its capacity."""
        return self._replace(
            bandwidth_states=tuple(
                BandwidthState(state.last_refill_time_nanos, bandwidth.capacity, 0)
                for bandwidth, state in zip(self.configuration, self.bandwidth_states, strict=True)
            )
        )

    def held_back(self, nanos: int, now: int) -> BucketState | None:
        """Return the state whose next token is not there before this long from now; None where that is so already.

        A wait is that of the scarcest bandwidth, so that taking from one of them is enough: from the one whose wait
        gets the least too long, and of several such from the one that has regained the soonest what is taken.
        """
        if self.nanos_until(1, now, check_capacity=False) >= nanos:
            return None
        pairs = zip(self.configuration.bandwidths, self.bandwidth_states, strict=True)
        ways = [_held_back(bandwidth, state, nanos, now) for bandwidth, state in pairs]
        place = min(range(len(ways)), key=lambda place: ways[place][:2])
        states = self.bandwidth_states
        return self._replace(bandwidth_states=(*states[:place], ways[place][2], *states[place + 1 :]))

    def nanos_until(self, tokens: int, now: int, *, check_capacity: bool) -> int:
        """Return how long until this many tokens are there, in nanoseconds; NEVER where that does not fit into 64 bits.

        :param check_capacity: NEVER also where more is wanted than a bandwidth can hold.
        """
        waits = [
            nanos_until(bandwidth, state, tokens, now, check_capacity=check_capacity)
            for bandwidth, state in zip(self.configuration.bandwidths, self.bandwidth_states, strict=True)
        ]
        return max(waits)

    def nanos_until_full(self, now: int) -> int:
        """Return how long until every bandwidth is full, in nanoseconds."""
        configuration, _, _, states = self
        greedy = configuration.only_greedy
        if greedy is not None:
            capacity, gained, period = greedy
            ((_, size, error),) = states
            missing = capacity - size
            if missing <= 0:
                return 0
            needed = period * missing
            # This is what _nanos_to_gain computes where nothing overflows.
            if 0 <= error <= needed < MAX:
                return (needed - error) // gained
        return max([nanos_until_full(*pair, now) for pair in zip(configuration.bandwidths, states, strict=True)])

    def shows(self, before: State | None, now: int) -> bool:
        """Return whether the state holds this reading of the clock, which the one that it was computed from does not.

        It does not where tokens come by whole periods, and where the clock is behind the last refill.
        """
        known = set()
        if isinstance(before, BucketState):
            known = {state.last_refill_time_nanos for state in before.bandwidth_states}
        return now not in known and any(now == state.last_refill_time_nanos for state in self.bandwidth_states)


def levels(
    configuration: BucketConfiguration, bandwidth_states: tuple[BandwidthState, ...], now: int
) -> tuple[Level, ...]:
    """Return how full each bandwidth is, as if it stood alone."""
    pairs = zip(configuration.bandwidths, bandwidth_states, strict=True)
    return tuple([_level(bandwidth, state, now) for bandwidth, state in pairs])


def _level(bandwidth: Bandwidth, state: BandwidthState, now: int) -> Level:
    tokens, next_token = state.current_size, NEVER
    if tokens < bandwidth.capacity:
        next_token = nanos_until(bandwidth, state, max(0, tokens) + 1, now, check_capacity=False)
    return Level(bandwidth, tokens, next_token, nanos_until_full(bandwidth, state, now))


def initial_state(bandwidth: Bandwidth, now: int) -> BandwidthState:
    """Return what a bandwidth holds in a bucket that is made at this time."""
    if bandwidth.first_refill_millis is None:
        return BandwidthState(now, bandwidth.initial_tokens, 0)
    first = wrap(bandwidth.first_refill_millis * NANOS_PER_MILLISECOND)
    last = wrap(first - bandwidth.refill_period_nanos)
    if not bandwidth.adaptive_initial_tokens or now >= first:
        return BandwidthState(last, bandwidth.initial_tokens, 0)
    # Adaptive: all that a refill does not bring, and of a refill the part for the time left until the first one.
    capacity, tokens, period = bandwidth.capacity, bandwidth.refill_tokens, bandwidth.refill_period_nanos
    left = wrap(first - now)
    share = saturating_product(left, tokens)
    due = quotient(share, period) if share != MAX else truncated(float(left) * float(tokens) / float(period))
    return BandwidthState(last, min(capacity, wrap(max(0, capacity - tokens) + due)), 0)


def refilled_in_short(
    greedy: tuple[int, int, int], state: tuple[int, int, int], now: int
) -> tuple[int, int, int] | None:
    """Return the three numbers of a greedy bandwidth, refilled; None where that takes the format's own steps.

    :param greedy: what ``BucketConfiguration.only_greedy`` has.
    :param state: the three numbers of a :class:`BandwidthState`.
    """
    last, size, error = state
    if now <= last:
        return state
    capacity, gained, period = greedy
    if size < capacity:
        # In token x nanosecond: whole periods of it are tokens, and the rest is the unfinished token.
        total = (now - last) * gained + error
        if total >= MAX or not 0 <= error < period:
            return None
        size += total // period
        if size >= capacity:
            return now, capacity, 0
        error = total % period
    return now, size, error


def _refilled(bandwidth: Bandwidth, state: BandwidthState, now: int) -> BandwidthState:
    last, size, error = state
    # A clock may go back, as that of a replica which becomes the primary; the time of the last refill never does.
    if now <= last:
        return state
    capacity, tokens, period = bandwidth.capacity, bandwidth.refill_tokens, bandwidth.refill_period_nanos
    if bandwidth.refill_intervally:
        # Tokens came last at the end of the last whole period.
        now = wrap(now - remainder(wrap(now - last), period))
        if now <= last:
            return state
    if size >= capacity:
        # Tokens above the capacity, which were added by force, stay; only the time moves on.
        return BandwidthState(now, size, error)
    total = (now - last) * tokens + error
    if total >= MAX or tokens < 1 or not 0 <= error < period:
        return _refilled_near_overflow(bandwidth, state, now)
    size += total // period
    return _new(BandwidthState, (now, size, total % period) if size < capacity else (now, capacity, 0))


def _refilled_near_overflow(bandwidth: Bandwidth, state: BandwidthState, now: int) -> BandwidthState:
    """Refill step by step, as the format defines it for numbers that do not fit; now is after the last refill."""
    last, size, error = state
    capacity, tokens, period = bandwidth.capacity, bandwidth.refill_tokens, bandwidth.refill_period_nanos
    full = BandwidthState(now, capacity, 0)
    # The format is defined by Java, whose 64-bit numbers wrap around and whose doubles lose digits. So do these steps,
    # because another client must compute the same bytes.
    elapsed = wrap(now - last)
    new_size = size
    if elapsed > period:
        new_size = wrap(size + wrap(quotient(elapsed, period) * tokens))
        # A size that became smaller has wrapped around.
        if new_size > capacity or new_size < size:
            return full
        elapsed = remainder(elapsed, period)
    gained = saturating_product(tokens, elapsed)
    unfinished = wrap(gained + error)
    if gained == MAX or unfinished < 0:
        new_size = wrap(new_size + truncated(float(elapsed) / float(period) * float(tokens)))
        error = 0
    else:
        new_size = wrap(new_size + quotient(unfinished, period))
        error = remainder(unfinished, period)
    return full if new_size >= capacity or new_size < size else BandwidthState(now, new_size, error)


def _due_after(bandwidth: Bandwidth, state: BandwidthState, tokens: int, wait: int, now: int) -> BandwidthState:
    """Return the state, lowered so that it holds no more than the capacity less the tokens when the wait is over."""
    last, size, error = state
    gained, period = bandwidth.refill_tokens, bandwidth.refill_period_nanos
    room = max(0, bandwidth.capacity - tokens)
    if bandwidth.refill_intervally:
        periods = quotient(max(0, wrap(wrap(now - last) + wait)), period)
        return BandwidthState(last, min(size, room - saturating_product(periods, gained)), error)
    elapsed = wait if last <= now else max(0, wrap(wait - wrap(last - now)))
    whole = saturating_product(quotient(elapsed, period), gained)
    part = saturating_product(remainder(elapsed, period), gained)
    if part == MAX:
        # A refill computes it in doubles as well, and rounds it down.
        more = min(MAX - 1, truncated(float(remainder(elapsed, period)) / float(period) * float(gained))) + 1
        unfinished = 0
    else:
        more, left = quotient(part, period), remainder(part, period)
        unfinished = period - left if left else 0
        more += 1 if left else 0
    lowest = room - min(MAX, whole + more), unfinished
    return BandwidthState(last, *min((size, error), lowest))


def _surplus(bandwidth: Bandwidth, state: BandwidthState, lowered: BandwidthState) -> Surplus:
    """Return by how much a state was lowered."""
    _, size, error = state
    _, lowered_size, lowered_error = lowered
    whole, unfinished = divmod(
        (size - lowered_size) * bandwidth.refill_period_nanos + error - lowered_error, bandwidth.refill_period_nanos
    )
    return max(0, min(MAX, whole)), unfinished


def _raised(bandwidth: Bandwidth, state: BandwidthState, tokens: int, unfinished: int, most: int) -> BandwidthState:
    """Return the state with these tokens and this part of a token put in, up to ``most``; no size gets smaller."""
    last, size, error = state
    if size >= most:
        return state
    error = wrap(error + unfinished)
    size += tokens
    if error >= bandwidth.refill_period_nanos:
        error -= bandwidth.refill_period_nanos
        size += 1
    return BandwidthState(last, size, error) if size < most else BandwidthState(last, most, 0)


def _added(bandwidth: Bandwidth, state: BandwidthState, tokens: int) -> BandwidthState:
    size = wrap(state.current_size + tokens)
    if size >= bandwidth.capacity or size < state.current_size:
        return BandwidthState(state.last_refill_time_nanos, bandwidth.capacity, 0)
    return state._replace(current_size=size)


def _force_added(state: BandwidthState, tokens: int) -> BandwidthState:
    size = wrap(state.current_size + tokens)
    if size < state.current_size:
        return BandwidthState(state.last_refill_time_nanos, MAX, 0)
    return state._replace(current_size=size)


def nanos_until(bandwidth: Bandwidth, state: BandwidthState, tokens: int, now: int, *, check_capacity: bool) -> int:
    """Return how long until one bandwidth holds this many tokens; see :meth:`BucketState.nanos_until`."""
    if check_capacity and tokens > bandwidth.capacity:
        return NEVER
    if tokens <= state.current_size:
        return 0
    missing = wrap(tokens - state.current_size)
    return _nanos_to_gain(bandwidth, state, missing, now) if missing > 0 else NEVER


def nanos_until_full(bandwidth: Bandwidth, state: BandwidthState, now: int) -> int:
    """Return how long until one bandwidth is full."""
    missing = bandwidth.capacity - state.current_size
    if missing <= 0:
        return 0
    return _nanos_to_gain(bandwidth, state, missing if missing <= MAX else wrap(missing), now)


def _nanos_to_gain(bandwidth: Bandwidth, state: BandwidthState, missing: int, now: int) -> int:
    """Return the wait for the missing tokens, rounded down: a greedy bandwidth may need one more nanosecond."""
    tokens, period = bandwidth.refill_tokens, bandwidth.refill_period_nanos
    if not bandwidth.refill_intervally:
        needed, error = period * missing, state.rounding_error
        # This is what follows below, where nothing overflows.
        if 0 <= error <= needed < MAX and tokens > 0:
            return (needed - error) // tokens
        needed = saturating_product(period, missing)
        if needed == MAX:
            return truncated(float(missing) / float(tokens) * float(period))
        return quotient(wrap(needed - state.rounding_error), tokens)
    # All tokens of a period come at its end: the next refill brings the first ones, and whole periods the others.
    to_next_refill = wrap(state.last_refill_time_nanos + period - now)
    if missing <= tokens:
        return to_next_refill
    missing -= tokens
    if missing < tokens:
        return wrap(to_next_refill + period)
    periods = quotient(missing, tokens) + (1 if remainder(missing, tokens) else 0)
    further = saturating_product(periods, period)
    wait = NEVER if further == MAX else wrap(further + to_next_refill)
    return wait if wait >= 0 else NEVER


def _held_back(bandwidth: Bandwidth, state: BandwidthState, nanos: int, now: int) -> tuple[int, int, BandwidthState]:
    """Return how a bandwidth can make others wait this long: the wait, how long it then regains, and its state."""
    last, size, error = state
    tokens, period = bandwidth.refill_tokens, bandwidth.refill_period_nanos
    if tokens < 1 or period < 1:
        # Stored bytes may say so, and what follows would exceed 64 bits.
        raise ArithmeticError("a bandwidth that loses tokens with time")
    if bandwidth.refill_intervally:
        to_next_refill = last + period - now
        periods = max(0, -((to_next_refill - nanos) // period))
        wait = to_next_refill + periods * period
        after = BandwidthState(last, max(_LARGEST_DEBT, min(size, -periods * tokens)), error)
    else:
        # The unfinished token makes the wait exact. Levels are in token x nanosecond: one token is whole at `period`.
        wait = nanos
        level = min(size * period + error, period - nanos * tokens)
        after = BandwidthState(last, *divmod(level, period))
        if after.current_size < _LARGEST_DEBT:
            after = BandwidthState(last, _LARGEST_DEBT, 0)
    taken = (size - after.current_size) * period + error - after.rounding_error
    return wait, taken // tokens, after
