"""A second algorithm that is decided about without the store: the bounds hold, and nothing handed out is lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import Expiration, MemoryStore, Optimization, ProxyManager, TokensInheritance
from ratelimit.testing import ManualClock, ScriptedStore, SwappingMemoryStore
from tests.engine.conftest import NOW, SECOND, Make
from tests.support.both_faces import closing, settled
from tests.support.fixed_window import FixedWindow
from tests.support.inside import local_decisions_of

LIMITS = FixedWindow(10, 10 * SECOND)
SKIP = Optimization.skip_sync_on_zero()
DELAYING = Optimization.delaying(5, 2)
PREDICTING = Optimization.predicting(5, 2)
MANUAL = Optimization.manual()


class CountingStore(ScriptedStore):
    """A store that counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get(self, key: Any) -> bytes | None:
        self.count += 1
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Any:
        self.count += 1
        return super().swap(key, before, after, ttl_millis)

    def asked(self) -> int:
        """Return how often it was asked since the last call."""
        asked, self.count = self.count, 0
        return asked


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


def stored(store: SwappingMemoryStore, clock: ManualClock) -> tuple[int, int]:
    """Return the tokens that are there, and those consumed so far, as the store knows them."""
    snapshot = ProxyManager(store, LIMITS, clock=clock).snapshot("key")
    return snapshot.available_tokens, snapshot.consumed_tokens


