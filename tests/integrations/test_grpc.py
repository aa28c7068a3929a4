from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import QuotaFailure, RetryInfo
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import (
    AsyncProxyManager,
    InvalidArgumentError,
    InvalidConfigurationError,
    OnError,
    ProxyManager,
)
from ratelimit.integrations.grpc import (
    AsyncRateLimitInterceptor,
    RateLimitInterceptor,
    Rpc,
    RpcRule,
    metadata_value,
    method_name,
    peer_ip,
)
from ratelimit.policy import Assigned, Decision, Missing, Plans
from ratelimit.policy.logs import hashed
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore
from tests.support.both_faces import Manager, for_asyncio

Behaviors = dict[str, Callable[..., Any]]

SECRET = "a secret of sixteen bytes"


# Methods of a service, as functions of all the kinds that gRPC takes.


def twice(data: bytes, _context: Any) -> bytes:
    return data * 2


def each(data: bytes, _context: Any) -> Iterator[bytes]:
    for number in data:
        yield bytes([number])


def joined(parts: Iterator[bytes], _context: Any) -> bytes:
    return b"".join(parts)


def upper(parts: Iterator[bytes], _context: Any) -> Iterator[bytes]:
    return map(bytes.upper, parts)  # an iterator, from a function that is not a generator


async def atwice(data: bytes, _context: Any) -> bytes:
    return data * 2


async def aeach(data: bytes, _context: Any) -> AsyncIterator[bytes]:
    for number in data:
        yield bytes([number])


async def ajoined(parts: AsyncIterator[bytes], _context: Any) -> bytes:
    return b"".join([part async for part in parts])


async def aupper(parts: AsyncIterator[bytes], context: Any) -> None:  # writes instead of yielding
    async for part in parts:
        await context.write(part.upper())


SYNC: Behaviors = {"unary_unary": twice, "unary_stream": each, "stream_unary": joined, "stream_stream": upper}
ASYNC: Behaviors = {"unary_unary": atwice, "unary_stream": aeach, "stream_unary": ajoined, "stream_stream": aupper}


def service(behaviors: Behaviors) -> grpc.GenericRpcHandler:
    """Methods that are called as their kinds; what travels is a text in reverse, so that serializers are needed."""
    handlers = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(
            behavior, request_deserializer=turned, response_serializer=turned
        )
        for kind, behavior in behaviors.items()
    }
    return grpc.method_handlers_generic_handler("test.Service", handlers)


def turned(data: bytes) -> bytes:
    return data[::-1]


@dataclass
class Client:
    """A sync one, in threads: that of grpc.aio may lose the status of a call that ends while it is still sending."""

    channel: grpc.Channel

    async def call(self, kind: str = "unary_unary", *parts: bytes, metadata: tuple[Any, ...] = ()) -> bytes:
        return await asyncio.to_thread(self._call, kind, parts or (b"ab",), metadata)

    def _call(self, kind: str, parts: tuple[bytes, ...], metadata: tuple[Any, ...]) -> bytes:
        make: Any = getattr(self.channel, kind, self.channel.unary_unary)
        method = make(f"/test.Service/{kind}", request_serializer=turned, response_deserializer=turned)
        answer = method(iter(parts) if kind.startswith("stream") else parts[0], metadata=metadata, timeout=60)
        return b"|".join(answer) if kind.endswith("stream") else answer

    async def refused(self, *arguments: Any, **keywords: Any) -> Any:
        with pytest.raises(grpc.RpcError) as refusal:
            await self.call(*arguments, **keywords)
        return refusal.value


