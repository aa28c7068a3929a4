"""The compare-and-swap loop, on a store that loses swaps and replies as it is told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    BucketConfiguration,
    BucketNotFoundError,
    Clock,
    ContentionError,
    CorruptStateError,
    InvalidConfigurationError,
    MemoryStore,
    ProxyManager,
    Recovery,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    SystemClock,
)
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.keys import Key
from ratelimit.stores.protocol import Lost
from ratelimit.testing import ManualClock, ScriptedStore
from tests.support.both_faces import Settled, for_asyncio, settled
from tests.support.inside import pipeline_of

NOW = 1_700_000_000 * 10**9
LIMITS = "10/hour"


class Recorder(ScriptedStore):
    """Takes note of all that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def get(self, key: Key) -> bytes | None:
        self.asked.append("get")
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.asked.append("create" if before is None else "swap")
        return super().swap(key, before, after, ttl_millis)


class FineClock(ManualClock):
    """A clock that no other process reads."""

    def __init__(self, nanos: int) -> None:
        super().__init__(nanos)
        self.unique_readings = True


class Face(Settled):
    """A manager of either face over a scripted store, which notes its pauses instead of making them."""

    def __init__(
        self, kind: str, store: ScriptedStore, clock: ManualClock, limits: Any = LIMITS, **settings: Any
    ) -> None:
        if kind == "sync":
            super().__init__(ProxyManager(store, limits, clock=clock, **settings))
        else:
            super().__init__(AsyncProxyManager(for_asyncio(store), limits, clock=clock, **settings))
        self.pauses: list[int] = []
        pipeline_of(self).requests.pause = self.pauses.append


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def store() -> Recorder:
    return Recorder()


@pytest.fixture
def face(kind: str, store: Recorder, clock: ManualClock) -> Face:
    return Face(kind, store, clock)


def state(consumed: int, limits: str = LIMITS) -> bytes:
    return codec.encode(BucketState.initial(BucketConfiguration.parse(limits), None, NOW).consumed(consumed))


def stored(store: ScriptedStore, key: bytes = b"key") -> BucketState:
    data = store.get(key)
    assert data is not None
    return codec.decode(data)


async def test_a_fresh_key_is_made_without_being_read(face: Face, store: Recorder) -> None:
    assert await face.try_consume("key")
    assert store.asked == ["create"]


async def test_a_key_of_ones_own_is_swapped_from_memory(face: Face, store: Recorder) -> None:
    await face.try_consume("key")
    await face.try_consume("key")
    assert store.asked == ["create", "swap"]
    assert stored(store).consumed_tokens == 2


async def test_a_key_that_another_made_is_learnt_from_the_lost_swap(face: Face, store: Recorder) -> None:
    store.put(b"key", state(3))
    assert await face.try_consume("key")
    assert store.asked == ["create", "swap"]
    assert stored(store).consumed_tokens == 4


async def test_a_key_that_another_changed_is_learnt_from_the_lost_swap(face: Face, store: Recorder) -> None:
    await face.try_consume("key")
    store.put(b"key", state(9))
    store.asked.clear()
    probe = await face.try_consume_and_return_remaining("key")
    assert (probe.consumed, probe.remaining_tokens) == (True, 0)
    assert store.asked == ["swap", "swap"]


async def test_a_rejection_from_memory_is_confirmed_by_the_store(face: Face, store: Recorder) -> None:
    await face.try_consume("key", 10)
    store.asked.clear()
    assert not await face.try_consume("key")
    assert store.asked == ["get"]


async def test_memory_alone_never_rejects(face: Face, store: Recorder) -> None:
    await face.try_consume("key", 10)
    store.put(b"key", state(2))  # another has reset it
    store.asked.clear()
    assert await face.try_consume("key")
    assert store.asked == ["get", "swap"]


async def test_a_rejection_from_what_a_lost_swap_told_needs_no_further_read(face: Face, store: Recorder) -> None:
    store.put(b"key", state(10))
    assert not await face.try_consume("key")
    assert store.asked == ["create"]


async def test_a_missing_bucket_is_made_also_when_the_answer_is_no(face: Face, store: Recorder) -> None:
    assert not await face.try_consume("key", 11)
    assert store.asked == ["create"]
    assert stored(store).consumed_tokens == 0


@pytest.mark.parametrize("verb", ["available_tokens", "snapshot"])
async def test_verbs_that_only_read_read(face: Face, store: Recorder, verb: str) -> None:
    await face.try_consume("key")
    store.asked.clear()
    await getattr(face, verb)("key")
    assert store.asked == ["get"]


