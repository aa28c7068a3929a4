"""No more is admitted than the limits and what each process may hand out without the store."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ratelimit import Expiration, MemoryStore, Optimization, ProxyManager
from ratelimit.testing import ManualClock
from tests.engine.local_decisions.doubles import NOW, SECOND, admitted_by, ask, budgets, counts, limits, stored

plain_consumptions = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["try_consume", "try_consume_and_return_remaining", "try_consume_as_much_as_possible", "read"]),
    counts,
    st.sampled_from([0, 0, 1, 10**8, SECOND - 1, SECOND, 3 * SECOND]),
)


@given(limits, budgets, st.lists(plain_consumptions, max_size=60))
def test_no_more_is_admitted_than_the_budgets_of_the_others(
    text: str, budgets: list[tuple[int, float, bool]], schedule: list[Any]
) -> None:
    clock = ManualClock(NOW)
    store = MemoryStore(clock=clock)
    managers = [
        ProxyManager(
            store,
            text,
            clock=clock,
            expiration=Expiration.none(),
            optimization=(Optimization.predicting if predicting else Optimization.delaying)(tokens, time),
        )
        for tokens, time, predicting in budgets
    ]
    used, admitted = set(), 0
    for index, verb, tokens, pause in schedule:
        manager = managers[index]
        if verb == "read":
            manager.available_tokens("key")
        else:
            used.add(index)
            answer = ask(manager, verb, tokens)
            admitted += int(answer) if verb == "try_consume_as_much_as_possible" else tokens * bool(answer)
        others = sorted(budgets[index][0] for index in used)[1:]
        assert admitted <= admitted_by(text, clock.now_nanos() - NOW) + sum(others)
        clock.advance(nanos=pause)
    for manager in managers:
        manager.close()
    if admitted:
        assert stored(store, clock)[1] == admitted


def test_the_bound_is_reached() -> None:
    clock = ManualClock(NOW)
    store = MemoryStore(clock=clock)
    delaying = Optimization.delaying(10, 60)
    managers = [ProxyManager(store, "100/day intervally", clock=clock, optimization=delaying) for _ in range(4)]
    for manager in managers:
        manager.try_consume("key", 15)
    while managers[0].available_tokens("key") > 10:
        managers[0].try_consume("key", 11)
    for manager in managers:  # 10 are left as all of them know by now
        manager.bucket("key").sync()
    left = managers[0].available_tokens("key")
    granted = [manager.try_consume("key", left) for manager in managers]
    assert granted == [True] * 4
    for manager in managers:
        manager.close()
    assert stored(store, clock)[0] == -3 * left