@dataclass
class Face:
    """A server of one kind, and a manager of the same kind."""

    asynchronous: bool
    behaviors: Behaviors
    clock: ManualClock = field(default_factory=lambda: ManualClock(0))
    store: ScriptedStore = field(default_factory=ScriptedStore)

    def manager(self, **settings: Any) -> Manager:
        if self.asynchronous:
            return AsyncProxyManager(for_asyncio(self.store), clock=self.clock, **settings)
        return ProxyManager(self.store, clock=self.clock, **settings)

    def interceptor(self, limits: Any, **options: Any) -> Any:
        kind: Any = AsyncRateLimitInterceptor if self.asynchronous else RateLimitInterceptor
        return kind(limits, **dict[str, Any](key=method_name, name="calls", manager=self.manager()) | options)

    def interceptor_of(self, *rules: Any, **options: Any) -> Any:
        """One with rules that have settings of their own."""
        kind: Any = AsyncRateLimitInterceptor if self.asynchronous else RateLimitInterceptor
        return kind(*rules, **dict[str, Any](manager=self.manager()) | options)

    def consumed(self, key: str) -> int:
        """Tokens that a bucket says were consumed; 0 where there is none."""
        with ProxyManager(self.store, "1/s", clock=self.clock) as witness:
            return witness.snapshot(key).consumed_tokens if self.store.get(key.encode()) else 0

    def callable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, made async if the interceptors are."""

        async def afunction(*args: Any) -> Any:
            await asyncio.sleep(0)
            return function(*args)

        return afunction if self.asynchronous else function

    @asynccontextmanager
    async def serving(
        self, *interceptors: Any, address: str = "127.0.0.1:0", channel: dict[str, Any] | None = None
    ) -> AsyncGenerator[Client]:
        pool = ThreadPoolExecutor(4)
        make: Any = grpc.aio.server if self.asynchronous else grpc.server
        server = make(pool, interceptors=interceptors)
        server.add_generic_rpc_handlers((service(self.behaviors),))
        port = server.add_insecure_port(address)
        starting = server.start()
        if self.asynchronous:
            await starting
        try:
            with grpc.insecure_channel(
                address.replace(":0", f":{port}"), options=list((channel or {}).items())
            ) as opened:
                yield Client(opened)
        finally:
            if self.asynchronous:
                await server.stop(None)
            else:
                await asyncio.to_thread(server.stop(None).wait)
            await asyncio.to_thread(pool.shutdown)  # its threads may want the event loop

    @asynccontextmanager
    async def limited(self, limits: Any, **options: Any) -> AsyncGenerator[Client]:
        async with self.serving(self.interceptor(limits, **options)) as client:
            yield client


@pytest.fixture(params=["sync", "aio", "aio with threads"])
def face(request: pytest.FixtureRequest) -> Face:
    return Face(request.param != "sync", ASYNC if request.param == "aio" else SYNC)


def details(error: Any) -> dict[str, Any]:
    """The rich details of a refusal, by their types."""
    status = rpc_status.from_call(error)
    assert status is not None
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (RetryInfo, QuotaFailure):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


def pushback(error: Any) -> str | None:
    return dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")


@pytest.mark.parametrize(
    ("kind", "sent", "answer"),
    [
        ("unary_unary", [b"ab"], b"abab"),
        ("unary_stream", [b"abc"], b"a|b|c"),
        ("stream_unary", [b"a", b"b", b"c"], b"abc"),
        ("stream_stream", [b"a", b"b", b"c"], b"A|B|C"),
    ],
)
async def test_methods_of_all_kinds_are_limited_and_a_stream_pays_once(
    face: Face, kind: str, sent: list[bytes], answer: bytes
) -> None:
    async with face.limited("2/hour") as client:
        assert [await client.call(kind, *sent) for _ in range(2)] == [answer] * 2
        refusal = await client.refused(kind, *sent)
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.details() == "the limit 'calls' is exceeded; retry in 1800 s"
        face.clock.advance(1800)
        assert await client.call(kind, *sent) == answer


@pytest.mark.parametrize("limits", [["3/hour", "2/minute"], lambda _: ("3/hour", "2/minute")])
async def test_a_list_of_limits_is_several_limits(face: Face, limits: Any) -> None:
    async with face.limited(limits) as client:
        assert [await client.call() for _ in range(2)]
        assert pushback(await client.refused()) == "30000"
        face.clock.advance(60)
        assert await client.call()
        assert pushback(await client.refused()) == "1140000"


async def test_a_refusal_says_when_to_retry_in_details_and_pushback_and_by_which_limit(face: Face) -> None:
    async with face.limited("1/3 seconds; 5/hour") as client:
        await client.call()
        face.clock.advance(nanos=100_001)
        refusal = await client.refused()
    found = details(refusal)
    assert found["RetryInfo"].retry_delay.ToNanoseconds() == 2_999_899_999
    assert pushback(refusal) == "3000"
    (violation,) = found["QuotaFailure"].violations
    assert (violation.subject, violation.description) == ("calls", "1/3 seconds; 5/hour")


async def test_what_can_never_be_allowed_is_not_to_be_retried(face: Face) -> None:
    async with face.limited("5/hour", cost=6) as client:
        refusal = await client.refused()
    assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (pushback(refusal), set(details(refusal))) == ("-1", {"QuotaFailure"})


async def test_a_wait_that_pushback_cannot_tell_is_not_to_be_retried_by_the_channel(face: Face) -> None:
    for days, told in ((24, str(24 * 86_400_000)), (25, "-1")):
        async with face.limited(f"1/{days} days", name=f"{days}") as client:
            await client.call()
            refusal = await client.refused()
        delay = details(refusal)["RetryInfo"].retry_delay
        assert (delay.ToSeconds(), pushback(refusal)) == (days * 86_400, told)


async def test_unlimited_methods_and_exempt_calls_are_free(face: Face) -> None:
    def by_admin(rpc: Rpc) -> bool:
        return ("x-admin", "yes") in rpc.metadata

    for methods in (["/test.Service/unary_unary"], lambda name: name.endswith("/unary_unary")):
        async with face.limited("1/hour", methods=methods, exempt=face.callable(by_admin), name=f"{methods}") as client:
            assert [await client.call("stream_unary") for _ in range(3)] == [b"ab"] * 3
            assert [await client.call(metadata=(("x-admin", "yes"),)) for _ in range(3)] == [b"abab"] * 3
            await client.call()
            assert (await client.refused()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_methods_that_the_server_does_not_know_cost_nothing(face: Face) -> None:
    async with face.limited("1/hour") as client:
        assert (await client.refused("nowhere")).code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(face.store) == 0


async def test_a_call_costs_what_its_cost_says(face: Face) -> None:
    def cost(rpc: Rpc) -> int:
        return {"/test.Service/stream_unary": 4, "/test.Service/unary_unary": 3}.get(rpc.method, 0)

    async with face.limited("10/hour", key=lambda _: "all", cost=face.callable(cost)) as client:
        for kind in ("stream_unary", "unary_unary", "unary_stream", "unary_unary"):
            await client.call(kind)
        await client.refused("unary_unary")
        await client.call("unary_stream")


async def test_limits_are_looked_up_by_the_key_without_the_name(face: Face) -> None:
    limits = face.callable({b"\x01": "1/hour", b"\x02": "2/hour", b"\x03": None}.__getitem__)
    async with face.limited(limits, key=metadata_value("user-bin")) as client:
        for user, allowed in ((b"\x01", 1), (b"\x02", 2)):
            for _ in range(allowed):
                await client.call(metadata=(("user-bin", user),))
            assert (await client.refused(metadata=(("user-bin", user),))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [await client.call(metadata=(("user-bin", b"\x03"),)) for _ in range(3)] == [b"abab"] * 3
    assert face.store.get(b"calls:\x02") is not None


async def test_calls_are_told_apart_by_their_metadata(face: Face) -> None:
    async with face.limited("1/hour", key=metadata_value("X-User")) as client:
        for user in ("ann", "bob"):
            await client.call(metadata=(("x-user", user),))
            await client.refused(metadata=(("x-user", user),))
    assert face.store.get("calls:ann") is not None


async def test_a_secret_keeps_what_clients_send_out_of_the_store(face: Face) -> None:
    async with face.limited("1/hour", key=metadata_value("x-api-key", secret=SECRET)) as client:
        await client.call(metadata=(("x-api-key", "k1"),))
        await client.refused(metadata=(("x-api-key", "k1"),))
    assert face.store.get(f"calls:{hmac.digest(SECRET.encode(), b'k1', 'sha256').hex()[:32]}") is not None
    assert len(face.store) == 1


async def test_metadata_that_is_long_is_stored_as_a_hash(face: Face) -> None:
    async with face.limited("1/hour", key=metadata_value("x-user")) as client:
        await client.call(metadata=(("x-user", "a" * 129),))
        await client.call(metadata=(("x-user", "a" * 128),))
    assert face.store.get(f"calls:sha256:{hashlib.sha256(b'a' * 129).hexdigest()}") is not None
    assert face.store.get(f"calls:{'a' * 128}") is not None


@pytest.mark.parametrize("metadata", [(), (("x-user", ""),)])
async def test_a_call_without_a_key_is_an_error_or_not_limited_by_choice(face: Face, metadata: Any) -> None:
    async with face.limited("1/hour", key=metadata_value("x-user")) as client:
        refusal = await client.refused(metadata=metadata)
        assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.details() == "calls are limited by the metadata 'x-user', which this one does not have"
    for unlimited in ("unlimited", Missing.UNLIMITED):
        async with face.limited("1/hour", key=metadata_value("x-user"), missing=unlimited) as client:
            assert [await client.call(metadata=metadata) for _ in range(3)] == [b"abab"] * 3
    async with face.limited("1/hour", key=face.callable(lambda _: None)) as client:
        assert (await client.refused()).details() == "calls are limited by a key, which this one does not have"
    assert len(face.store) == 0


async def test_a_key_that_is_there_twice_is_an_error_in_any_case(face: Face) -> None:
    async with face.limited("1/hour", key=metadata_value("x-user"), missing="unlimited") as client:
        refusal = await client.refused(metadata=(("x-user", "ann"), ("x-user", "bob")))
    assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.details() == "the metadata 'x-user' must not be there more than once"


async def test_calls_are_told_apart_by_who_is_connected(face: Face) -> None:
    async with face.limited("1/hour", key=peer_ip) as client:
        await client.call()
        await client.refused()
    assert face.store.get("calls:127.0.0.1") is not None


async def test_a_unix_socket_has_no_address(face: Face, tmp_path: Path) -> None:
    async with face.serving(face.interceptor("1/hour", key=peer_ip), address=f"unix:{tmp_path}/socket") as client:
        assert (await client.refused()).code() is grpc.StatusCode.INVALID_ARGUMENT


class Connected:
    """The context of a call, as far as it matters who is connected."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("ipv4:203.0.113.7:50123", "203.0.113.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:50123", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:50123", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50123", "fe80::/64"),
        ("ipv6:%5B::ffff:203.0.113.7%5D:50123", "203.0.113.7"),
        ("ipv6:%5B64:ff9b::203.0.113.7%5D:50123", "203.0.113.7"),
        ("unix:", None),
        ("unix:/tmp/203.0.113.7:1", None),
        ("unix-abstract:name", None),
        ("ipv4:", None),
        ("ipv4:localhost:1", None),
        ("unknown", None),
        ("", None),
    ],
)
def test_the_address_is_read_in_every_form_that_grpc_writes(peer: str, key: str | None) -> None:
    assert peer_ip(Rpc("/a.B/C", (), Connected(peer))) == key