async def test_what_was_read_is_remembered(face: Face, store: Recorder) -> None:
    store.put(b"key", state(3))
    await face.available_tokens("key")
    assert await face.try_consume("key")
    assert store.asked == ["get", "swap"]


async def test_a_removed_key_is_made_anew(face: Face, store: Recorder) -> None:
    await face.try_consume("key", 10)
    store.delete(b"key")  # by another
    store.asked.clear()
    assert not await face.try_consume("key", 11)
    assert store.asked == ["get", "create"]
    await face.remove("key")
    store.asked.clear()
    assert await face.try_consume("key", 10)
    assert store.asked == ["create"]


async def test_the_clock_may_begin_at_zero(kind: str, store: Recorder) -> None:
    clock = ManualClock(0)
    face = Face(kind, store, clock)
    store.lose_swaps(state=None)
    assert (await settled(face.face.bucket("key").verbose.try_consume())).operation_time_nanos == 0
    assert stored(store).bandwidth_states[0].last_refill_time_nanos == 0


async def test_attempts_are_bounded(kind: str, store: Recorder, clock: ManualClock) -> None:
    face = Face(kind, store, clock, max_attempts=7)
    store.lose_swaps(7, state=state(1))
    with pytest.raises(ContentionError) as caught:
        await face.try_consume("key")
    assert (caught.value.key, caught.value.attempts) == ("key", 7)
    assert store.asked.count("create") + store.asked.count("swap") == 7
    assert stored(store).consumed_tokens == 1
    assert await face.try_consume("key")


async def test_a_pause_is_jittered_and_followed_by_a_fresh_read(kind: str, store: Recorder, clock: ManualClock) -> None:
    face = Face(kind, store, clock)
    store.lose_swaps(30, state=state(1))
    assert await face.try_consume("key")
    assert store.asked[:4] == ["create", "swap", "swap", "swap"]
    assert store.asked[4:] == ["get", "swap"] * 27
    assert len(face.pauses) == 27
    assert len(set(face.pauses)) > 20
    assert 0 <= min(face.pauses) <= max(face.pauses) < 16_000_000
    assert clock.slept == []


async def test_an_unexpected_error_of_the_store_passes_and_nothing_is_charged(face: Face, store: Recorder) -> None:
    store.fail(StoreTimeoutError(b"", "slow"))
    with pytest.raises(StoreTimeoutError, match="slow") as caught:
        await face.try_consume("key")
    assert caught.value.key == "key"
    assert not caught.value.in_doubt
    assert store.asked == ["create"]
    assert store.get(b"key") is None
    assert await face.try_consume("key")


@pytest.mark.parametrize("known", [False, True])
async def test_a_lost_reply_is_recognised_by_ones_own_bytes(kind: str, store: Recorder, known: bool) -> None:
    clock = FineClock(NOW)
    face = Face(kind, store, clock)
    if known:
        await face.try_consume("key")
        clock.advance(nanos=1)
    store.lose_replies()
    assert await face.try_consume("key")
    assert stored(store).consumed_tokens == 1 + known
    assert await face.try_consume("key")
    assert stored(store).consumed_tokens == 2 + known


async def test_a_lost_request_is_sent_again(face: Face, store: Recorder) -> None:
    await face.try_consume("key")
    store.lose_requests()
    assert await face.try_consume("key")
    assert stored(store).consumed_tokens == 2


async def test_a_second_lost_reply_is_an_error_that_tells_the_doubt(face: Face, store: Recorder) -> None:
    await face.try_consume("key")
    store.lose_replies(2)
    with pytest.raises(StoreUnavailableError, match="may have been carried out") as caught:
        await face.try_consume("key")
    assert caught.value.in_doubt
    assert stored(store).consumed_tokens == 2


async def test_a_failure_after_a_lost_reply_stays_in_doubt(face: Face, store: Recorder) -> None:
    await face.try_consume("key")
    store.lose_replies()
    store.fail()
    with pytest.raises(StoreUnavailableError) as caught:
        await face.try_consume("key")
    assert caught.value.in_doubt


async def test_after_a_lost_reply_and_another_writer_nothing_is_charged_twice(face: Face, store: Recorder) -> None:
    await face.try_consume("key")
    store.lose_replies()
    store.lose_swaps(state=state(3))
    with pytest.raises(StoreUnavailableError, match="while others were changing") as caught:
        await face.try_consume("key")
    assert caught.value.in_doubt
    assert stored(store).consumed_tokens == 3


