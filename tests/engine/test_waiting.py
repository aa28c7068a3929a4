"""consume: reserved by debt, slept exactly, given back when interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    RateLimitError,
    ReservationOverflowError,
)
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.both_faces import Settled, for_asyncio
from tests.support.servers import wait_until

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
LIMITS = "1/second burst 10"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def store() -> ScriptedStore:
    return ScriptedStore()


@pytest.fixture(params=["sync", "asyncio"])
def face(request: pytest.FixtureRequest, store: ScriptedStore, clock: ManualClock) -> Settled:
    if request.param == "sync":
        return Settled(ProxyManager(store, LIMITS, clock=clock))
    return Settled(AsyncProxyManager(for_asyncio(store), LIMITS, clock=clock))


async def test_tokens_that_are_there_are_not_waited_for(face: Settled, clock: ManualClock) -> None:
    assert await face.consume("key", 10)
    assert clock.slept == []


async def test_the_wait_is_exactly_until_the_tokens_are_there(face: Settled, clock: ManualClock) -> None:
    await face.consume("key", 10)
    assert await face.consume("key", 3)
    assert await face.consume("key")
    assert clock.slept == [3 * SECOND, SECOND]
    assert await face.available_tokens("key") == 0


@pytest.mark.parametrize("timeout", [2.999, timedelta(seconds=2.999), 1])
async def test_a_wait_beyond_the_timeout_is_not_begun(face: Settled, clock: ManualClock, timeout: Any) -> None:
    await face.consume("key", 10)
    assert not await face.consume("key", 3, max_wait=timeout)
    assert clock.slept == []
    assert await face.available_tokens("key") == 0
    assert (await face.snapshot("key")).consumed_tokens == 10


@pytest.mark.parametrize("timeout", [3, 3.0, timedelta(seconds=3), float("inf"), 10**30])
async def test_a_wait_within_the_timeout_is_waited(face: Settled, clock: ManualClock, timeout: Any) -> None:
    await face.consume("key", 10)
    assert await face.consume("key", 3, max_wait=timeout)
    assert clock.slept == [3 * SECOND]


async def test_more_than_the_capacity_is_waited_for(face: Settled, clock: ManualClock) -> None:
    assert await face.consume("key", 25)
    assert clock.slept == [15 * SECOND]


async def test_a_wait_without_end_is_an_error_or_refused(face: Settled, clock: ManualClock) -> None:
    with pytest.raises(ReservationOverflowError):
        await face.consume("key", 2**63 - 1)
    assert not await face.consume("key", 2**63 - 1, max_wait=10)
    assert clock.slept == []
    assert (await face.snapshot("key")).consumed_tokens == 0


@pytest.mark.parametrize("max_wait", [0, 0.0, timedelta(0)])
async def test_no_wait_at_all_is_accepted(face: Settled, clock: ManualClock, max_wait: Any) -> None:
    tokens = await face.available_tokens("key")
    assert await face.consume("key", tokens, max_wait=max_wait)
    assert not await face.consume("key", max_wait=max_wait)
    assert clock.slept == []
    assert (await face.snapshot("key")).consumed_tokens == tokens


@pytest.mark.parametrize("max_wait", [-1, timedelta(-1), float("nan"), float("-inf"), "5", True])
async def test_what_is_not_a_longest_wait_is_refused(face: Settled, max_wait: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="max_wait must be"):
        await face.consume("key", max_wait=max_wait)


async def test_the_deadline_of_a_wait_is_another_matter_than_its_length(face: Settled) -> None:
    assert await face.consume("key", max_wait=0, timeout=60)
    with pytest.raises(InvalidArgumentError, match="timeout must be above 0"):
        await face.consume("key", max_wait=5, timeout=0)


async def test_the_verbose_form_shows_the_bucket_after_the_reservation(face: Settled, clock: ManualClock) -> None:
    verbose = Settled(face.face.bucket("key").verbose)
    result = await verbose.consume(12)
    assert (result.value, result.available_tokens, clock.slept) == (True, -2, [2 * SECOND])
    result = await verbose.consume(10**6, max_wait=1)
    assert (result.value, result.available_tokens) == (False, 0)


async def test_a_cancelled_waiter_gives_its_tokens_back() -> None:
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), "10/hour")
    await manager.try_consume("key", 8)
    waiter = asyncio.create_task(manager.consume("key", 5))
    while await manager.available_tokens("key") != -3:
        await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (2, 8)


async def test_a_waiter_under_a_timeout_of_asyncio_gives_its_tokens_back() -> None:
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), "10/hour")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await manager.consume("key", 15)
    assert await manager.available_tokens("key") == 10


class SlowStore(AsyncSwappingMemoryStore):
    """Whose swaps are carried out before they hang, or after."""

    def __init__(self, *, carried_out_first: bool) -> None:
        super().__init__()
        self.carried_out_first = carried_out_first
        self.in_flight = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        if self.gate.is_set():
            return await super().swap(key, before, after, ttl_millis)
        if not self.carried_out_first:
            self.in_flight.set()
            await self.gate.wait()
        loss = await super().swap(key, before, after, ttl_millis)
        self.in_flight.set()
        await self.gate.wait()
        return loss


@pytest.mark.parametrize("carried_out_first", [True, False])
async def test_a_waiter_cancelled_during_its_swap_keeps_no_token(carried_out_first: bool) -> None:
    store = SlowStore(carried_out_first=carried_out_first)
    manager = AsyncProxyManager(store, "10/hour")
    await manager.try_consume("key", 8)
    store.gate.clear()
    waiter = asyncio.create_task(manager.consume("key", 5))
    await store.in_flight.wait()
    waiter.cancel()
    await asyncio.sleep(0)
    waiter.cancel()  # as a second Ctrl-C does
    await asyncio.sleep(0)
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (2, 8)


async def test_an_endless_wait_is_cancelled_during_its_swap() -> None:
    store = SlowStore(carried_out_first=True)
    store.gate.clear()
    manager = AsyncProxyManager(store, "10/hour")
    waiter = asyncio.create_task(manager.consume("key", 2**63 - 1))
    await store.in_flight.wait()
    waiter.cancel()
    await asyncio.sleep(0)
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_a_waiter_cancelled_twice_keeps_no_token() -> None:
    store = SlowStore(carried_out_first=False)
    manager = AsyncProxyManager(store, "10/hour")
    await manager.try_consume("key", 8)
    waiter = asyncio.create_task(manager.consume("key", 5))
    while await manager.available_tokens("key") != -3:
        await asyncio.sleep(0)
    store.gate.clear()
    waiter.cancel()
    await store.in_flight.wait()
    for _ in range(2):
        waiter.cancel()
        await asyncio.sleep(0)
    assert not waiter.done()
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (2, 8)


@pytest.mark.parametrize("make_store", [AsyncMemoryStore, AsyncSwappingMemoryStore])
async def test_a_waiter_of_a_closed_manager_keeps_no_token(
    make_store: Callable[[], AsyncMemoryStore],
) -> None:
    store = make_store()
    manager, other = (AsyncProxyManager(store, "10/hour") for _ in range(2))
    waiter = asyncio.create_task(manager.consume("key", 15))
    while await other.available_tokens("key") != -5:
        await asyncio.sleep(0)
    await manager.aclose()
    with pytest.raises(RateLimitError, match="closed"):
        await manager.try_consume("key")
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert await other.available_tokens("key") == 10


@pytest.mark.parametrize("make_store", [MemoryStore, SwappingMemoryStore])
def test_a_sync_waiter_of_a_closed_manager_keeps_no_token(
    make_store: Callable[[], MemoryStore],
) -> None:
    class Clock(ManualClock):
        def sleep(self, nanos: int) -> None:
            manager.close()
            raise KeyboardInterrupt

    store, clock = make_store(), Clock(NOW)
    manager, other = (ProxyManager(store, LIMITS, clock=clock) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        manager.consume("key", 15)
    assert other.available_tokens("key") == 10


async def test_waiters_that_a_closing_loop_cancels_keep_nothing() -> None:
    store = SwappingMemoryStore()

    async def wait_for_ever() -> None:
        manager = AsyncProxyManager(for_asyncio(store), "10/hour")
        _ = [asyncio.create_task(manager.consume("key", 15)) for _ in range(3)]
        while await manager.available_tokens("key") != -35:
            await asyncio.sleep(0)

    await asyncio.to_thread(asyncio.run, wait_for_ever())
    assert ProxyManager(store, "10/hour").available_tokens("key") == 10


class InterruptedClock(ManualClock):
    """At which somebody presses Ctrl-C while it sleeps."""

    def sleep(self, nanos: int) -> None:
        super().sleep(nanos)
        raise KeyboardInterrupt


def test_an_interrupted_sync_waiter_gives_its_tokens_back() -> None:
    manager = ProxyManager(SwappingMemoryStore(), LIMITS, clock=InterruptedClock(NOW, advance_on_sleep=False))
    with pytest.raises(KeyboardInterrupt):
        manager.consume("key", 15)
    assert manager.available_tokens("key") == 10


class InterruptedStore(SwappingMemoryStore):
    """During whose first swap somebody presses Ctrl-C, before or after it was carried out."""

    def __init__(self, *, carried_out: bool) -> None:
        super().__init__()
        self._carried_out: bool | None = carried_out

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        carried_out, self._carried_out = self._carried_out, None
        if carried_out is not False:
            loss = super().swap(key, before, after, ttl_millis)
            if carried_out is None:
                return loss
        raise KeyboardInterrupt


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_sync_waiter_interrupted_in_the_middle_of_a_swap_keeps_nothing(carried_out: bool) -> None:
    clock = ManualClock(NOW)
    clock.unique_readings = True
    manager = ProxyManager(InterruptedStore(carried_out=carried_out), LIMITS, clock=clock)
    with pytest.raises(KeyboardInterrupt):
        manager.consume("key", 15)
    assert manager.available_tokens("key") == 10
    assert manager.bucket("key").snapshot().consumed_tokens == 0


def test_an_interruption_passes_also_when_nothing_can_be_given_back(caplog: pytest.LogCaptureFixture) -> None:
    store = ScriptedStore()

    class Clock(ManualClock):
        def sleep(self, nanos: int) -> None:
            store.fail()
            raise KeyboardInterrupt

    manager = ProxyManager(store, LIMITS, clock=Clock(NOW))
    with pytest.raises(KeyboardInterrupt):
        manager.consume("key", 15)
    assert "15 tokens of a wait that was interrupted could not be given back" in caplog.text


async def test_a_coroutine_that_is_closed_while_it_waits_ends_quietly() -> None:
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), "10/hour")
    await manager.available_tokens("key")
    coroutine: Any = manager.consume("key", 15)
    coroutine.send(None)  # until its swap is in flight
    while await manager.available_tokens("key") != -5:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)  # the loop carries the answer on
    coroutine.send(None)  # until it sleeps
    coroutine.close()
    assert await manager.available_tokens("key") == -5


@pytest.mark.redis
def test_ctrl_c_in_another_process_gives_its_tokens_back(redis_url: str) -> None:
    program = f"""
from ratelimit import ProxyManager
ProxyManager.from_url({redis_url!r}, "10/hour").consume("key", 15)
"""
    with ProxyManager.from_url(redis_url, "10/hour") as manager:
        # A program that was started in the background ignores SIGINT, and so would its children.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            waiter = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
        finally:
            signal.signal(signal.SIGINT, before)
        with contextlib.ExitStack() as stack:
            stack.callback(waiter.kill)
            wait_until(lambda: manager.available_tokens("key") == -5, "the other process waits")
            os.kill(waiter.pid, signal.SIGINT)
            _, errors = waiter.communicate(timeout=20)
        assert b"KeyboardInterrupt" in errors
        assert manager.available_tokens("key") == 10