@given(st.ip_addresses(v=4), st.integers(1, 65_535))
def test_an_address_of_version_4_is_the_key_itself(ip: IPv4Address, port: int) -> None:
    assert peer_ip(Rpc("/a.B/C", (), Connected(f"ipv4:{ip}:{port}"))) == str(ip)


@given(st.text())
def test_what_is_no_address_is_no_key_and_no_error(text: str) -> None:
    key = peer_ip(Rpc("/a.B/C", (), Connected(f"ipv6:{text}")))
    assert key is None or str(ip_network(key)) in (key, f"{key}/32")


async def test_a_store_that_fails_is_unavailable_and_only_the_log_says_why(
    face: Face, caplog: pytest.LogCaptureFixture
) -> None:
    async with face.limited("1/hour") as client:
        face.store.fail()
        refusal = await client.refused()
        assert refusal.code() is grpc.StatusCode.UNAVAILABLE
        assert refusal.details() == "the rate limit cannot be looked up at present"
        assert (pushback(refusal), details(refusal)["RetryInfo"].retry_delay.ToSeconds()) == ("1000", 1)
        assert await client.call() == b"abab"
    (record,) = [record for record in caplog.records if record.name == "ratelimit"]
    assert record.levelno == logging.ERROR
    assert "/test.Service/unary_unary" in record.message
    assert "as scripted" in record.message
    assert record.exc_info is None