LOOK_ALIKE = [  # clocks and limits that leave no reading of one's own in the bytes
    (FineClock, LIMITS, 0),  # at the time of the last refill
    (FineClock, LIMITS, -3_000_000_017),  # before it
    (FineClock, "10/hour intervally", 1),
    (ManualClock, LIMITS, 1),
    (ManualClock, LIMITS, 100_000),
    (ManualClock, LIMITS, 15_625_000),
]


@pytest.mark.parametrize(("make_clock", "limits", "moved"), LOOK_ALIKE)
@pytest.mark.parametrize("is_lost", ["the reply", "the request, and another stores the same"])
async def test_bytes_that_may_be_of_another_are_in_doubt_after_a_lost_reply(  # noqa: PLR0917  # all parameters
    kind: str, store: Recorder, make_clock: type[ManualClock], limits: str, moved: int, is_lost: str
) -> None:
    """Others that decide alike at about the same time compute the same bytes, where those do not tell the time."""
    clock = make_clock(NOW)
    face = Face(kind, store, clock, limits)
    assert await face.try_consume("key", 9)
    clock.advance(nanos=moved)
    if is_lost == "the reply":
        store.lose_replies()
    else:
        store.lose_requests()
        store.lose_swaps(state=codec.encode(stored(store).refilled(clock.now_nanos()).consumed(1)))
    with pytest.raises(StoreUnavailableError, match="another writer may have stored") as caught:
        await face.try_consume("key")
    assert caught.value.in_doubt
    assert stored(store).consumed_tokens == 10
    assert not await face.try_consume("key")


@pytest.mark.parametrize("limits", [LIMITS, "10/hour; 20/day intervally"])
async def test_bytes_that_hold_a_reading_of_ones_own_are_a_success(kind: str, store: Recorder, limits: str) -> None:
    clock = FineClock(NOW)
    one, other = Face(kind, store, clock, limits), Face(kind, store, clock, limits)
    await one.try_consume("key")
    await other.try_consume("key")
    await one.try_consume("key")
    clock.advance(nanos=1)
    store.lose_replies()
    assert await one.try_consume("key")
    assert stored(store).consumed_tokens == 4


