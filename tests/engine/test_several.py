"""Several buckets in one decision: the loop, lost replies, failures, waits, and calls that go together."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from ratelimit import (
    NEVER,
    AsyncProxyManager,
    ContentionError,
    CorruptStateError,
    CountingListener,
    Decision,
    InvalidArgumentError,
    Lost,
    MemoryStore,
    OnError,
    ProxyManager,
    ReservationOverflowError,
    StoreTimeoutError,
    StoreUnavailableError,
    all_of,
)
from ratelimit.core.algorithm import encode
from ratelimit.core.commands import Terms
from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.stores.protocol import Swap
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore, SwappingMemoryStore
from tests.engine.unreliable import DOWN, IN_DOUBT, Unreliable
from tests.support.both_faces import Face, Settled, for_asyncio
from tests.support.inside import pipeline_of
from tests.support.servers import wait_until

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
TENANT, USER = b"tenant:{acme}", b"user:{acme}:1"


class Joint:
    """Users and tenants over one store, which moves its clock with every decision."""

    def __init__(self, face: Face, store: SwappingMemoryStore, **settings: Any) -> None:
        self.face = face
        self.clock = settings.pop("clock", None) or ManualClock(NOW)
        self.clock.unique_readings = True
        self.store = store
        self.given: Any = store if face is ProxyManager else for_asyncio(store)
        self.settings: dict[str, Any] = {"clock": self.clock, **settings}
        self.users = self.manager("20/hour", "user:")
        self.tenants = self.manager("30/hour", "tenant:")

    def manager(self, limits: Any, prefix: str, **settings: Any) -> Any:
        made: Any = self.face
        return made(self.given, limits, prefix=prefix, **{**self.settings, **settings})

    def both(self, user: str = "1", tokens: int = 1, **keywords: Any) -> Settled:
        return Settled(
            all_of(self.users.bucket(f"{{acme}}:{user}"), (self.tenants.bucket("{acme}"), tokens), **keywords)
        )

    async def consumed(self) -> tuple[int, int]:
        """What the buckets have counted: that of the user, and that of the tenant."""
        user = await Settled(self.users.bucket("{acme}:1")).snapshot()
        tenant = await Settled(self.tenants.bucket("{acme}")).snapshot()
        return user.consumed_tokens, tenant.consumed_tokens


def state_of(limits: str, taken: int, at: int) -> bytes:
    state = Terms(BucketConfiguration.parse(limits)).initial(at)
    return encode(state.consumed(taken))


@pytest.fixture
def scripted() -> ScriptedStore:
    return ScriptedStore()


@pytest.fixture
def joint(face: Face, scripted: ScriptedStore) -> Joint:
    return Joint(face, scripted)


# The loop


async def test_a_swap_that_is_lost_is_computed_from_what_has_won(joint: Joint, scripted: ScriptedStore) -> None:
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    # Under the key of the user, which is the first.
    scripted.lose_swaps(state=state_of("20/hour", 7, NOW))
    probe = await limit.try_consume_and_return_remaining()
    assert [part.remaining_tokens for part in probe.parts] == [12, 28]
    assert await joint.consumed() == (8, 2)


async def test_a_refusal_after_a_lost_swap_charges_nothing(joint: Joint, scripted: ScriptedStore) -> None:
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    scripted.lose_swaps(state=state_of("20/hour", 20, NOW))
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}:1",)
    assert await joint.consumed() == (20, 1)


async def test_attempts_are_bounded(face: Face, scripted: ScriptedStore) -> None:
    joint = Joint(face, scripted, max_attempts=7)
    scripted.lose_swaps(100, state=state_of("20/hour", 1, NOW))
    with pytest.raises(ContentionError) as caught:
        await joint.both().try_consume()
    assert (caught.value.key, caught.value.attempts) == ("{acme}:1", 7)
    assert scripted.get(TENANT) is None


async def test_there_is_no_time_for_more_attempts_than_the_timeout_allows(
    joint: Joint, scripted: ScriptedStore
) -> None:
    scripted.lose_swaps(10_000, state=state_of("20/hour", 1, NOW))
    with pytest.raises(StoreTimeoutError, match="swaps that were lost") as caught:
        await joint.both().try_consume(timeout=0.1)
    assert not caught.value.in_doubt
    assert scripted.get(TENANT) is None


# Lost replies


@pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])
async def test_a_swap_whose_reply_is_lost_is_charged_once(joint: Joint, scripted: ScriptedStore, loss: str) -> None:
    limit = joint.both()
    for number in range(1, 5):
        getattr(scripted, loss)()
        assert await limit.try_consume()
        assert await joint.consumed() == (number, number)
        joint.clock.advance(1)


async def test_our_bytes_in_one_bucket_prove_that_all_were_charged(joint: Joint, scripted: ScriptedStore) -> None:
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    scripted.lose_replies()
    # Others move the tenant's bucket on before the swap is sent again.
    _after_next(scripted, lambda: scripted.put(TENANT, state_of("30/hour", 9, joint.clock.now_nanos() + 1)))
    assert await limit.try_consume()
    assert await joint.consumed() == (2, 9)


async def test_a_bucket_that_is_as_before_proves_that_none_was_charged(joint: Joint, scripted: ScriptedStore) -> None:
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    scripted.lose_requests()
    _after_next(scripted, lambda: scripted.put(TENANT, state_of("30/hour", 9, joint.clock.now_nanos() + 1)))
    assert await limit.try_consume()
    assert await joint.consumed() == (2, 10)


@pytest.mark.parametrize("at", [0, -1])
async def test_it_does_not_where_the_other_bucket_may_be_as_before_again(
    joint: Joint, scripted: ScriptedStore, at: int
) -> None:
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    scripted.lose_requests()
    # The first swap may still be on its way: it would be carried out once the bytes are back.
    before = joint.clock.now_nanos() - SECOND + at
    _after_next(scripted, lambda: scripted.put(TENANT, state_of("30/hour", 9, before)))
    with pytest.raises(StoreUnavailableError) as caught:
        await limit.try_consume()
    assert caught.value.in_doubt
    assert await joint.consumed() == (1, 9)


async def test_it_is_in_doubt_where_all_have_changed(joint: Joint, scripted: ScriptedStore) -> None:
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    scripted.lose_replies()

    def others() -> None:
        scripted.put(TENANT, state_of("30/hour", 9, joint.clock.now_nanos() + 1))
        scripted.put(USER, state_of("20/hour", 9, joint.clock.now_nanos() + 1))

    _after_next(scripted, others)
    with pytest.raises(StoreUnavailableError, match="while others were changing the buckets") as caught:
        await limit.try_consume()
    assert caught.value.in_doubt
    joint.clock.advance(1)
    assert await limit.try_consume()


async def test_nothing_is_proved_by_a_clock_that_others_may_read_alike(joint: Joint, scripted: ScriptedStore) -> None:
    joint.clock.unique_readings = False
    joint.users, joint.tenants = joint.manager("20/hour", "user:"), joint.manager("30/hour", "tenant:")
    limit = joint.both()
    await limit.try_consume()
    joint.clock.advance(1)
    scripted.lose_replies()
    _after_next(scripted, lambda: scripted.put(TENANT, state_of("30/hour", 9, joint.clock.now_nanos() + 1)))
    with pytest.raises(StoreUnavailableError) as caught:
        await limit.try_consume()
    assert caught.value.in_doubt


def _after_next(scripted: ScriptedStore, others: Callable[[], None]) -> None:
    """Let others come in between the next swap and the one after it."""

    def come(_key: bytes, carry_out: Callable[[], Any], _lost: Callable[[Lost], Any]) -> Any:
        others()
        return carry_out()

    scripted._script.append(come)


# on_error


@pytest.fixture
def unreliable() -> Unreliable:
    return Unreliable()


def of_policies(face: Face, store: Unreliable, user: Any, tenant: Any, **settings: Any) -> tuple[Joint, Settled]:
    joint = Joint(face, store, **settings)
    users = joint.manager("4/hour", "user:", on_error=user)
    tenants = joint.manager("6/hour", "tenant:", on_error=tenant)
    joint.users, joint.tenants = users, tenants
    return joint, joint.both()


async def test_a_part_that_denies_refuses_for_all(face: Face, unreliable: Unreliable) -> None:
    unreliable.down = DOWN
    for user, tenant, refused_by in (
        (OnError.ALLOW, OnError.DENY, ("{acme}",)),
        (OnError.DENY, OnError.local(1), ("{acme}:1",)),
        (OnError.DENY, OnError.DENY, ("{acme}:1", "{acme}")),
        (OnError.DENY, OnError.RAISE, ("{acme}:1",)),
    ):
        _, limit = of_policies(face, unreliable, user, tenant)
        assert not await limit.try_consume()
        probe = await limit.try_consume_and_return_remaining()
        assert (probe.consumed, probe.degraded, probe.refused_by) == (False, True, refused_by)
        assert probe.retry_after == 1.0
        assert all(part.degraded for part in probe.parts)
        assert not await limit.estimate_ability_to_consume()
        assert not await limit.consume(max_wait=60)
        assert not await limit.consume()


async def test_all_that_allow_let_everybody_through(face: Face, unreliable: Unreliable) -> None:
    unreliable.down = DOWN
    _, limit = of_policies(face, unreliable, OnError.ALLOW, lambda *_: OnError.ALLOW)
    probe = await limit.try_consume_and_return_remaining()
    assert (probe.consumed, probe.degraded, probe.parts[0].remaining_tokens) == (True, True, MAX)
    assert await limit.consume(max_wait=0)


@pytest.mark.parametrize("other", [OnError.ALLOW, OnError.local(1), OnError.RAISE])
async def test_a_part_that_raises_raises_the_error(face: Face, unreliable: Unreliable, other: OnError) -> None:
    unreliable.down = DOWN
    _, limit = of_policies(face, unreliable, OnError.RAISE, other)
    for verb in ("try_consume", "try_consume_and_return_remaining", "consume", "estimate_ability_to_consume"):
        with pytest.raises(StoreUnavailableError):
            await getattr(limit, verb)()


async def test_a_snapshot_is_an_error_whatever_is_said(face: Face, unreliable: Unreliable) -> None:
    unreliable.down = DOWN
    _, limit = of_policies(face, unreliable, OnError.ALLOW, OnError.ALLOW)
    with pytest.raises(StoreUnavailableError):
        await limit.snapshot()


async def test_local_buckets_are_charged_together_and_their_tokens_are_stored_later(
    face: Face, unreliable: Unreliable
) -> None:
    joint, limit = of_policies(face, unreliable, OnError.local(0.5), OnError.local(0.5))
    assert await limit.try_consume()
    unreliable.down = DOWN
    probes = [await limit.try_consume_and_return_remaining() for _ in range(3)]
    assert [probe.consumed for probe in probes] == [True, True, False]
    assert [[part.remaining_tokens for part in probe.parts] for probe in probes] == [[1, 2], [0, 1], [0, 1]]
    assert probes[2].refused_by == ("{acme}:1",)
    unreliable.down = None
    assert await limit.try_consume()
    for manager in (joint.users, joint.tenants):
        await _charged(manager)
    assert await joint.consumed() == (4, 4)


async def _charged(manager: Any) -> None:
    pipeline = pipeline_of(manager)
    done = pipeline.face.finish(pipeline.fallback.charge_all())
    if done is not None:
        await done


async def test_what_is_in_doubt_is_not_charged_once_more(face: Face, unreliable: Unreliable) -> None:
    joint, limit = of_policies(face, unreliable, OnError.local(1), OnError.local(1))
    assert await limit.try_consume()
    unreliable.down = IN_DOUBT
    assert await limit.try_consume()
    unreliable.down = None
    for manager in (joint.users, joint.tenants):
        await _charged(manager)
    assert await joint.consumed() == (1, 1)


async def test_a_policy_must_give_a_policy(face: Face, unreliable: Unreliable) -> None:
    unreliable.down = DOWN
    _, limit = of_policies(face, unreliable, lambda *_: "allow", OnError.ALLOW)
    with pytest.raises(InvalidArgumentError, match="on_error must give an OnError"):
        await limit.try_consume()


# Listeners


class Notes:
    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.interrupted: list[tuple[Any, int]] = []

    def on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def on_interrupted(self, key: Any, tokens: int, error: BaseException) -> None:
        self.interrupted.append((key, tokens))

    def taken(self) -> list[Decision]:
        taken, self.decisions = self.decisions, []
        return taken


async def test_each_bucket_reports_to_its_own_listener(face: Face, scripted: ScriptedStore) -> None:
    joint, users, tenants = Joint(face, scripted), Notes(), Notes()
    joint.users = joint.manager("2/hour", "user:", listener=users)
    joint.tenants = joint.manager("9/hour", "tenant:", listener=tenants)
    limit = joint.both(tokens=3)
    assert await limit.try_consume()
    (user,), (tenant,) = users.taken(), tenants.taken()
    assert (user.key, user.verb, user.tokens, user.consumed, user.remaining) == ("{acme}:1", "try_consume", 1, 1, 1)
    assert (tenant.key, tenant.tokens, tenant.consumed, tenant.remaining) == ("{acme}", 3, 3, 6)
    assert (user.refused_by, user.degraded, user.error) == ((), False, None)
    assert user.asynchronous == (face is AsyncProxyManager)
    await limit.consume(max_wait=0)
    assert [one.verb for one in users.taken()] == ["consume"]
    assert not await limit.try_consume_and_return_remaining()
    (tenant,) = tenants.taken()[1:]
    assert (tenant.consumed, tenant.remaining, tenant.refused_by) == (0, 3, ("{acme}:1",))
    assert tenant.wait_nanos == 1800 * SECOND
    await limit.estimate_ability_to_consume()
    assert [(one.verb, one.consumed) for one in tenants.taken()] == [("estimate_ability_to_consume", 0)]


async def test_a_key_without_limits_is_not_reported(face: Face, scripted: ScriptedStore) -> None:
    notes = Notes()
    joint = Joint(face, scripted)
    joint.tenants = joint.manager(lambda _: None, "tenant:", listener=notes)
    joint.users = joint.manager("2/hour", "user:", listener=notes)
    assert await joint.both().try_consume()
    assert [one.key for one in notes.taken()] == ["{acme}:1"]


async def test_a_wait_is_reported_once_when_it_is_over(face: Face, scripted: ScriptedStore) -> None:
    notes = Notes()
    joint = Joint(face, scripted)
    joint.tenants = joint.manager("1/minute", "tenant:", listener=notes)
    limit = joint.both()
    assert [await limit.consume() for _ in range(2)] == [True, True]
    assert not await limit.consume(max_wait=59)
    with pytest.raises(ReservationOverflowError):
        await joint.both(tokens=2).consume()
    assert [(one.verb, one.consumed, one.wait_nanos) for one in notes.taken()] == [
        ("consume", 1, 0),
        ("consume", 1, 60 * SECOND),
        ("consume", 0, 60 * SECOND),
        ("consume", 0, NEVER),
    ]


async def test_failures_are_reported(face: Face, unreliable: Unreliable) -> None:
    counts = CountingListener()
    joint = Joint(face, unreliable, listener=counts)
    limit = joint.both()
    unreliable.down = DOWN
    with pytest.raises(StoreUnavailableError):
        await limit.try_consume()
    assert (counts.failed, counts.degraded, counts.consumed) == (2, 0, 0)
    joint.settings["on_error"] = OnError.ALLOW
    joint.users, joint.tenants = joint.manager("2/hour", "user:"), joint.manager("9/hour", "tenant:")
    assert await joint.both(tokens=2).try_consume()
    assert (counts.failed, counts.degraded, counts.consumed) == (2, 2, 3)


# One after the other


async def test_what_was_taken_is_given_back_where_a_later_bucket_fails(face: Face, unreliable: Unreliable) -> None:
    joint = Joint(face, unreliable)
    limit = joint.both(spread=True)
    await limit.try_consume()
    unreliable.put(TENANT, b"garbage")
    with pytest.raises(CorruptStateError) as caught:
        await limit.try_consume()
    assert caught.value.key == "{acme}"
    assert (await Settled(joint.users.bucket("{acme}:1")).snapshot()).consumed_tokens == 1


async def test_a_bucket_in_doubt_is_named_and_the_others_get_their_tokens_back(
    face: Face, scripted: ScriptedStore
) -> None:
    joint = Joint(face, scripted)
    limit = joint.both(spread=True)
    await limit.try_consume()
    joint.clock.advance(1)
    scripted._script.append(scripted._do)  # that of the user
    scripted.fail(StoreUnavailableError(b"", "no reply", in_doubt=True), times=2)
    with pytest.raises(StoreUnavailableError) as caught:
        await limit.try_consume()
    assert (caught.value.key, caught.value.in_doubt) == ("{acme}", True)
    assert await joint.consumed() == (1, 1)


async def test_a_bucket_that_allows_without_the_store_is_not_given_back(face: Face, unreliable: Unreliable) -> None:
    joint = Joint(face, unreliable)
    joint.users = joint.manager("20/hour", "user:", on_error=OnError.ALLOW)
    joint.tenants = joint.manager("1/hour", "tenant:", on_error=OnError.DENY)
    limit = joint.both(spread=True)
    assert await limit.try_consume()
    unreliable.down = DOWN
    probe = await limit.try_consume_and_return_remaining()
    assert (probe.consumed, probe.degraded, probe.refused_by) == (False, True, ("{acme}",))
    unreliable.down = None
    assert await joint.consumed() == (1, 1)


async def test_a_give_back_that_fails_is_logged_and_hides_nothing(
    face: Face, scripted: ScriptedStore, caplog: pytest.LogCaptureFixture
) -> None:
    joint = Joint(face, scripted)
    joint.tenants = joint.manager("1/hour", "tenant:")
    limit = joint.both(spread=True)
    assert await limit.try_consume()
    joint.clock.advance(1)
    scripted._script.append(scripted._do)  # the user is charged; the tenant refuses after a read
    scripted.fail(times=1)
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}",)
    assert "could not be given back" in caplog.text
    # The tokens come back with the refill.
    assert await joint.consumed() == (2, 1)


@pytest.mark.parametrize("spread", [False, True])
def test_no_bucket_is_charged_beyond_its_limit_whoever_competes(spread: bool) -> None:
    store = SwappingMemoryStore()
    tenants, users = ProxyManager(store, "50/day", prefix="tenant:"), ProxyManager(store, "9/day", prefix="user:")
    admitted = [0] * 10

    def caller(number: int) -> None:
        limit = all_of(users.bucket(str(number)), tenants.bucket("acme"), spread=spread)
        for _ in range(12):
            admitted[number] += limit.try_consume()

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(caller, range(10)))
    assert max(admitted) <= 9
    assert sum(admitted) == tenants.snapshot("acme").consumed_tokens
    assert [users.snapshot(str(number)).consumed_tokens for number in range(10)] == admitted
    # One after the other, some may have been refused for want of tokens that were given back later.
    assert sum(admitted) == 50 if not spread else 50 - 10 <= sum(admitted) <= 50


# Waiting


async def test_a_wait_sleeps_for_the_longest_wait_and_tries_again(joint: Joint) -> None:
    joint.users, joint.tenants = joint.manager("1/second", "user:"), joint.manager("3/minute", "tenant:")
    limit = joint.both()
    for _ in range(5):
        assert await limit.consume()
    assert joint.clock.slept == [SECOND, SECOND, 18 * SECOND, 20 * SECOND]
    assert await joint.consumed() == (5, 5)


async def test_a_wait_that_would_take_too_long_is_refused_at_once(joint: Joint) -> None:
    joint.tenants = joint.manager("1/minute", "tenant:")
    limit = joint.both()
    assert await limit.consume(max_wait=0)
    assert not await limit.consume(max_wait=0)
    assert not await limit.consume(max_wait=59.9)
    assert joint.clock.slept == []
    assert await limit.consume(max_wait=60)
    assert joint.clock.slept == [60 * SECOND]


async def test_all_sleeps_together_are_within_the_longest_wait(joint: Joint) -> None:
    joint.tenants = joint.manager("1/minute", "tenant:")
    limit = joint.both()
    assert await limit.consume()

    sleep = joint.clock.sleep

    def sleep_and_be_late(nanos: int) -> None:
        sleep(nanos)
        # Others take the token while this caller sleeps.
        joint.store.put(TENANT, state_of("1/minute", 1, joint.clock.now_nanos()))

    joint.clock.sleep = sleep_and_be_late  # type: ignore[method-assign]
    for manager in (joint.users, joint.tenants):
        pipeline = pipeline_of(manager)
        if not pipeline.face.asynchronous:
            pipeline.sleep = sleep_and_be_late
    assert not await limit.consume(max_wait=150)
    assert joint.clock.slept == [60 * SECOND] * 2


async def test_a_wait_that_never_ends_is_an_error_or_refused(joint: Joint) -> None:
    limit = joint.both(tokens=31)
    with pytest.raises(ReservationOverflowError):
        await limit.consume()
    assert not await limit.consume(max_wait=10**6)
    assert (await limit.try_consume_and_return_remaining()).nanos_to_wait_for_refill == NEVER


def test_threads_that_wait_are_served_in_order_and_only_the_first_asks() -> None:
    store = CountingStore()
    tenants, users = ProxyManager(store, "20/second burst 1", prefix="t:"), ProxyManager(store, "99/day", prefix="u:")
    served: list[int] = []
    everybody = []
    assert all_of(users.bucket("x"), tenants.bucket("acme")).try_consume()
    begun = time.monotonic()
    for number in range(8):

        def wait(number: int = number) -> None:
            assert all_of(users.bucket(str(number)), tenants.bucket("acme")).consume()
            served.append(number)

        thread = threading.Thread(target=wait)
        thread.start()
        everybody.append(thread)
        # Each is refused once before it queues.
        time.sleep(0.005)
    for thread in everybody:
        thread.join()
    assert served == list(range(8))
    assert time.monotonic() - begun >= 0.39
    # A refusal and a swap for each; and a few more for those that woke up a moment too early.
    assert store.swaps < 8 * 5


async def test_tasks_that_wait_are_served_in_order_and_only_the_first_asks() -> None:
    store = CountingStore()
    face = for_asyncio(store)
    tenants = AsyncProxyManager(face, "20/second burst 1", prefix="t:")
    users = AsyncProxyManager(face, "99/day", prefix="u:")
    served: list[int] = []
    assert await all_of(users.bucket("x"), tenants.bucket("acme")).try_consume()

    async def wait(number: int) -> None:
        assert await all_of(users.bucket(str(number)), tenants.bucket("acme")).consume(max_wait=20)
        served.append(number)

    await asyncio.gather(*(wait(number) for number in range(8)))
    assert served == list(range(8))
    assert store.swaps < 8 * 5


async def test_a_caller_does_not_wait_behind_those_that_wait_for_another_bucket() -> None:
    store = for_asyncio(SwappingMemoryStore())
    tenants = AsyncProxyManager(store, "1000/second", prefix="t:")
    users = AsyncProxyManager(store, "1/hour", prefix="u:")
    first = all_of(users.bucket("{acme}:1"), tenants.bucket("{acme}"))
    assert await first.consume()
    waiting = asyncio.create_task(first.consume())
    await asyncio.sleep(0.01)
    assert await all_of(users.bucket("{acme}:2"), tenants.bucket("{acme}")).consume(max_wait=5)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    # The queue is over with the caller.
    assert pipeline_of(tenants).several.turns._queues == {}


async def test_a_caller_that_queues_waits_no_longer_than_it_said(face: Face) -> None:
    joint = Joint(face, SwappingMemoryStore())
    joint.settings["clock"] = None
    joint.users, joint.tenants = joint.manager("9/hour", "user:"), joint.manager("1/second burst 1", "tenant:")
    assert await joint.both().consume()
    turns = pipeline_of(joint.tenants).several.turns
    ahead = turns.join(TENANT)
    begun = time.monotonic()
    assert not await joint.both().consume(max_wait=0.1)
    assert 0.1 <= time.monotonic() - begun < 1
    turns.leave(ahead)
    assert await joint.both().consume(max_wait=5)


def test_a_place_in_the_queue_ends_with_its_caller() -> None:
    joint = Joint(ProxyManager, SwappingMemoryStore())
    turns = pipeline_of(joint.tenants).several.turns
    ahead: Any = turns.join(TENANT)
    del ahead
    gc.collect()
    assert all_of(joint.users.bucket("x"), joint.tenants.bucket("{acme}")).consume(max_wait=1)


async def test_a_wait_that_is_cancelled_takes_nothing_and_is_reported() -> None:
    store, notes = for_asyncio(SwappingMemoryStore()), Notes()
    tenants = AsyncProxyManager(store, "1/hour", prefix="tenant:", listener=notes)
    users = AsyncProxyManager(store, "20/hour", prefix="user:", listener=notes)
    limit = all_of(users.bucket("{acme}:1"), (tenants.bucket("{acme}"), 1))
    assert await limit.consume()
    waiting = asyncio.create_task(limit.consume())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert notes.interrupted == [("{acme}:1", 1), ("{acme}", 1)]
    assert [one.consumed_tokens for one in await limit.snapshot()] == [1, 1]


async def test_a_wait_that_is_cancelled_while_it_is_charged_gives_back() -> None:
    store = AsyncGated()
    tenants = AsyncProxyManager(store, "9/hour", prefix="tenant:", merging=False)
    users = AsyncProxyManager(store, "20/hour", prefix="user:", merging=False)
    limit = all_of(users.bucket("{acme}:1"), tenants.bucket("{acme}"))
    assert await limit.consume()
    store.gate.clear()
    waiting = asyncio.create_task(limit.consume())
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0.01)
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [one.consumed_tokens for one in await limit.snapshot()] == [1, 1]


async def test_so_does_one_that_takes_from_one_bucket_after_the_other() -> None:
    store = AsyncGated()
    tenants = AsyncProxyManager(store, "9/hour", prefix="tenant:", merging=False)
    users = AsyncProxyManager(store, "20/hour", prefix="user:", merging=False)
    limit = all_of(users.bucket("{acme}:1"), tenants.bucket("{acme}"), spread=True)
    assert await limit.consume()
    for turns in range(12):
        waiting = asyncio.create_task(limit.consume())
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            if await waiting:
                await limit.give_back()
        assert [one.consumed_tokens for one in await limit.snapshot()] == [1, 1]


class Interrupting(SwappingMemoryStore):
    """Carries a swap out, and is then interrupted, as by the handler of a signal."""

    interrupts = False

    def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        done = super().swap_all(swaps)
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        return done


@pytest.mark.parametrize("merging", [True, False])
def test_a_wait_that_is_interrupted_while_it_is_charged_gives_back(merging: bool) -> None:
    store = Interrupting()
    tenants = ProxyManager(store, "9/hour", prefix="tenant:", merging=merging)
    users = ProxyManager(store, "20/hour", prefix="user:", merging=merging)
    limit = all_of(users.bucket("{acme}:1"), tenants.bucket("{acme}"))
    assert limit.consume()
    store.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        limit.consume()
    assert [one.consumed_tokens for one in limit.snapshot()] == [1, 1]
    assert limit.consume()


# Calls that go together


class CountingStore(SwappingMemoryStore):
    """Counts what it is asked; its swaps wait in a thread until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps = 0
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        self.swaps += 1
        self.sizes.append(len(swaps))
        self.gate.wait()
        return super().swap_all(swaps)