@pytest.mark.parametrize(
    ("policy", "codes", "wait"),
    [
        (OnError.DENY, [grpc.StatusCode.UNAVAILABLE], "1000"),
        (OnError.local(1 / 2), [None, grpc.StatusCode.RESOURCE_EXHAUSTED], "3600000"),
        (OnError.ALLOW, [None, None, None], None),
    ],
    ids=["deny", "local", "allow"],
)
async def test_a_store_that_fails_is_answered_as_the_manager_says(
    face: Face, policy: OnError, codes: list[grpc.StatusCode | None], wait: str | None
) -> None:
    face.store.fail(times=10)
    async with face.limited("2/hour", manager=face.manager(on_error=policy)) as client:
        for code in codes:
            if code is None:
                await client.call()
            else:
                refusal = await client.refused()
                assert (refusal.code(), pushback(refusal)) == (code, wait)


def retrying(*codes: str) -> dict[str, Any]:
    """Options of a channel that retries, by itself very late."""
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "1000s",
        "maxBackoff": "1000s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": codes,
    }
    return {"grpc.service_config": json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})}


async def test_a_channel_with_a_retry_policy_comes_back_when_it_is_told(face: Face) -> None:
    attempts: list[str | bytes] = []

    def key(rpc: Rpc) -> str:
        """Return one key for all calls, and let time pass between one attempt and the next."""
        attempts.append(dict(rpc.metadata).get("grpc-previous-rpc-attempts", "0"))
        if attempts[-1] != "0":
            face.clock.advance(0.05)
        return "all"

    interceptor = face.interceptor("20/second burst 1", key=key)
    async with face.serving(interceptor, channel=retrying("RESOURCE_EXHAUSTED")) as client:
        assert [await client.call() for _ in range(2)] == [b"abab"] * 2
    assert attempts == ["0", "0", "1"]


