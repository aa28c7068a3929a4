"""Every recorded trace of Bucket4j, through the public verbs of both faces: results, errors, and each byte stored.

One thing differs, and is held to be that and nothing else: what a reservation that waits under several limits stores.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from fractions import Fraction
from inspect import iscoroutinefunction
from typing import Any

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    Bandwidth,
    BandwidthState,
    BucketNotFoundError,
    ConsumptionProbe,
    EstimationProbe,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    Recovery,
    RedisStore,
    ReservationOverflowError,
    TokensInheritance,
    VerboseResult,
)
from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket import codec
from ratelimit.runtime.steps import arun, run
from ratelimit.stores.protocol import Lost
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.support import vectors
from tests.support.both_faces import for_asyncio, settled
from tests.support.decision_paths import WAYS, By, Tap, Way, batched, deciding_by
from tests.support.inside import steps_of
from tests.support.raw_commands import Sync, run_raw

KEY = "bucket"
ERRORS = {
    "illegal_argument": InvalidArgumentError,
    "reservation_overflow": ReservationOverflowError,
    "bucket_not_found": BucketNotFoundError,
}
RECOVERY = {"RECONSTRUCT": Recovery.RECONSTRUCT, "THROW_BUCKET_NOT_FOUND_EXCEPTION": Recovery.RAISE}
VERBS = {"get_available_tokens": "available_tokens"}


class WatchedStore(SwappingMemoryStore):
    """Keeps what was written by swaps that succeeded."""

    def __init__(self) -> None:
        super().__init__(clock=ManualClock(0))  # at which nothing expires
        self.written: list[bytes] = []

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        loss = super().swap(key, before, after, ttl_millis)
        if loss is None:
            self.written.append(after)
        return loss


class Replay:
    """One trace on one bucket; each step in a manager of one face, settled when it has to be awaited.

    :param store: what the manager asks.
    :param witness: a store of the same kind for callers that only look, and for raw commands.
    """

    def __init__(self, trace: dict[str, Any], store: Any, witness: Any, *, merged: bool) -> None:
        self.witness = witness
        self.clock = ManualClock(0, advance_on_sleep=False)
        self.configurations = [vectors.configuration(recorded) for recorded in trace["configurations"]]
        self.manager: Any
        self.drive: Any
        if iscoroutinefunction(store.get):
            self.manager, self.drive = AsyncProxyManager(store, clock=self.clock, merging=merged), arun
        else:
            self.manager, self.drive = ProxyManager(store, clock=self.clock, merging=merged), run
        if merged:
            batched(self.manager)
        self.proxies = trace["proxies"]
        self.handles = [self.handle(proxy) for proxy in self.proxies]

    def handle(self, proxy: dict[str, Any]) -> Any:
        implicit = proxy["implicit_replacement"]
        return self.manager.bucket(
            KEY,
            self.configurations[proxy["configuration"]],
            configuration_version=None if implicit is None else implicit["version"],
            inheritance=None if implicit is None else TokensInheritance[implicit["strategy"]],
            recovery=RECOVERY[proxy["recovery"]],
        )

    async def step(self, step: dict[str, Any]) -> Any:
        """The result of a step in the words of the recording."""
        self.clock.set(step["t"])
        self.clock.slept.clear()
        op, args, proxy = str(step["op"]), dict(step.get("args", {})), step["proxy"]
        bucket = self.handles[proxy]
        if op == "command":
            return run_raw(self.witness, KEY.encode(), args["command"], step["t"], self.configurations)
        if op == "remove":
            return await settled(self.manager.remove(KEY))
        if op == "get_configuration":
            found = await settled(self.manager.configuration(KEY))
            return None if found is None else vectors.as_recorded(found)
        if op == "recreate_proxy":
            self.handles[proxy] = self.handle(self.proxies[proxy])
            return None
        if op == "sync":
            return await settled(self.drive(steps_of(bucket, Sync())))
        if op in ("blocking_consume", "blocking_try_consume"):
            longest = args.pop("max_wait_nanos", None)
            if longest == 0:
                raise InvalidArgumentError("Bucket4j refuses not to wait at all, which max_wait=0 means here")
            wait = {} if longest is None else {"max_wait": Fraction(longest, 10**9)}
            consumed = await settled(bucket.consume(args["tokens"], **wait))
            sleep = (self.clock.slept or [0])[0] if consumed else None
            return (
                {"consumed": consumed, "sleep_nanos": sleep} if op == "blocking_try_consume" else {"sleep_nanos": sleep}
            )
        if op.endswith("replace_configuration"):
            args["configuration"] = self.configurations[args["configuration"]]
            args["inheritance"] = TokensInheritance[args.pop("strategy")]
        verb = op.removeprefix("verbose_")
        method = getattr(bucket.verbose if op != verb else bucket, VERBS.get(verb, verb))
        return recorded_form(await settled(method(**args)))


def recorded_form(value: Any) -> Any:
    if isinstance(value, ConsumptionProbe | EstimationProbe):
        return vectors.probe_as_recorded(value)
    if isinstance(value, VerboseResult):
        assert value.configuration is not None
        return {
            "value": recorded_form(value.value),
            "operation_time_nanos": value.operation_time_nanos,
            "available_tokens": value.available_tokens,
            "available_tokens_per_bandwidth": list(value.available_tokens_per_bandwidth),
            "full_refilling_time_nanos": value.full_refilling_time_nanos,
            "bandwidth_states": vectors.states_as_recorded(value.bandwidth_states),
            "configuration": vectors.as_recorded(value.configuration),
        }
    return value


TRACES = vectors.load("traces.json")["traces"]
DIFFERENT = {"huge_intervally": 1, "overdraft": 1, "reserve": 11}
"""Steps, by category, that store something else than Bucket4j."""

each_category = pytest.mark.parametrize("category", sorted({trace["category"] for trace in TRACES}))
both_faces = pytest.mark.parametrize("face", ["sync", "asyncio"])
merged_and_not = pytest.mark.parametrize("merged", [False, True], ids=["alone", "merged"])


def as_due(step: dict[str, Any]) -> bytes:
    """What is stored after a step: by Bucket4j, or, where it waits under several limits, lowered to hold in the end."""
    recorded = bytes.fromhex(step["state"])
    wait = (step.get("result") or {}).get("sleep_nanos") if str(step["op"]).startswith("blocking_") else None
    state = codec.decode(recorded)
    if not wait or len(state.bandwidth_states) == 1:
        return recorded
    lowered = [
        due_after(*parts, step["args"]["tokens"], wait, step["t"])
        for parts in zip(state.configuration, state.bandwidth_states, strict=True)
    ]
    return codec.encode(state._replace(bandwidth_states=tuple(lowered)))


def due_after(bandwidth: Bandwidth, state: BandwidthState, tokens: int, wait: int, now: int) -> BandwidthState:
    """The state less what it would gain, by the end of the wait, beyond the capacity less the tokens."""
    last, size, error = state
    period, room = bandwidth.refill_period_nanos, max(0, bandwidth.capacity - tokens)
    if bandwidth.refill_intervally:
        gained = max(0, (now + wait - last) // period) * bandwidth.refill_tokens
        return BandwidthState(last, min(size, room - min(MAX, gained)), error)
    gained = max(0, now + wait - max(now, last)) * bandwidth.refill_tokens
    return BandwidthState(last, *divmod(min(size * period + error, room * period - gained), period))


async def replayed(category: str, store: Any, witness: Any, *, merged: bool) -> int:
    """Replay the traces of a category, and compare what is answered and what is stored after each step.

    :returns: how many steps store something else than Bucket4j.
    """
    different = 0
    written: list[bytes] | None = getattr(witness, "written", None)
    for trace in TRACES:
        if trace["category"] != category:
            continue
        witness.delete(KEY.encode())
        replay = Replay(trace, store, witness, merged=merged)
        stored: bytes | None = None
        for number, step in enumerate(trace["steps"]):
            place = f"{trace['name']}, step {number}: {step['op']} {step.get('args', '')}"
            if written is not None:
                written.clear()
            if "error" in step:
                with pytest.raises(ERRORS[step["error"]]):
                    await replay.step(step)
            else:
                assert await replay.step(step) == step["result"], place
            expected = [as_due(step)] if "state" in step else []
            stored = None if step["op"] == "remove" else expected[0] if expected else stored
            assert witness.get(KEY.encode()) == stored, place
            if written is not None:
                assert written == expected, place
            if "state" in step and stored is not None and stored.hex() != step["state"]:
                different += 1
                as_recorded = bytes.fromhex(step["state"])
                assert witness.swap(KEY.encode(), stored, as_recorded, -1) is None  # on which the next steps go on
                stored = as_recorded
    return different


@merged_and_not
@both_faces
@each_category
async def test_traces_by_swaps_in_memory(category: str, face: str, merged: bool) -> None:
    store = WatchedStore()
    different = await replayed(category, store if face == "sync" else for_asyncio(store), store, merged=merged)
    assert different == DIFFERENT.get(category, 0)


@both_faces
@each_category
async def test_traces_in_process(category: str, face: str) -> None:
    store = MemoryStore(clock=ManualClock(0))  # at which nothing expires
    await replayed(category, store if face == "sync" else for_asyncio(store), store, merged=False)


@pytest.fixture
def witness(redis_url: str) -> Generator[RedisStore]:
    with redis.Redis.from_url(redis_url) as client:
        yield RedisStore(client)


@asynccontextmanager
async def redis_store(face: str, url: str) -> AsyncGenerator[Any]:
    if face == "sync":
        with redis.Redis.from_url(url) as client:
            yield RedisStore(client)
    else:
        async with redis.asyncio.Redis.from_url(url) as aclient:
            store = AsyncRedisStore(aclient)
            yield store
            await store.aclose()


@pytest.mark.redis
@pytest.mark.parametrize("way", [way for way in WAYS if way.by is not By.EITHER], ids=str)
@both_faces
@each_category
async def test_traces_over_redis(redis_url: str, witness: RedisStore, category: str, face: str, way: Way) -> None:
    async with redis_store(face, redis_url) as store:
        tap = Tap(store)
        with deciding_by(way.by):
            await replayed(category, store, witness, merged=way.merging)
    raw = category == "commands"  # which the witness runs
    assert ("decide" in tap.sent) == (way.by is By.SCRIPT and not raw)


def test_every_trace_is_replayed() -> None:
    traces = vectors.load("traces.json")["traces"]
    assert len(traces) == 264
    assert sum(len(trace["steps"]) for trace in traces) == 5252
    assert all(
        codec.decode(bytes.fromhex(step["state"])) for trace in traces for step in trace["steps"] if "state" in step
    )