class AsyncGated(AsyncSwappingMemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        self.sizes.append(len(swaps))
        await asyncio.sleep(0)
        await self.gate.wait()
        return await super().swap_all(swaps)

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        await asyncio.sleep(0)
        return await super().swap(key, before, after, ttl_millis)


def queues_of(manager: Any) -> Any:
    coalescing = pipeline_of(manager).several.coalescing
    assert coalescing is not None
    return coalescing._queues


def test_threads_go_together_by_their_tag_in_order() -> None:
    store = CountingStore()
    tenants, users = ProxyManager(store, "7/day", prefix="t:"), ProxyManager(store, "9/day", prefix="u:")
    tenants.try_consume("{acme}")
    store.gate.clear()
    with ThreadPoolExecutor(10) as threads:
        first = threads.submit(all_of(users.bucket("{acme}:x"), tenants.bucket("{acme}")).try_consume)
        wait_until(lambda: store.swaps == 1, "the first one asks")
        limits = [all_of(users.bucket(f"{{acme}}:{number}"), tenants.bucket("{acme}")) for number in range(8)]
        answers = [threads.submit(limit.try_consume) for limit in limits]
        queues = queues_of(tenants)
        wait_until(lambda: len(queues.get(b"{acme}", ())) == 8, "all others queue")
        store.gate.set()
        assert first.result()
        assert sum(answer.result() for answer in answers) == 5
    assert store.sizes in ([2, 9], [2, 2, 9])
    assert tenants.snapshot("{acme}").consumed_tokens == 7


async def test_tasks_go_together_by_their_tag_in_order() -> None:
    store = AsyncGated()
    tenants, users = AsyncProxyManager(store, "7/day", prefix="t:"), AsyncProxyManager(store, "9/day", prefix="u:")
    limits = [all_of(users.bucket(f"{{acme}}:{number}"), tenants.bucket("{acme}")) for number in range(10)]
    answers = await asyncio.gather(*(limit.try_consume() for limit in limits))
    assert answers == [True] * 7 + [False] * 3
    # The first one alone, and then all others; those that are refused are compared, or made.
    assert store.sizes == [2, 10]


async def test_those_without_a_tag_meet_at_the_last_bucket() -> None:
    store = AsyncGated()
    tenants, users = AsyncProxyManager(store, "99/day", prefix="t:"), AsyncProxyManager(store, "9/day", prefix="u:")
    limits = [all_of(users.bucket(str(number)), tenants.bucket("acme")) for number in range(10)]
    assert all(await asyncio.gather(*(limit.try_consume() for limit in limits)))
    assert store.sizes == [2, 10]


async def test_unions_are_cut_to_what_a_server_may_be_held_for() -> None:
    store = AsyncGated()
    tenants, users = AsyncProxyManager(store, "999/day", prefix="t:"), AsyncProxyManager(store, "9/day", prefix="u:")
    limits = [all_of(users.bucket(f"{{acme}}:{number}"), tenants.bucket("{acme}")) for number in range(150)]
    assert all(await asyncio.gather(*(limit.try_consume() for limit in limits)))
    assert store.sizes == [2, 64, 64, 24]
    assert (await tenants.snapshot("{acme}")).consumed_tokens == 150


async def test_those_that_mean_other_limits_by_a_key_do_not_go_together() -> None:
    store = AsyncGated()
    users = AsyncProxyManager(store, "9/day", prefix="u:")
    tenants = [
        AsyncProxyManager(store, "99/day", prefix="t:"),
        AsyncProxyManager(store, "99/day; 7/second", prefix="t:"),
    ]
    home = AsyncProxyManager(store, "999/day", prefix="all:").bucket("{acme}")
    limits = [
        all_of(users.bucket(f"{{acme}}:{number}"), tenants[number % 2].bucket("{acme}"), home) for number in range(5)
    ]
    assert all(await asyncio.gather(*(limit.try_consume() for limit in limits)))
    assert store.sizes == [3] * 5


async def test_a_task_that_is_cancelled_in_the_queue_is_not_charged_and_disturbs_nobody() -> None:
    store = AsyncGated()
    tenants, users = AsyncProxyManager(store, "99/day", prefix="t:"), AsyncProxyManager(store, "9/day", prefix="u:")
    store.gate.clear()
    calls = [
        asyncio.create_task(all_of(users.bucket(f"{{acme}}:{number}"), tenants.bucket("{acme}")).try_consume())
        for number in range(6)
    ]
    await asyncio.sleep(0.01)
    calls[3].cancel()
    await asyncio.sleep(0.01)
    store.gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers.pop(3), asyncio.CancelledError)
    assert answers == [True] * 5
    assert (await tenants.snapshot("{acme}")).consumed_tokens == 5


