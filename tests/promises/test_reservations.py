"""Reservations over a real Redis: a round trip to take, one to settle, and exact whatever happens in between."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from ratelimit import (
    AsyncProxyManager,
    InvalidArgumentError,
    ProxyManager,
    RateLimitExceeded,
    StoreError,
    StoreUnavailableError,
    all_of,
)
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.support.both_faces import closing, settled
from tests.support.decision_paths import WAYS, By, Tap, Way, deciding_by
from tests.support.interrupting import Interruption, at_every_point
from tests.support.proxies import Proxy
from tests.support.reservations import consumed, entered

LIMITS = "1000000/365d"
PATIENCE = 60
DAILY = "1000000/day"
"""Limits that the server can decide about together with others."""

each_face = pytest.mark.parametrize("face", [ProxyManager, AsyncProxyManager], ids=["sync", "asyncio"])


@pytest.fixture
def witness(redis_url: str) -> Generator[ProxyManager]:
    """Another process, as it were, whose connection is sound."""
    with ProxyManager.from_url(redis_url, LIMITS) as manager:
        yield manager


@pytest.fixture
async def proxy(redis_url: str) -> AsyncGenerator[Proxy]:
    with Proxy(urlsplit(redis_url).port or 6379) as proxy:
        yield proxy


@pytest.mark.redis
@each_face
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_each_reservation_is_a_round_trip_to_take_and_one_to_settle(
    face: Any, way: Way, redis_url: str, witness: ProxyManager
) -> None:
    total = 0
    with deciding_by(way.by):
        async with closing(face.from_url(redis_url, LIMITS, merging=way.merging)) as manager:
            for _ in range(3):
                assert await settled(manager.try_consume("key"))
            tap = Tap(manager.store)
            for used in (0, 3, 500, 501, 2000):
                tap.taken()
                async with entered(manager.reserve("key", 500)) as reservation:
                    taking = tap.taken()
                    await reservation.settle(used)
                settling = [kind for kind in tap.taken() if kind != "time"]
                assert [kind for kind in taking if kind != "time"] == ["decide" if way.by is By.SCRIPT else "swap"]
                assert settling == ([] if used == 500 else ["decide" if way.by is By.SCRIPT else "swap"])
                total += used
    assert await consumed(witness) == 3 + total


@pytest.mark.redis
@each_face
async def test_while_others_write_each_takes_three_at_most(face: Any, redis_url: str, witness: ProxyManager) -> None:
    async with closing(face.from_url(redis_url, LIMITS)) as manager:
        tap = Tap(manager.store)
        others = 0

        def write(_: str) -> None:
            nonlocal others
            others += 1
            assert witness.try_consume("key")

        total = 0
        for used in (100, 900):
            tap.taken()
            tap.before = write
            async with entered(manager.reserve("key", 500)) as reservation:
                assert len(tap.taken()) <= 3
                await reservation.settle(used)
                assert len(tap.taken()) <= 3
            tap.before = lambda _: None
            total += used
    assert await consumed(witness) == total + others


losses = pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])


@pytest.mark.redis
@each_face
@losses
@pytest.mark.parametrize("used", [100, 900])
async def test_a_swap_that_is_lost_settles_once(
    face: Any, loss: str, used: int, proxy: Proxy, witness: ProxyManager
) -> None:
    async with closing(face.from_url(f"redis://127.0.0.1:{proxy.port}/0", LIMITS)) as manager:
        for number in range(1, 4):
            async with entered(manager.reserve("key", 500)) as reservation:
                setattr(proxy, loss, 1)
                await reservation.settle(used)
            assert proxy.lost == number
            assert await consumed(witness) == number * used


@pytest.mark.redis
@each_face
@losses
@pytest.mark.parametrize("used", [100, 900])
async def test_a_decision_of_the_server_that_is_lost_is_settled_once_or_not_and_in_doubt(
    face: Any, loss: str, used: int, proxy: Proxy, witness: ProxyManager
) -> None:
    with deciding_by(By.SCRIPT):
        async with closing(face.from_url(f"redis://127.0.0.1:{proxy.port}/0", LIMITS)) as manager:
            for key in ("warm up", "another"):
                assert await settled(manager.try_consume(key))
            async with entered(manager.reserve("key", 500)) as reservation:
                setattr(proxy, loss, 1)
                with pytest.raises(StoreUnavailableError) as caught:
                    await reservation.settle(used)
                assert caught.value.in_doubt
                with pytest.raises(InvalidArgumentError, match="in doubt"):
                    await reservation.settle(used)
    assert await consumed(witness) == (used if loss == "lose_replies" else 500)


@pytest.mark.redis
@each_face
async def test_a_server_that_is_gone_never_hides_what_the_caller_raised(
    face: Any, proxy: Proxy, witness: ProxyManager, caplog: pytest.LogCaptureFixture
) -> None:
    async with closing(face.from_url(f"redis://127.0.0.1:{proxy.port}/0", LIMITS)) as manager:
        with pytest.raises(ConnectionError, match="of the caller"):
            async with entered(manager.reserve("key", 500, refund_on=ConnectionError)):
                proxy.lose_replies = proxy.lose_requests = 100
                raise ConnectionError("of the caller")
    assert "could not be cancelled" in caplog.text
    assert await consumed(witness) in (0, 500)


# Crowds


@pytest.mark.redis
async def test_threads_and_tasks_that_share_a_bucket_settle_to_the_token(redis_url: str) -> None:
    chance = random.Random(7)
    calls = [(chance.randint(1, 2000), chance.randint(0, 3000)) for _ in range(200)]

    def work(manager: ProxyManager, share: list[tuple[int, int]]) -> None:
        for estimate, used in share:
            with manager.reserve("key", estimate) as reservation:
                reservation.settle(used)

    async def awork(manager: AsyncProxyManager, share: list[tuple[int, int]]) -> None:
        for estimate, used in share:
            async with manager.reserve("key", estimate) as reservation:
                await reservation.settle(used)

    with ProxyManager.from_url(redis_url, LIMITS) as manager, ThreadPoolExecutor(4) as threads:
        async with AsyncProxyManager.from_url(redis_url, LIMITS) as amanager:
            shares = [calls[start::8] for start in range(8)]
            loop = asyncio.get_running_loop()
            blocking = [loop.run_in_executor(threads, work, manager, share) for share in shares[:4]]
            await asyncio.gather(*blocking, *(awork(amanager, share) for share in shares[4:]))
        assert manager.snapshot("key").consumed_tokens == sum(used for _, used in calls)


def reserve_and_hang(url: str, tokens: int, inside: Any) -> None:
    """Reserve, and never come to an end."""
    manager = ProxyManager.from_url(url, "1000/second")
    with manager.reserve("key", tokens):
        inside.set()
        time.sleep(PATIENCE)


def reserve_and_settle_many(url: str, seed: int, totals: Any) -> None:
    chance, used = random.Random(seed), 0
    with ProxyManager.from_url(url, LIMITS, timeout=PATIENCE) as manager:
        for _ in range(100):
            tokens = chance.randint(0, 3000)
            with manager.reserve("key", chance.randint(1, 2000)) as reservation:
                reservation.settle(tokens)
            used += tokens
    totals.put(used)


@pytest.mark.redis
def test_processes_that_share_a_bucket_settle_to_the_token(redis_url: str, witness: ProxyManager) -> None:
    context = multiprocessing.get_context("spawn")
    totals: Any = context.Queue()
    processes = [context.Process(target=reserve_and_settle_many, args=(redis_url, seed, totals)) for seed in range(3)]
    for process in processes:
        process.start()
    used = sum(totals.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join(PATIENCE)
    assert witness.snapshot("key").consumed_tokens == used


@pytest.mark.redis
def test_what_a_killed_process_has_reserved_comes_back_by_the_refill(redis_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    inside = context.Event()
    process = context.Process(target=reserve_and_hang, args=(redis_url, 800, inside))
    process.start()
    assert inside.wait(PATIENCE)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    with ProxyManager.from_url(redis_url, "1000/second") as manager:
        # Nothing but the refill gives them back; it takes 0.8 seconds.
        with manager.reserve("key", 1000, max_wait=5) as reservation:
            reservation.settle(10)
        assert manager.snapshot("key").consumed_tokens == 810


# Interruptions

at_points = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="there Python reports some instructions only; the storms are for it"
)


@at_points
@pytest.mark.parametrize("used", [0, 100, 900])
def test_a_thread_that_is_interrupted_anywhere_is_charged_once_or_not_at_all(used: int) -> None:
    """Each block may be interrupted before it has reserved, before it has settled, or after."""
    counted: list[int] = []
    manager = ProxyManager(SwappingMemoryStore(), LIMITS, clock=ManualClock(1))

    def work() -> None:
        with manager.reserve("key", 500) as reservation:
            reservation.settle(used)

    def since() -> int:
        counted.append(manager.snapshot("key").consumed_tokens)
        return counted[-1] - counted[-2] if len(counted) > 1 else counted[-1]

    points = 0
    for points, outcome in at_every_point(work, prepare=since):  # noqa: B007
        assert isinstance(outcome, Interruption)
        assert since() in (0, 500, used)
        assert manager.try_consume("another key")
    assert points > 12


@at_points
def test_a_wait_that_is_interrupted_anywhere_gives_back_what_it_has_reserved() -> None:
    clock = ManualClock(1)
    manager = ProxyManager(SwappingMemoryStore(), "500/second", clock=clock, timeout=PATIENCE)
    inside: list[None] = []

    def work() -> None:
        with manager.reserve("key", 400, max_wait=None) as reservation:
            inside.append(None)
            reservation.settle(400)

    def prepare() -> None:
        manager.remove("key")
        inside.clear()
        assert manager.try_consume("key", 500)

    for _, outcome in at_every_point(work, prepare=prepare):
        assert isinstance(outcome, Interruption)
        charged = manager.snapshot("key").consumed_tokens - 500
        # An interruption after the wait, on the way into the block, leaves the tokens charged.
        assert charged in ((400,) if inside else (0, 400))


async def lost_now_and_then(face: Any, port: int, proxy: Proxy, chance: random.Random) -> tuple[int, int]:
    """Reserve and settle while replies are lost; return the least and the most that was charged."""
    least = most = 0
    async with closing(face.from_url(f"redis://127.0.0.1:{port}/0", LIMITS)) as manager:
        for _ in range(150):
            estimate, used = chance.randint(1, 1000), chance.randint(0, 2000)
            proxy.lose_replies = int(chance.random() < 0.1)
            proxy.lose_requests = int(chance.random() < 0.1)
            try:
                async with entered(manager.reserve("key", estimate)) as reservation:
                    low, high = min(estimate, used), max(estimate, used)
                    try:
                        await reservation.settle(used)
                        low = high = used
                    except StoreError as error:
                        if not error.in_doubt:
                            low = high = estimate
                    least, most = least + low, most + high
            except StoreError as error:
                most += estimate if error.in_doubt else 0
            except RateLimitExceeded:
                pytest.fail("there are tokens enough")
    return least, most


@pytest.mark.redis
@each_face
@pytest.mark.parametrize("by", [By.EITHER, By.SCRIPT], ids=lambda by: by.name.lower())
async def test_what_is_charged_is_what_was_used_but_for_what_is_in_doubt(
    face: Any, by: By, proxy: Proxy, witness: ProxyManager
) -> None:
    with deciding_by(by):
        least, most = await lost_now_and_then(face, proxy.port, proxy, random.Random(1))
    assert proxy.lost > 10
    assert least <= await consumed(witness) <= most


# Several buckets


class Gateway:
    """Requests and tokens, reserved and settled together."""

    def __init__(self, face: Any, url: str, **given: Any) -> None:
        self.tokens: Any = face.from_url(url, DAILY, prefix="t:", **given)
        self.requests: Any = face(self.tokens.store, DAILY, prefix="r:", **given)

    def reserve(self, estimate: int) -> Any:
        return all_of(self.requests.bucket("{k}"), (self.tokens.bucket("{k}"), estimate)).reserve()


async def both_consumed(url: str) -> list[int]:
    with ProxyManager.from_url(url, DAILY) as witness:
        return [witness.snapshot(key).consumed_tokens for key in ("r:{k}", "t:{k}")]


@pytest.mark.redis
@each_face
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_several_buckets_take_a_round_trip_and_one_to_settle(face: Any, way: Way, redis_url: str) -> None:
    kind = "decide" if way.by is By.SCRIPT else "swap"
    with deciding_by(way.by):
        gateway = Gateway(face, redis_url, merging=way.merging)
        async with closing(gateway.tokens):
            async with entered(gateway.reserve(500)) as reservation:
                await reservation.settle(1)
            tap = Tap(gateway.tokens.store)
            total, calls = 1, 1
            for used in (0, 3, 500, 501, (0, 2000)):
                tap.taken()
                async with entered(gateway.reserve(500)) as reservation:
                    assert [each for each in tap.taken() if each != "time"] == [kind]
                    await reservation.settle(used)
                assert [each for each in tap.taken() if each != "time"] == ([] if used == 500 else [kind])
                calls += used[0] if isinstance(used, tuple) else 1
                total += used[1] if isinstance(used, tuple) else used
    assert await both_consumed(redis_url) == [calls, total]


@pytest.mark.redis
@each_face
@losses
@pytest.mark.parametrize("used", [100, 900])
async def test_a_swap_of_several_that_is_lost_settles_once(
    face: Any, loss: str, used: int, proxy: Proxy, redis_url: str
) -> None:
    gateway = Gateway(face, f"redis://127.0.0.1:{proxy.port}/0")
    async with closing(gateway.tokens):
        for number in range(1, 4):
            async with entered(gateway.reserve(500)) as reservation:
                setattr(proxy, loss, 1)
                await reservation.settle(used)
            assert proxy.lost == number
            assert await both_consumed(redis_url) == [number, number * used]


@pytest.mark.redis
@each_face
@losses
@pytest.mark.parametrize("used", [100, 900])
async def test_a_decision_about_several_that_is_lost_is_settled_once_or_not_and_in_doubt(
    face: Any, loss: str, used: int, proxy: Proxy, redis_url: str
) -> None:
    with deciding_by(By.SCRIPT):
        gateway = Gateway(face, f"redis://127.0.0.1:{proxy.port}/0")
        async with closing(gateway.tokens):
            async with entered(gateway.reserve(1)):
                pass
            async with entered(gateway.reserve(500)) as reservation:
                setattr(proxy, loss, 1)
                with pytest.raises(StoreUnavailableError) as caught:
                    await reservation.settle(used)
                assert caught.value.in_doubt
                with pytest.raises(InvalidArgumentError, match="in doubt"):
                    await reservation.settle(used)
    assert await both_consumed(redis_url) == [2, 1 + (used if loss == "lose_replies" else 500)]


def reserve_and_settle_several(url: str, seed: int, totals: Any) -> None:
    chance, used, calls = random.Random(seed), 0, 0
    gateway = Gateway(ProxyManager, url, timeout=PATIENCE)
    with gateway.tokens:
        for _ in range(100):
            tokens, requests = chance.randint(0, 3000), chance.randint(0, 2)
            with gateway.reserve(chance.randint(1, 2000)) as reservation:
                reservation.settle((requests, tokens))
            used, calls = used + tokens, calls + requests
    totals.put((calls, used))


@pytest.mark.redis
async def test_processes_that_share_several_buckets_settle_to_the_token(redis_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    totals: Any = context.Queue()
    processes = [
        context.Process(target=reserve_and_settle_several, args=(redis_url, seed, totals)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    counted = [totals.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
    assert await both_consumed(redis_url) == [sum(column) for column in zip(*counted, strict=True)]
