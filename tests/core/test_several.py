"""Decisions about several buckets: each is charged, or none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit import NEVER, BucketConfiguration, CombinedProbe, SlidingWindow
from ratelimit.core.algorithm import State
from ratelimit.core.commands import ProbeConsumption, Settle, Terms, TryConsumeAndReturnRemaining, Verbose, execute
from ratelimit.core.numbers import MAX
from ratelimit.core.results import ConsumptionProbe
from ratelimit.core.several import execute_all
from tests.support.fixed_window import FixedWindow

NOW = 1_700_000_000 * 10**9
SECOND = 10**9

LIMITS = [
    BucketConfiguration.parse("10/second"),
    BucketConfiguration.parse("3/second; 20/minute"),
    BucketConfiguration.parse("5/minute intervally initial 2"),
    FixedWindow(4, SECOND),
    SlidingWindow(4, per=1),
]


@st.composite
def buckets(draw: st.DrawFn) -> tuple[list[Terms], list[State | None], list[int]]:
    count = draw(st.integers(1, 4))
    terms = [Terms(draw(st.sampled_from(LIMITS))) for _ in range(count)]
    states: list[State | None] = []
    for each in terms:
        taken = draw(st.none() | st.integers(0, 5))
        state = None if taken is None else each.initial(NOW - draw(st.integers(0, 3)) * SECOND)
        states.append(state.consumed(taken) if state is not None and taken else state)
    return terms, states, [draw(st.integers(1, 6)) for _ in range(count)]


@given(buckets())
def test_all_are_charged_or_none(made: tuple[list[Terms], list[State | None], list[int]]) -> None:
    terms, states, tokens = made
    alone = [
        execute(TryConsumeAndReturnRemaining(count), each, state, NOW)
        for count, each, state in zip(tokens, terms, states, strict=True)
    ]
    afters, answers = execute_all([TryConsumeAndReturnRemaining(count) for count in tokens], terms, states, NOW)
    if all(answer.consumed for _, answer in alone):
        assert (afters, answers) == ([after for after, _ in alone], [answer for _, answer in alone])
        return
    looked = [
        execute(ProbeConsumption(count), each, state, NOW)
        for count, each, state in zip(tokens, terms, states, strict=True)
    ]
    assert (afters, answers) == ([after for after, _ in looked], [answer for _, answer in looked])
    for state, after, answer, (_, by_itself) in zip(states, afters, answers, alone, strict=True):
        # A bucket that was missing is made, and nothing else is stored.
        assert (after is None) == (state is not None)
        assert after is None or after.consumed_tokens == 0
        assert answer.consumed == by_itself.consumed
        assert answer.nanos_to_wait_for_refill == by_itself.nanos_to_wait_for_refill


def test_the_answer_names_all_that_refuse_and_the_longest_wait() -> None:
    probes = [
        ConsumptionProbe(False, 0, 5 * SECOND, 6 * SECOND),
        ConsumptionProbe(True, 3, 0, 7 * SECOND),
        ConsumptionProbe(False, 1, 9 * SECOND, 9 * SECOND),
    ]
    probe = CombinedProbe.of(["a", b"b", "c"], probes)
    assert not probe
    assert (probe.consumed, probe.refused_by, probe.retry_after) == (False, ("a", "c"), 9.0)
    assert [part.consumed for part in probe.parts] == [False, False, False]
    assert [part.remaining_tokens for part in probe.parts] == [0, 3, 1]
    assert not probe.degraded


def test_the_answer_of_all_that_were_charged() -> None:
    probes = [ConsumptionProbe(True, 3, 0, 7), ConsumptionProbe(True, 0, 0, 9, degraded=True)]
    probe = CombinedProbe.of(["a", "b"], probes)
    assert probe
    assert (probe.refused_by, probe.retry_after, probe.degraded) == ((), 0.0, True)
    assert probe.parts == tuple(probes)


def test_what_a_bucket_can_never_hold_is_waited_for_forever() -> None:
    probe = CombinedProbe.of(["a"], [ConsumptionProbe(False, 0, NEVER, 7)])
    assert probe.nanos_to_wait_for_refill == NEVER
    assert probe.retry_after is None


@given(buckets(), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_settlements_are_those_of_each_bucket(
    made: tuple[list[Terms], list[State | None], list[int]], used: list[int]
) -> None:
    terms, states, tokens = made
    commands = [Settle(count, one) for count, one in zip(tokens, used, strict=False)]
    alone = [execute(*each, NOW) for each in zip(commands, terms, states, strict=True)]
    assert execute_all(commands, terms, states, NOW) == ([after for after, _ in alone], [wait for _, wait in alone])


def test_where_one_debt_could_never_be_paid_none_is_settled() -> None:
    terms = [Terms(LIMITS[0]), Terms(LIMITS[0])]
    states = [terms[0].initial(NOW).consumed(5), None]
    for commands in ([Settle(5, 1), Settle(1, MAX)], [Verbose(Settle(5, 1)), Verbose(Settle(1, MAX))]):
        afters, answers = execute_all(commands, terms, states, NOW)
        assert afters == [None, terms[1].initial(NOW)]
        waits = [getattr(answer, "value", answer) for answer in answers]
        assert waits == [0, NEVER]