async def test_nobody_waits_beyond_a_deadline_of_its_own() -> None:
    store = AsyncGated()
    tenants, users = AsyncProxyManager(store, "99/day", prefix="t:"), AsyncProxyManager(store, "9/day", prefix="u:")

    def limit(number: int) -> Any:
        return all_of(users.bucket(f"{{acme}}:{number}"), tenants.bucket("{acme}"))

    store.gate.clear()
    first = asyncio.create_task(limit(0).try_consume())
    await asyncio.sleep(0.01)
    with pytest.raises(StoreTimeoutError, match="wait for those who came before") as caught:
        await limit(1).try_consume(timeout=0.05)
    assert not caught.value.in_doubt
    later = asyncio.create_task(limit(2).try_consume(timeout=0.2))
    patient = asyncio.create_task(limit(3).try_consume())
    await asyncio.sleep(0.01)
    # The first one is answered, and the next flight stands still.
    store.gate.set()
    await first
    store.gate.clear()
    with pytest.raises(StoreTimeoutError, match="wait for an answer") as caught:
        await later
    assert caught.value.in_doubt
    store.gate.set()
    assert await patient
    assert (await tenants.snapshot("{acme}")).consumed_tokens == 3


async def test_a_failure_is_shared_by_all_that_were_asked_for_together() -> None:
    store = Unreliable()
    face = for_asyncio(store)
    tenants, users = AsyncProxyManager(face, "99/day", prefix="t:"), AsyncProxyManager(face, "9/day", prefix="u:")
    store.down = DOWN
    calls = [all_of(users.bucket(f"{{a}}:{n}"), tenants.bucket("{a}")).try_consume() for n in range(4)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreUnavailableError] * 4
    assert len(set(map(id, answers))) == 4


