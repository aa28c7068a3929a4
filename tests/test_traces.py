"""Every recorded trace of Bucket4j, through the public verbs of both faces: results, errors, and each byte stored."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from typing import Any

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    BucketNotFoundError,
    ConsumptionProbe,
    EstimationProbe,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    Recovery,
    ReservationOverflowError,
    TokensInheritance,
    VerboseResult,
)
from ratelimit.core import codec
from ratelimit.drive import adrive, drive
from ratelimit.stores.protocol import Lost
from ratelimit.testing import ManualClock
from tests import vectors
from tests.faces import settled
from tests.raw_commands import Sync, run_raw

KEY = "bucket"
ERRORS = {
    "illegal_argument": InvalidArgumentError,
    "reservation_overflow": ReservationOverflowError,
    "bucket_not_found": BucketNotFoundError,
}
RECOVERY = {"RECONSTRUCT": Recovery.RECONSTRUCT, "THROW_BUCKET_NOT_FOUND_EXCEPTION": Recovery.RAISE}
VERBS = {"get_available_tokens": "available_tokens"}


class WatchedStore(MemoryStore):
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
    """One trace on one bucket; each step in a manager of one face, settled when it has to be awaited."""

    def __init__(self, trace: dict[str, Any], *, asynchronous: bool) -> None:
        self.store = WatchedStore()
        self.clock = ManualClock(0, advance_on_sleep=False)
        self.configurations = [vectors.configuration(recorded) for recorded in trace["configurations"]]
        self.manager: Any
        self.drive: Any
        if asynchronous:
            self.manager, self.drive = AsyncProxyManager(AsyncMemoryStore(self.store), clock=self.clock), adrive
        else:
            self.manager, self.drive = ProxyManager(self.store, clock=self.clock), drive
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
            return run_raw(self.store, KEY.encode(), args["command"], step["t"], self.configurations)
        if op == "remove":
            return await settled(self.manager.remove(KEY))
        if op == "get_configuration":
            found = await settled(self.manager.configuration(KEY))
            return None if found is None else vectors.as_recorded(found)
        if op == "recreate_proxy":
            self.handles[proxy] = self.handle(self.proxies[proxy])
            return None
        if op == "sync":
            return await settled(self.drive(bucket._handle.run(Sync())))
        if op in ("blocking_consume", "blocking_try_consume"):
            longest = args.pop("max_wait_nanos", None)
            timeout = {} if longest is None else {"timeout": Fraction(longest, 10**9)}
            consumed = await settled(bucket.consume(args["tokens"], **timeout))
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
        return asdict(value)
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


@pytest.mark.parametrize("face", ["sync", "asyncio"])
@pytest.mark.parametrize("category", sorted({trace["category"] for trace in vectors.load("traces.json")["traces"]}))
async def test_traces_of_category(category: str, face: str) -> None:
    for trace in vectors.load("traces.json")["traces"]:
        if trace["category"] != category:
            continue
        replay = Replay(trace, asynchronous=face == "asyncio")
        for number, step in enumerate(trace["steps"]):
            place = f"{trace['name']}, step {number}: {step['op']} {step.get('args', '')}"
            replay.store.written.clear()
            if "error" in step:
                with pytest.raises(ERRORS[step["error"]]):
                    await replay.step(step)
            else:
                assert await replay.step(step) == step["result"], place
            written = [step["state"]] if "state" in step else []
            assert [state.hex() for state in replay.store.written] == written, place


def test_every_trace_is_replayed() -> None:
    traces = vectors.load("traces.json")["traces"]
    assert len(traces) == 264
    assert sum(len(trace["steps"]) for trace in traces) == 5252
    assert all(
        codec.decode(bytes.fromhex(step["state"])) for trace in traces for step in trace["steps"] if "state" in step
    )
