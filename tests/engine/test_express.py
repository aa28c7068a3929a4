"""Decisions of tasks that are one request and one reply, whatever comes of these."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ratelimit import AsyncProxyManager, Expiration, StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.core.algorithm import decode
from ratelimit.engine.coalescing.tasks import TaskCoalescing
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided, Lost, Usual
from ratelimit.testing import SwappingMemoryStore
from tests.support.inside import coalescing_of

NOW = 1_700_000_000 * 10**9
LIMITS = "1000000/day"
KEYS = ("a", "b", "c")
FAULTS = ("refused", "request lost", "reply lost", "late")


class Wire:
    """A store behind a network: what is asked of it is under way until a test says what happens to it.

    It cannot decide by itself. No two readings of its clock are alike.
    """

    unique_readings = True

    def __init__(self) -> None:
        self.inner = SwappingMemoryStore()
        self.under_way: list[tuple[Callable[[], Any], Any, bytes, bool]] = []
        self.is_connected = True
        self.posted = 0
        self._now = NOW

    def known_now(self, key: bytes) -> int:
        self._now += 1
        return self._now

    now_nanos = known_now

    async def get(self, key: bytes, *, deadline: float | None = None) -> bytes | None:
        return await self._asked(key, lambda: self.inner.get(key))  # type: ignore[no-any-return]

    async def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Lost | None:
        return await self._asked(key, lambda: self.inner.swap(key, before, after, ttl_millis))  # type: ignore[no-any-return]

    async def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Decided:
        return Decided(False, await self.get(key))

    async def delete(self, key: bytes, *, deadline: float | None = None) -> None:
        self.inner.delete(key)

    async def aclose(self) -> None:
        pass

    def swapping(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]:
        return (yield self.swap(key, before, after, ttl_millis))  # type: ignore[no-any-return]

    def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided | int]:
        return (yield self.decide(key, arguments))  # type: ignore[no-any-return]

    def usual_swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Usual | None:
        return Usual(lambda: self.inner.swap(key, before, after, ttl_millis))

    def usual_decision(self, key: bytes, arguments: tuple[bytes, ...]) -> Usual | None:
        return None

    def send_usual(self, key: bytes, command: Any, deadline: float | None) -> Any:
        raise NotImplementedError

    def post_usual(self, key: bytes, command: Any, waiter: Any, deadline: float | None) -> bool:
        if self.is_connected:
            self.posted += 1
            self.under_way.append((command, waiter, key, True))
        return self.is_connected

    def swapped(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None, reply: Any
    ) -> Steps[Lost | None]:
        yield from ()
        return reply  # type: ignore[no-any-return]

    def decided(
        self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None, reply: Any
    ) -> Steps[Decided | int]:
        raise NotImplementedError

    def _asked(self, key: bytes, carry_out: Callable[[], Any]) -> Any:
        future = asyncio.get_running_loop().create_future()
        self.under_way.append((carry_out, future, key, False))
        return future

    def settle(self, place: int = 0, fate: str = "") -> None:
        """Decide a request that is under way: give its reply, unless there is a fault."""
        carry_out, waiter, key, posted = self.under_way.pop(place)
        if fate == "refused":
            _fail(waiter, StoreUnavailableError(key, fate))
        elif fate == "request lost":
            _fail(waiter, StoreTimeoutError(key, fate, in_doubt=True))
        elif fate == "reply lost":
            carry_out()
            _fail(waiter, StoreUnavailableError(key, fate, in_doubt=True))
        elif fate == "late":
            _fail(waiter, StoreTimeoutError(key, fate, in_doubt=True))
            # It is carried out some time after the caller has heard of its failure, and answered even then.
            self.under_way.append((carry_out, waiter, key, posted))
        elif not waiter.done():
            reply = carry_out()
            waiter.set_result([reply] if posted else reply)
        else:
            carry_out()

    async def settle_all(self) -> None:
        """Answer every request until no more come."""
        quiet = 0
        while quiet < 30:
            quiet = 0 if self.under_way else quiet + 1
            while self.under_way:
                self.settle()
            await asyncio.sleep(0)


def _fail(waiter: Any, error: StoreError) -> None:
    if not waiter.done():
        waiter.set_exception(error)


class Scene:
    """A manager over a wire."""

    def __init__(self, **settings: Any) -> None:
        self.wire = Wire()
        self.manager = AsyncProxyManager(self.wire, LIMITS, timeout=60, expiration=Expiration.none(), **settings)

    def call(self, verb: str = "try_consume", key: str = "a", *arguments: Any, **keywords: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(getattr(self.manager, verb)(key, *arguments, **keywords))

    async def known(self, *keys: str) -> None:
        """Let the manager know buckets of its own."""
        for key in keys or ("a",):
            for _ in range(2):
                first = self.call(key=key)
                await self.wire.settle_all()
                assert await first

    def idle(self) -> bool:
        coalescing = coalescing_of(self.manager)
        assert isinstance(coalescing, TaskCoalescing)
        return not coalescing.tasks and not any(line.queues or line.carrying for line in coalescing._lines.values())

    def consumed(self, key: str = "a") -> int:
        return _consumed(self.wire.inner, key)


def _consumed(store: SwappingMemoryStore, key: str) -> int:
    stored = store.get(key.encode())
    return 0 if stored is None else decode(stored, key).consumed_tokens


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_usual_decision_makes_no_task(scene: Scene) -> None:
    await scene.known()
    made: list[Any] = []

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **settings: Any) -> asyncio.Task[Any]:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **settings)

    async def decide() -> bool:
        asyncio.get_running_loop().call_soon(scene.wire.settle)
        return await scene.manager.try_consume("a")

    asyncio.get_running_loop().set_task_factory(make)
    assert await decide()
    probe = scene.manager.try_consume_and_return_remaining("a", 2)
    asyncio.get_running_loop().call_soon(scene.wire.settle)
    assert (await probe).remaining_tokens == 999_995
    assert not made
    assert scene.wire.posted >= 2
    assert scene.idle()


async def test_calls_in_one_turn_about_one_key_are_two_requests(scene: Scene) -> None:
    await scene.known()
    posted = scene.wire.posted
    calls = [scene.call() for _ in range(50)]
    await scene.wire.settle_all()
    assert all(await asyncio.gather(*calls))
    assert scene.wire.posted - posted == 2
    assert scene.consumed() == 52
    assert scene.idle()


@pytest.mark.parametrize("crowd", [1, 4])
@pytest.mark.parametrize("fate", ["", *FAULTS])
async def test_what_comes_of_a_request_comes_of_the_call(scene: Scene, fate: str, crowd: int) -> None:
    await scene.known()
    first = scene.call()
    await asyncio.sleep(0)
    if crowd > 1:
        others = [scene.call() for _ in range(crowd)]
        await asyncio.sleep(0)
        scene.wire.settle()
        while not scene.wire.under_way:
            await asyncio.sleep(0)
        assert await first
    else:
        others = [first]
    scene.wire.settle(fate=fate)
    await scene.wire.settle_all()
    answers = await asyncio.gather(*others, return_exceptions=True)
    # Its own bytes show whether a swap whose reply was lost was carried out; only a late one leaves a doubt, or none.
    if fate == "refused":
        assert all(isinstance(answer, StoreUnavailableError) and not answer.in_doubt for answer in answers)
        assert len(set(map(id, answers))) == crowd
    else:
        assert answers == [True] * crowd
    assert scene.consumed() == 2 + (crowd > 1) + crowd * (fate != "refused")
    assert scene.idle()


async def test_another_writer_is_found_by_the_reply_and_the_loop_goes_on_from_its_bytes(scene: Scene) -> None:
    await scene.known()
    other = Scene()
    other.wire.inner = scene.wire.inner
    call = scene.call()
    await asyncio.sleep(0)
    theirs = other.call(tokens=5)
    await other.wire.settle_all()
    assert await theirs
    await scene.wire.settle_all()
    assert await call
    assert scene.consumed() == 2 + 5 + 1
    assert scene.idle()


async def test_a_request_that_cannot_leave_at_once_goes_through_the_loop(scene: Scene) -> None:
    await scene.known()
    scene.wire.is_connected = False
    posted = scene.wire.posted
    calls = [scene.call() for _ in range(3)]
    await scene.wire.settle_all()
    assert await asyncio.gather(*calls) == [True] * 3
    assert scene.wire.posted == posted
    assert scene.consumed() == 5
    assert scene.idle()


async def test_a_call_that_is_cancelled_in_flight_keeps_nobody_waiting(scene: Scene) -> None:
    await scene.known()
    first, second = scene.call(), scene.call()
    await asyncio.sleep(0)
    first.cancel()
    await scene.wire.settle_all()
    assert await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert scene.consumed() == 4  # the request of the first was under way
    assert scene.idle()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("faulty", [False, True])
async def test_storms_of_calls_lose_no_token_and_leave_nothing_behind(faulty: bool, seed: int) -> None:
    chance, scene = random.Random(seed), Scene()
    admitted, unsure = Counter[str](), Counter[str]()
    calls: list[tuple[str, int, asyncio.Task[Any]]] = []
    verbs = ["try_consume"] * 4 + ["try_consume_and_return_remaining", "consume", "try_consume_as_much_as_possible"]
    for _ in range(300):
        scene.wire.is_connected = chance.random() < 0.9
        for _ in range(chance.randrange(4)):
            verb, key, tokens = chance.choice(verbs), chance.choice(KEYS), chance.randint(1, 3)
            calls.append((key, tokens, scene.call(verb, key, tokens)))
        if calls and chance.random() < 0.1:
            chance.choice(calls)[2].cancel()
        await asyncio.sleep(0)
        for _ in range(chance.randrange(4)):
            if scene.wire.under_way:
                fate = chance.choice(FAULTS) if faulty and chance.random() < 0.15 else ""
                scene.wire.settle(chance.randrange(len(scene.wire.under_way)), fate)
    await scene.wire.settle_all()
    answers = await asyncio.gather(*(call for _, _, call in calls), return_exceptions=True)
    for (key, tokens, _), answer in zip(calls, answers, strict=True):
        if isinstance(answer, BaseException):
            assert isinstance(answer, asyncio.CancelledError | StoreError), answer
            unsure[key] += tokens * getattr(answer, "in_doubt", True)
            assert faulty or isinstance(answer, asyncio.CancelledError), answer
        else:
            admitted[key] += tokens
            assert answer
    for key in KEYS:
        assert admitted[key] <= scene.consumed(key) <= admitted[key] + unsure[key]
    assert len(answers) > 300
    assert scene.idle()