async def test_what_is_wrong_with_one_bucket_is_an_error_of_its_own_callers(face: Face) -> None:
    store = SwappingMemoryStore()
    joint = Joint(face, store)
    store.put(b"user:{acme}:2", b"garbage")

    async def call(number: int) -> Any:
        try:
            return await joint.both(str(number)).try_consume()
        except CorruptStateError as error:
            return error.key

    if face is AsyncProxyManager:
        answers = await asyncio.gather(*(call(number) for number in range(5)))
    else:
        with ThreadPoolExecutor(5) as threads:
            answers = list(threads.map(lambda number: asyncio.run(call(number)), range(5)))
    assert answers == [True, True, "{acme}:2", True, True]
    assert (await Settled(joint.tenants.bucket("{acme}")).snapshot()).consumed_tokens == 4


def test_a_loop_that_ends_leaves_nothing_behind() -> None:
    store = AsyncGated()
    tenants, users = AsyncProxyManager(store, "99/day", prefix="t:"), AsyncProxyManager(store, "9/day", prefix="u:")

    def limit(number: int) -> Any:
        return all_of(users.bucket(f"{{acme}}:{number}"), tenants.bucket("{acme}"))

    async def abandoned() -> None:
        store.gate = asyncio.Event()
        calls = [asyncio.ensure_future(limit(number).try_consume()) for number in range(3)]
        await asyncio.wait(calls, timeout=0.01)

    async def sound() -> bool:
        store.gate = asyncio.Event()
        store.gate.set()
        return bool(await limit(7).try_consume())

    for _ in range(2):
        asyncio.run(abandoned())
        assert asyncio.run(sound())
    assert queues_of(tenants) == {}


def test_over_a_store_of_this_process_nothing_queues() -> None:
    store = MemoryStore()
    tenants, users = ProxyManager(store, "50/day", prefix="t:"), ProxyManager(store, "9/day", prefix="u:")
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(
                lambda number: all_of(users.bucket(str(number % 8)), tenants.bucket("acme")).try_consume(), range(80)
            )
        )
    assert sum(answers) == 50
    assert tenants.snapshot("acme").consumed_tokens == 50
