"""Waiting for tokens no longer than accepted."""

from __future__ import annotations

from typing import Any

import pytest

from ratelimit import MemoryStore, OnError, ProxyManager
from ratelimit.bucket import Bucket
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER
from ratelimit.policy.waiting import consumed
from ratelimit.runtime.steps import run
from ratelimit.testing import ManualClock, ScriptedStore
from tests.support.fixed_window import FixedWindow

SECOND = NANOS_PER_SECOND


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(0)


@pytest.fixture
def bucket(clock: ManualClock) -> Bucket:
    return ProxyManager(MemoryStore(clock=clock), "2/minute; 10/hour", clock=clock).bucket("key")


def test_tokens_that_are_there_are_taken_without_a_wait(bucket: Bucket, clock: ManualClock) -> None:
    for max_wait in (0, None):
        probe = run(consumed(bucket, 1, max_wait)).value
        assert (probe.consumed, probe.nanos_to_wait_for_refill) == (True, 0)
    assert (bucket.available_tokens(), clock.slept) == (0, [])
    assert probe.remaining_tokens == 0
    assert probe.nanos_to_wait_for_reset == 720 * SECOND


@pytest.mark.parametrize("max_wait", [30 * SECOND, 31 * SECOND, None])
def test_the_wait_for_others_is_slept_out(bucket: Bucket, clock: ManualClock, max_wait: int | None) -> None:
    bucket.try_consume(2)
    assert run(consumed(bucket, 1, max_wait)).value
    assert clock.slept == [30 * SECOND]


@pytest.mark.parametrize("max_wait", [0, 1, 30 * SECOND - 1])
def test_a_longer_wait_is_refused_at_once_and_takes_nothing(bucket: Bucket, clock: ManualClock, max_wait: int) -> None:
    bucket.try_consume(2)
    result = run(consumed(bucket, 1, max_wait))
    assert not result.value
    assert result.value.nanos_to_wait_for_refill == 30 * SECOND
    assert (bucket.available_tokens(), clock.slept) == (0, [])


def test_a_refusal_takes_the_wait_of_the_scarcest_bandwidth(bucket: Bucket) -> None:
    bucket.force_add_tokens(8)
    assert bucket.try_consume(10)
    probe = run(consumed(bucket, 3, SECOND)).value
    assert (probe.retry_after, probe.remaining_tokens) == (90, 0)


def test_more_than_the_bucket_can_hold_is_never_there_unless_it_is_waited_for(bucket: Bucket) -> None:
    assert run(consumed(bucket, 3, 0)).value.nanos_to_wait_for_refill == NEVER
    assert run(consumed(bucket, 3, 30 * SECOND)).value


@pytest.mark.parametrize("max_wait", [0, SECOND, None])
def test_a_policy_answers_where_the_store_fails(max_wait: int | None) -> None:
    store = ScriptedStore()
    for policy, expected in ((OnError.ALLOW, (True, 0)), (OnError.DENY, (False, SECOND))):
        store.fail()
        probe = run(consumed(ProxyManager(store, "1/hour", on_error=policy).bucket("key"), 1, max_wait)).value
        assert probe.degraded
        assert (probe.consumed, probe.nanos_to_wait_for_refill) == expected


def test_another_algorithm_says_how_long_the_wait_would_have_been(clock: ManualClock) -> None:
    limits: Any = FixedWindow(2, 60 * SECOND)
    bucket = ProxyManager(MemoryStore(clock=clock), limits, clock=clock).bucket("key")
    assert run(consumed(bucket, 2, None)).value
    assert run(consumed(bucket, 1, 59 * SECOND)).value.nanos_to_wait_for_refill == 60 * SECOND
    assert run(consumed(bucket, 1, 60 * SECOND)).value
    assert clock.slept == [60 * SECOND]