async def test_a_channel_with_a_retry_policy_does_not_come_back_where_that_is_in_vain(face: Face) -> None:
    attempts: list[str] = []

    def key(rpc: Rpc) -> str:
        attempts.append(rpc.method)
        return "all"

    async with face.serving(
        face.interceptor("1/hour", key=key, cost=2), channel=retrying("RESOURCE_EXHAUSTED")
    ) as client:
        assert (await client.refused()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(attempts) == 1


async def test_several_interceptors_each_take_their_tokens(face: Face) -> None:
    inner = face.interceptor("3/hour", name="all", key=lambda _: "all")
    async with face.serving(face.interceptor("2/hour", name="each"), inner) as client:
        for kind in ("unary_unary", "unary_unary", "unary_stream"):
            await client.call(kind)
        assert "'each'" in (await client.refused("unary_unary")).details()
        assert "'all'" in (await client.refused("unary_stream")).details()


async def test_a_refusal_by_one_rule_takes_nothing_by_any(face: Face) -> None:
    rules = [
        RpcRule("9/hour", key=lambda _: "all", cost=3, name="all"),
        RpcRule("1/hour", key=method_name, methods=["/test.Service/unary_unary"], name="method"),
        RpcRule("8/hour", key=lambda _: "all", name="last"),
    ]
    async with face.serving(face.interceptor_of(*rules)) as client:
        await client.call("unary_unary")
        refusal = await client.refused("unary_unary")
        assert refusal.details() == "the limit 'method' is exceeded; retry in 3600 s"
        assert details(refusal)["QuotaFailure"].violations[0].subject == "method"
        assert (face.consumed("all:all"), face.consumed("last:all")) == (3, 1)
        await client.call("unary_stream")
        assert (face.consumed("all:all"), face.consumed("last:all")) == (6, 2)


async def test_a_refusal_names_all_limits_that_refuse_and_says_the_longest_wait(face: Face) -> None:
    rules = [RpcRule(limits, key=method_name, name=limits) for limits in ("1/hour", "9/hour", "1/2 hours")]
    async with face.serving(face.interceptor_of(*rules)) as client:
        await client.call()
        refusal = await client.refused()
    assert refusal.details() == "the limit '1/hour' is exceeded; retry in 7200 s"
    assert details(refusal)["RetryInfo"].retry_delay.seconds == 7200
    assert [violation.subject for violation in details(refusal)["QuotaFailure"].violations] == ["1/hour", "1/2 hours"]


async def test_several_limits_with_the_same_settings_are_a_rule_each(face: Face) -> None:
    async with face.serving(face.interceptor_of("5/hour", "2/minute", key=lambda _: "all")) as client:
        assert [await client.call() for _ in range(2)]
        assert (await client.refused()).details() == "the limit '2/minute' is exceeded; retry in 30 s"
        assert [face.consumed(f"|{text}|<lambda>:all") for text in ("5/hour", "2/minute")] == [2, 2]


@pytest.mark.parametrize("metadata", [(), (("x-user", "ann"), ("x-user", "bob"))], ids=["missing", "ambiguous"])
async def test_a_key_that_is_no_use_gives_back_what_the_call_has_paid(face: Face, metadata: Any) -> None:
    rules = [
        RpcRule("9/hour", key=lambda _: "all", name="all"),
        RpcRule("9/hour", key=metadata_value("x-user"), name="user"),
    ]
    async with face.serving(face.interceptor_of(*rules)) as client:
        assert (await client.refused(metadata=metadata)).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert face.consumed("all:all") == 0


async def test_rules_of_other_methods_do_not_limit_a_call(face: Face) -> None:
    rules = [
        RpcRule("1/hour", key=lambda _: "all", methods=["/test.Service/unary_unary"]),
        RpcRule("1/hour", key=lambda _: "all", methods=["/test.Service/unary_stream"], enabled=False),
    ]
    async with face.serving(face.interceptor_of(*rules)) as client:
        await client.call("unary_unary")
        await client.refused("unary_unary")
        assert [await client.call("unary_stream") for _ in range(3)]


async def test_plans_say_what_a_customer_has_bought_and_a_new_one_takes_effect(face: Face) -> None:
    bought: dict[Any, Any] = {"ann": Assigned("free", 1), "root": "internal"}
    limits = {"free": "2/hour", "paid": "4/hour", "internal": None}
    plans = Plans(limits, face.callable(bought.get), default="free", ttl=0)
    async with face.limited(plans, key=metadata_value("x-user")) as client:
        ann, root = (("x-user", "ann"),), (("x-user", "root"),)
        assert [await client.call(metadata=root) for _ in range(5)]
        await client.call(metadata=ann)
        bought["ann"] = Assigned("paid", 2)
        assert [await client.call(metadata=ann) for _ in range(2)], "half full before, and after"
        refusal = await client.refused(metadata=ann)
        assert details(refusal)["QuotaFailure"].violations[0].description == "4/hour"
        assert refusal.details().startswith("the limit 'calls' is exceeded")


async def test_limits_may_see_the_call(face: Face) -> None:
    def limits(key: Any, rpc: Rpc) -> str | None:
        assert key == "all"
        return "1/hour" if rpc.method.endswith("/unary_unary") else None

    async with face.limited(limits, key=lambda _: "all") as client:
        await client.call("unary_unary")
        await client.refused("unary_unary")
        assert [await client.call("unary_stream") for _ in range(3)]


async def test_only_calls_for_which_when_is_true_are_limited(face: Face) -> None:
    when = face.callable(lambda rpc: ("x-trial", "yes") in rpc.metadata)
    async with face.limited("1/hour", when=when) as client:
        assert [await client.call() for _ in range(3)]
        await client.call(metadata=(("x-trial", "yes"),))
        await client.refused(metadata=(("x-trial", "yes"),))


@pytest.mark.parametrize(
    ("policy", "codes"),
    [
        (OnError.DENY, [grpc.StatusCode.UNAVAILABLE]),
        (OnError.local(1 / 2), [None, grpc.StatusCode.RESOURCE_EXHAUSTED]),
        (OnError.ALLOW, [None, None, None]),
        (None, [grpc.StatusCode.UNAVAILABLE]),
    ],
    ids=["deny", "local", "allow", "that of the manager"],
)
async def test_an_interceptor_may_decide_otherwise_than_its_manager_where_the_store_fails(
    face: Face, policy: OnError | None, codes: list[grpc.StatusCode | None]
) -> None:
    face.store.fail(times=10)
    async with face.limited("2/hour", on_error=policy, manager=face.manager(on_error=OnError.RAISE)) as client:
        for code in codes:
            if code is None:
                await client.call()
            else:
                assert (await client.refused()).code() is code


async def test_a_hook_hears_of_each_refusal(face: Face) -> None:
    heard: list[tuple[str, Any]] = []

    def hear(rpc: Rpc, decision: Decision[Rpc]) -> None:
        heard.append((rpc.method, decision.refused.rule.name if decision.refused else decision.missing))

    async with face.limited("1/hour", on_refused=face.callable(hear)) as client:
        await client.call()
        await client.refused()
    assert heard == [("/test.Service/unary_unary", "calls")]


def test_a_rule_has_its_settings_and_prints_them() -> None:
    rule = RpcRule("1/hour", key=method_name, methods=["/a.B/D", "/a.B/C"], missing="unlimited", name="x")
    assert repr(rule) == (
        f"RpcRule('1/hour', key={method_name!r}, name='x', methods=['/a.B/C', '/a.B/D'],"
        " missing=<Missing.UNLIMITED: 'unlimited'>)"
    )
    assert rule == RpcRule("1/hour", key=method_name, methods=["/a.B/C", "/a.B/D"], missing="unlimited", name="x")
    assert rule != RpcRule("1/hour", key=method_name, methods=["/a.B/C"], missing="unlimited", name="x")
    with pytest.raises(InvalidArgumentError, match="a Rule has its settings already; 'cost' goes there"):
        RateLimitInterceptor(rule, cost=2)
    with pytest.raises(InvalidConfigurationError, match="rules of one name must have the same limits and version"):
        RateLimitInterceptor(rule, RpcRule("2/hour", key=method_name, name="x"))


class SlowStore(AsyncSwappingMemoryStore):
    """One that answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answering = asyncio.Event(), asyncio.Event()

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.asked.set()
        await self.answering.wait()
        return await super().swap(key, before, after, ttl_millis)


@pytest.mark.parametrize("behaviors", [ASYNC, SYNC], ids=["aio", "aio with threads"])
async def test_a_decision_does_not_block_the_event_loop(behaviors: Behaviors) -> None:
    store = SlowStore()
    face = Face(asynchronous=True, behaviors=behaviors)
    interceptor = face.interceptor("1/hour", methods=["/test.Service/unary_unary"], manager=AsyncProxyManager(store))
    async with face.serving(interceptor) as client:
        limited = asyncio.create_task(client.call())
        await store.asked.wait()
        assert await client.call("stream_unary", b"a", b"b") == b"ab"
        assert not limited.done()
        store.answering.set()
        assert await limited == b"abab"


async def test_a_stream_that_the_client_leaves_is_closed() -> None:
    closed = asyncio.Event()

    async def endless(_data: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"a"
        finally:
            closed.set()

    face = Face(asynchronous=True, behaviors=ASYNC | {"unary_stream": endless})
    async with face.limited("1/hour") as client:
        method: Any = client.channel.unary_stream("/test.Service/unary_stream")
        call = method(b"", timeout=60)
        assert await asyncio.to_thread(next, call) == b"a"
        call.cancel()
        await closed.wait()


async def never(*_: object) -> Any: ...


@pytest.mark.parametrize(
    ("arguments", "field", "complaint"),
    [
        ({"key": "all"}, "key", "key must be a callable such as peer_ip; got 'all'"),
        ({"cost": 0}, "cost", "cost must be an int from 1 to 2\\*\\*63 - 1, or a callable; got 0"),
        ({"methods": "/a.B/C"}, "methods", "methods must be a collection of names; got '/a.B/C'"),
        ({"methods": ["a.B/C"]}, "methods", "a method must be named like /package.Service/Method; got 'a.B/C'"),
        ({"exempt": True}, "exempt", "exempt must be a callable; got True"),
        ({"missing": "ignore"}, "missing", "missing must be error or unlimited; got 'ignore'"),
        ({"name": b"calls"}, "name", "name must be a str; got b'calls'"),
        ({"manager": 42}, "manager", r"manager must be a \w*ProxyManager or a URL; got 42"),
        ({"limits": "often"}, None, "often"),
    ],
)
@pytest.mark.parametrize("kind", [RateLimitInterceptor, AsyncRateLimitInterceptor])
def test_what_cannot_be_is_refused(kind: Any, arguments: dict[str, Any], field: str | None, complaint: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=complaint) as error:
        kind(**dict[str, Any](limits="1/hour", key=peer_ip) | arguments)
    assert field is None or error.value.field == field


def test_a_manager_of_the_other_kind_is_refused(face: Face) -> None:
    other = Face(not face.asynchronous, SYNC).manager()
    with pytest.raises(InvalidConfigurationError, match="manager must be a"):
        face.interceptor("1/hour", manager=other)


def test_callables_of_a_sync_interceptor_are_not_async() -> None:
    kind: Any = RateLimitInterceptor
    for role in ("limits", "key", "cost", "when", "exempt"):
        with pytest.raises(InvalidConfigurationError, match=f"{role} must be sync, as the server is") as error:
            kind(**dict[str, Any](limits="1/hour", key=peer_ip) | {role: never})
        assert error.value.field == role


def test_a_secret_that_is_too_short_is_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="secret must be of at least 16 bytes"):
        metadata_value("x-api-key", secret="short")


def test_a_secret_is_not_printed() -> None:
    assert SECRET not in repr(metadata_value("x-api-key", secret=SECRET))


@pytest.mark.redis
async def test_sync_and_aio_servers_share_their_buckets_in_redis(redis_url: str) -> None:
    sync, aio = Face(asynchronous=False, behaviors=SYNC), Face(asynchronous=True, behaviors=ASYNC)
    async with (
        AsyncProxyManager.from_url(redis_url, prefix="ratelimit:") as manager,
        sync.limited("3/hour", key=peer_ip, manager=redis_url) as one,
        aio.limited("3/hour", key=peer_ip, manager=manager) as other,
    ):
        for client in (one, other, one):
            assert await client.call() == b"abab"
        for client in (one, other):
            assert (await client.refused()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_interceptors_without_a_name_count_apart(face: Face) -> None:
    """By their limits, their methods and their kind of key; those that have all of these in common count together."""
    unary, stream = "/test.Service/unary_unary", "/test.Service/stream_unary"
    interceptors = [
        face.interceptor(limits, name=None, key=key, methods=methods)
        for limits, key, methods in (
            ("2/hour", peer_ip, [unary]),
            ("2/hour", peer_ip, [stream]),
            ("3/hour", peer_ip, None),
            ("3/hour", method_name, None),
        )
    ]
    async with face.serving(*interceptors) as client:
        assert [await client.call("unary_unary") for _ in range(2)]
        assert (await client.refused("unary_unary")).details().startswith("the limit '2/hour' is exceeded")
        assert await client.call("stream_unary")
        assert (await client.refused("unary_stream")).details().startswith("the limit '3/hour' is exceeded")
    assert len(face.store) == 5, "the last one has a bucket for each of two methods"
    async with face.limited("2/hour", name=None, key=peer_ip, methods=[unary]) as client:
        await client.refused("unary_unary")


async def test_services_are_apart_by_namespace(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = face.interceptor("1/hour", namespace="shop")
    monkeypatch.setenv("RATELIMIT_NAMESPACE", "blog")
    blog = face.interceptor("1/hour")
    for interceptor in (shop, blog):
        async with face.serving(interceptor) as client:
            await client.call()
            await client.refused()
    assert face.store.get("shop||calls:/test.Service/unary_unary") is not None
    assert face.store.get("blog||calls:/test.Service/unary_unary") is not None
    assert len(face.store) == 2


async def test_a_higher_version_replaces_the_limits_of_live_buckets(
    face: Face, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = face.interceptor("2/hour", version=1), face.interceptor("4/hour", version=2)
    async with face.serving(old) as old_client, face.serving(new) as new_client:
        await old_client.call()
        assert [await new_client.call() for _ in range(2)], "half full before, and after"
        assert details(await new_client.refused())["QuotaFailure"].violations[0].description == "4/hour"
        assert details(await old_client.refused())["QuotaFailure"].violations[0].description == "4/hour"
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "the limits of 'calls' are 2/hour in the code, but 4/hour in the store" in warning


async def test_an_interceptor_is_switched_off_by_its_argument_or_the_variable(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with face.limited("1/hour", enabled=False) as client:
        assert [await client.call() for _ in range(2)]
    async with face.limited("1/hour") as client:
        monkeypatch.setenv("RATELIMIT_ENABLED", "false")
        assert [await client.call() for _ in range(2)]
        monkeypatch.delenv("RATELIMIT_ENABLED")
        await client.call()
        await client.refused()


async def test_a_refusal_is_logged_with_the_hash_of_its_key(face: Face, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    async with face.limited("1/hour", key=metadata_value("x-user")) as client:
        await client.call(metadata=(("x-user", "ann"),))
        await client.refused(metadata=(("x-user", "ann"),))
    assert caplog.messages == [f"refused by 'calls': key {hashed('ann')}, limits 1/hour"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("version", -1, "version must be None or an int of 0 or more; got -1"),
        ("namespace", "a b", "namespace must be 1 to 100 printable ASCII characters without spaces; got 'a b'"),
    ],
)
def test_versions_and_namespaces_that_cannot_be_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidConfigurationError) as error:
        RateLimitInterceptor("1/hour", key=peer_ip, **{option: value})
    assert (str(error.value), error.value.field) == (message, option)
