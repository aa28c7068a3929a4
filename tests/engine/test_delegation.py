"""Trust in what is remembered: how it is lost, how it comes back, and what that costs."""

from __future__ import annotations

import random

import pytest

from ratelimit.engine.delegation import BUSY, PROVED, Habit, busier
from ratelimit.engine.last_seen import NOTHING_SEEN, UNKNOWN, Sighting


def sighting(trust: int) -> Sighting:
    return Sighting(b"bytes", None, trust)


def test_nothing_is_swapped_of_which_nothing_is_known() -> None:
    assert NOTHING_SEEN.trust == UNKNOWN < Habit().needed_trust


@pytest.mark.parametrize("trust", [-64, -17, UNKNOWN, 0, PROVED])
def test_a_change_takes_the_trust_away_and_proofs_bring_it_back(trust: int) -> None:
    habit = Habit()
    lost = habit.changed(sighting(trust))
    assert lost < UNKNOWN
    assert lost <= trust
    proofs = 0
    while lost < habit.needed_trust:
        lost = habit.proved(sighting(lost))
        proofs += 1
    assert lost == PROVED
    assert 2 <= proofs <= 8


def test_a_bucket_that_is_changed_every_other_time_is_never_trusted() -> None:
    habit, trust = Habit(), 0
    for _ in range(1_000):
        trust = habit.changed(sighting(trust))
        trust = habit.proved(sighting(trust))
        assert trust < habit.needed_trust


def test_bytes_that_were_seen_once_need_a_proof_where_most_of_them_were_changed() -> None:
    habit = Habit()
    for _ in range(3):
        habit.changed(sighting(0))
    assert habit.needed_trust == PROVED
    for _ in range(100):
        habit.proved(sighting(0))
    assert habit.needed_trust == 0


def test_they_need_none_where_few_were_changed() -> None:
    habit, chance = Habit(), random.Random(1)
    for _ in range(10_000):
        seen = sighting(0)
        habit.changed(seen) if chance.random() < 0.02 else habit.proved(seen)
    assert habit.needed_trust == 0


def test_one_decision_in_seven_looks_at_a_bucket_that_others_write() -> None:
    habit = Habit()
    others = Sighting(None, None, -17)
    assert sum(habit.wants_to_see(others) for _ in range(700)) == 100
    assert habit.wants_to_see(sighting(-17))
    assert habit.wants_to_see(NOTHING_SEEN)


def test_two_strict_requests_that_were_not_run_make_a_bucket_busy_for_a_while() -> None:
    seen = sighting(-17)
    for _ in range(2):
        assert seen.behind < BUSY
        seen = seen._replace(behind=busier(seen))
    assert seen.behind >= BUSY
    for _ in range(100):
        seen = seen._replace(behind=busier(seen))
    assert seen.behind >= BUSY
    assert seen.behind // 2 - 1 < BUSY