async def test_a_window_known_to_be_empty_is_asked_about_when_it_ends(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(store, LIMITS, clock=clock, optimization=Optimization.skip_sync_on_zero(100))
    clock.advance(3)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    store.asked()
    clock.advance(nanos=7 * SECOND - 1)
    assert not await face.try_consume("key")
    probe = await face.try_consume_and_return_remaining("key", 3)
    assert (probe.consumed, probe.remaining_tokens, probe.nanos_to_wait_for_refill) == (False, 0, 1)
    assert await face.try_consume_as_much_as_possible("key") == 0
    assert not await face.consume("key", 15, max_wait=9)
    assert store.asked() == 0
    clock.advance(nanos=1)
    assert await face.try_consume("key")
    assert store.asked() == 1


async def test_tokens_are_handed_out_and_told_later(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(store, LIMITS, clock=clock, optimization=DELAYING)
    assert await face.try_consume("key", 2)
    store.asked()
    for _ in range(5):
        assert await face.try_consume("key")
    assert await face.available_tokens("key") == 3
    assert store.asked() == 0
    assert stored(store, clock) == (8, 2)
    store.asked()
    assert await face.try_consume("key")  # a sixth is more than may be unsynchronized
    assert store.asked() == 1
    assert stored(store, clock) == (2, 8)
    assert await face.try_consume("key")
    clock.advance(2)
    store.asked()
    assert await face.try_consume("key")  # what is known is too old
    assert store.asked() == 1
    assert stored(store, clock) == (0, 10)


@pytest.mark.parametrize("optimization", [DELAYING, MANUAL], ids=lambda each: each.kind)
async def test_sync_tells_the_store(
    make: Make, store: CountingStore, clock: ManualClock, optimization: Optimization
) -> None:
    face = make(store, LIMITS, clock=clock, optimization=optimization)
    for _ in range(5):
        assert await face.try_consume("key")
    assert stored(store, clock) == (9, 1)
    await settled(face.face.bucket("key").sync())
    assert stored(store, clock) == (5, 5)
    assert await face.try_consume("key", 3)
    store.asked()
    await settled(face.face.bucket("key").sync())
    assert store.asked() == 1
    assert stored(store, clock) == (2, 8)


async def test_closing_tells_the_store(make: Make, store: CountingStore, clock: ManualClock) -> None:
    async with closing(make(store, LIMITS, clock=clock, optimization=MANUAL).face) as manager:
        assert [await settled(manager.try_consume("key", 4)) for _ in range(3)] == [True, True, False]
    assert stored(store, clock) == (2, 8)


async def test_without_the_store_the_next_window_begins_in_time(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(store, LIMITS, clock=clock, optimization=MANUAL)
    clock.advance(9)
    assert await face.try_consume("key", 10)
    store.asked()
    assert not await face.try_consume("key")
    clock.advance(1)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    assert store.asked() == 0
    await settled(face.face.bucket("key").sync())
    assert stored(store, clock) == (0, 20)


async def test_a_prediction_leaves_others_their_tokens(make: Make, store: CountingStore, clock: ManualClock) -> None:
    limits = FixedWindow(1_000, 3_600 * SECOND)
    face = make(store, limits, clock=clock, optimization=Optimization.predicting(500, 10))
    other = ProxyManager(store, limits, clock=clock)
    for _ in range(2):
        assert await face.try_consume("key")
        assert other.try_consume("key", 400)
        clock.advance(1)
    store.asked()
    # Others take 400 a second, as two exchanges have shown, and may have taken 800 since the last but one.
    assert await face.try_consume("key")
    assert store.asked() == 2  # of which the other has won the first
    quiet = make(store, limits, clock=clock, optimization=Optimization.predicting(500, 10))
    for _ in range(3):
        assert await quiet.try_consume("quiet")
        clock.advance(0.1)
    store.asked()
    assert await quiet.try_consume("quiet", 100)
    assert store.asked() == 0


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (("consume", 7), (0, 10)),
        (("consume_ignoring_rate_limits", 9), (-2, 12)),
        (("add_tokens", 2), (9, 3)),
        (("force_add_tokens", 20), (27, 3)),
        (("reset",), (10, 3)),
        (("replace_configuration", "100/second", TokensInheritance.RESET), (100, 3)),
        (("replace_configuration", FixedWindow(50, SECOND), TokensInheritance.RESET), (50, 3)),
    ],
)
async def test_other_verbs_take_along_what_was_handed_out(
    make: Make, store: CountingStore, clock: ManualClock, call: tuple[Any, ...], left: tuple[int, int]
) -> None:
    face = make(store, LIMITS, clock=clock, optimization=DELAYING)
    verb, *arguments = call
    for _ in range(3):
        assert await face.try_consume("key")
    store.asked()
    await getattr(face, verb)("key", *arguments)
    assert store.asked() == 1
    assert clock.slept == []
    assert stored(store, clock) == left
    assert await face.available_tokens("key") == left[0]


async def test_tokens_handed_out_survive_a_change_of_the_algorithm_and_a_failure(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(store, LIMITS, clock=clock, optimization=DELAYING, configuration_version=1)
    assert await face.try_consume("key")
    assert await face.try_consume("key", 2)
    store.fail()
    with pytest.raises(Exception, match="as scripted"):
        await settled(face.face.bucket("key").sync())
    newer = face.face.bucket("key", "50/second", configuration_version=2)
    assert await settled(newer.available_tokens()) == 50 - 2
    async with closing(face.face):
        pass
    assert stored(store, clock) == (48, 3)


schedules = st.lists(
    st.tuples(
        st.integers(0, 2),  # the manager
        st.sampled_from(["try_consume", "try_consume_as_much_as_possible", "sync", "available_tokens"]),
        st.integers(1, 4),
        st.sampled_from([0, 0, 1, 10**8, SECOND, 3 * SECOND]),  # the time after it
    ),
    max_size=60,
)


@pytest.mark.parametrize("optimization", [SKIP, DELAYING, PREDICTING], ids=lambda each: each.kind)
@pytest.mark.parametrize("make_store", [MemoryStore, SwappingMemoryStore])
@given(schedules)
def test_no_window_admits_more_than_it_holds_and_what_may_be_unsynchronized(
    make_store: Any, optimization: Optimization, schedule: list[tuple[int, str, int, int]]
) -> None:
    clock = ManualClock(NOW)
    store = make_store(clock=clock)
    chosen: Any = {"clock": clock, "optimization": optimization, "expiration": Expiration.none()}
    managers = [ProxyManager(store, LIMITS, **chosen) for _ in range(3)]
    admitted: dict[int, int] = {}
    for index, verb, tokens, pause in schedule:
        bucket: Any = managers[index].bucket("key")
        answer = getattr(bucket, verb)(*[tokens][: verb.startswith("try")])
        taken = {"try_consume": tokens * bool(answer), "try_consume_as_much_as_possible": answer}.get(verb, 0)
        window = clock.now_nanos() // LIMITS.window_nanos
        admitted[window] = admitted.get(window, 0) + taken
        clock.advance(nanos=pause)
    most = LIMITS.capacity + len(managers) * optimization.max_unsynchronized_tokens
    assert all(tokens <= most for tokens in admitted.values())
    for manager in managers:
        manager.close()
        assert not any(entry.unsynchronized for entry in local_decisions_of(manager)._entries.values.values())
    if admitted:
        assert stored(store, clock)[1] == sum(admitted.values())
