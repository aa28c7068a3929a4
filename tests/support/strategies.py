"""Limits and states for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from ratelimit import Bandwidth, BandwidthState, BucketConfiguration
from ratelimit.core.numbers import MAX, MIN
from ratelimit.core.token_bucket.state import BucketState

anything_64_bit = st.one_of(
    st.integers(MIN, MAX), st.sampled_from([MIN, MIN + 1, -1, 0, 1, MAX - 1, MAX]), st.integers(-100, 100)
)
ids = st.one_of(st.none(), st.text(max_size=8), st.text(alphabet=st.characters(codec=None), max_size=4))


@st.composite
def bandwidths(draw: st.DrawFn, largest: int = MAX) -> Bandwidth:
    """Any valid bandwidth."""
    period = draw(st.one_of(st.integers(1, largest), st.sampled_from([1, 10**9, 60 * 10**9, 86_400 * 10**9])))
    aligned = draw(st.booleans())
    adaptive = aligned and draw(st.booleans())
    return Bandwidth(
        capacity=draw(st.integers(1, largest)),
        refill_tokens=draw(st.integers(1, min(period, largest))),
        refill_period_nanos=period,
        initial_tokens=None if adaptive else draw(st.one_of(st.none(), st.integers(0, largest))),
        refill_intervally=aligned or draw(st.booleans()),
        first_refill_millis=draw(st.integers(0, MAX)) if aligned else None,
        adaptive_initial_tokens=adaptive,
        id=draw(ids),
    )


def configurations() -> st.SearchStrategy[BucketConfiguration]:
    """Any valid configuration."""
    return st.lists(
        bandwidths(), min_size=1, max_size=4, unique_by=lambda one: object() if one.id is None else one.id
    ).map(lambda them: BucketConfiguration(*them))


@st.composite
def states(draw: st.DrawFn) -> BucketState:
    """Any state that bytes can hold, sound or not."""
    configuration = draw(configurations())
    numbers = st.builds(BandwidthState, anything_64_bit, anything_64_bit, anything_64_bit)
    return BucketState(
        configuration,
        draw(st.one_of(st.none(), anything_64_bit)),
        draw(anything_64_bit),
        tuple(draw(numbers) for _ in configuration),
    )