@pytest.mark.parametrize("resolution", [1e-9, 1e-7, 1e-6, 0.015625])
def test_readings_of_a_coarse_monotonic_clock_are_not_unique(resolution: float) -> None:
    program = (
        "import time;"
        "info = time.get_clock_info('monotonic');"
        f"info.resolution = {resolution};"
        "time.get_clock_info = lambda name: info;"
        "import ratelimit, redis;"
        "print(ratelimit.MemoryStore().unique_readings, ratelimit.RedisStore(redis.Redis()).unique_readings)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(resolution < 1e-6)] * 2


def test_a_clock_has_unique_readings_where_it_says_so() -> None:
    clock = ManualClock(NOW)
    for store in (MemoryStore(clock=clock), AsyncMemoryStore(clock=clock), AsyncMemoryStore(MemoryStore(clock=clock))):
        assert not store.unique_readings
    assert MemoryStore(clock=FineClock(NOW)).unique_readings
    clocks: dict[Clock | None, bool] = {None: True, SystemClock(): False, clock: False, FineClock(NOW): True}
    for given, unique in clocks.items():
        assert pipeline_of(ProxyManager(MemoryStore(), clock=given)).requests.unique_readings == unique


async def test_bytes_of_another_that_equal_ones_own_are_no_success(kind: str, clock: ManualClock) -> None:
    """Two clients that decide alike at the same time compute the same bytes; both must be charged."""
    store = Recorder()
    one, other = Face(kind, store, clock), Face(kind, store, clock)
    assert await one.try_consume("key")
    assert await other.try_consume("key")
    assert stored(store).consumed_tokens == 2


async def test_foreign_bytes_are_an_error_and_left_alone(face: Face, store: Recorder) -> None:
    store.put(b"key", b"something else")
    for verb in ("try_consume", "available_tokens", "reset", "configuration"):
        with pytest.raises(CorruptStateError) as caught:
            await getattr(face, verb)("key")
        assert (caught.value.key, caught.value.state) == ("key", b"something else")
    assert store.get(b"key") == b"something else"


async def test_a_stored_period_of_zero_is_an_error_of_ours(face: Face, store: Recorder, clock: ManualClock) -> None:
    whole = bytearray(state(3))
    whole[32:40] = bytes(8)
    whole += b"what follows the end"
    store.put(b"key", bytes(whole))
    clock.advance(5)
    with pytest.raises(CorruptStateError, match="out of range") as caught:
        await face.try_consume("key")
    assert caught.value.state == bytes(whole)


async def test_a_handle_that_made_its_bucket_may_insist_on_it(kind: str, store: Recorder, clock: ManualClock) -> None:
    face = Face(kind, store, clock, recovery=Recovery.RAISE)
    assert await face.try_consume("key")
    store.delete(b"key")
    for _ in range(2):
        with pytest.raises(BucketNotFoundError) as caught:
            await face.try_consume("key")
        assert caught.value.key == "key"
        with pytest.raises(BucketNotFoundError):
            await face.available_tokens("key")
    assert store.get(b"key") is None
    assert await settled(face.face.bucket("key").try_consume())
    assert await face.try_consume("key")


async def test_a_handle_does_not_miss_its_bucket_by_memory_alone(
    kind: str, store: Recorder, clock: ManualClock
) -> None:
    face = Face(kind, store, clock, recovery=Recovery.RAISE, memory_limit_bytes=0)
    assert await face.try_consume("key")
    assert await face.try_consume("key")
    assert store.asked == ["create", "get", "swap"]


async def test_memory_of_states_is_bounded(kind: str, store: Recorder, clock: ManualClock) -> None:
    face = Face(kind, store, clock, memory_limit_bytes=100_000)
    for number in range(1000):
        await face.try_consume(f"key {number}")
    seen = pipeline_of(face).last_seen
    assert 100 < len(seen._values) < 200
    await face.try_consume("k" * 200_000)
    assert len(seen._values) < 300
    store.asked.clear()
    await face.try_consume("key 0")
    assert store.asked == ["create", "swap"]  # forgotten, and so as if never seen


async def test_a_key_without_limits_costs_nothing(kind: str, store: Recorder, clock: ManualClock) -> None:
    asked: list[Any] = []

    def plan(key: str) -> str | None:
        asked.append(key)
        return None if key == "vip" else "1/hour"

    face = Face(kind, store, clock, plan)
    assert [await face.try_consume("vip") for _ in range(3)] == [True] * 3
    assert await face.try_consume_as_much_as_possible("vip", 7) == 7
    assert await face.consume("vip", 10**9)
    assert (await face.try_consume_and_return_remaining("vip")).retry_after == 0
    with pytest.raises(BucketNotFoundError):
        await face.snapshot("vip")
    assert store.asked == []
    assert [await face.try_consume("other") for _ in range(2)] == [True, False]
    assert asked == ["vip"] * 7 + ["other"] * 2


async def test_an_async_callable_tells_limits() -> None:
    async def plan(key: str) -> str | None:
        await asyncio.sleep(0)
        return "1/hour" if key == "free" else None

    manager = AsyncProxyManager(AsyncMemoryStore(), plan)
    assert [await manager.try_consume("free") for _ in range(2)] == [True, False]
    assert await manager.try_consume("vip")


async def test_a_callable_that_fails_or_answers_nonsense_is_heard(
    kind: str, store: Recorder, clock: ManualClock
) -> None:
    def broken(key: str) -> str:
        raise LookupError(key)

    with pytest.raises(LookupError, match="some key"):
        await Face(kind, store, clock, broken).try_consume("some key")
    with pytest.raises(InvalidConfigurationError, match="limits must be text such as"):
        await Face(kind, store, clock, lambda _: 5).try_consume("key")


async def test_every_store_error_is_a_rate_limit_error_with_its_key(face: Face, store: Recorder) -> None:
    store.fail()
    with pytest.raises(StoreError) as caught:
        await face.try_consume(b"\xff key")
    assert caught.value.key == b"\xff key"
    assert "\\xff key" in str(caught.value)


async def test_errors_name_the_key_as_it_was_given_also_with_a_prefix(
    kind: str, store: Recorder, clock: ManualClock
) -> None:
    face = Face(kind, store, clock, prefix="p:")
    store.put("p:key", b"foreign")

    def unavailable(key: bytes) -> None:
        raise StoreUnavailableError(key, "gone")

    for verb in ("try_consume", "available_tokens", "configuration"):
        with pytest.raises(CorruptStateError) as caught:
            await getattr(face, verb)("key")
        assert caught.value.key == "key"
    for name in ("get", "delete"):
        setattr(store, name, unavailable)
    for verb in ("available_tokens", "configuration", "remove"):
        with pytest.raises(StoreUnavailableError) as refused:
            await getattr(face, verb)("key")
        assert refused.value.key == "key"
