from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, assert_type

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    BucketConfiguration,
    InvalidArgumentError,
    InvalidConfigurationError,
    MemoryStore,
    OnError,
    ProxyManager,
    RateLimitExceeded,
    StoreUnavailableError,
)
from ratelimit.integrations.functions import limited
from ratelimit.policy import Plans
from ratelimit.testing import ManualClock, ScriptedStore
from tests.support.both_faces import Manager, for_asyncio, settled

HOUR = 3600 * 10**9


@dataclass
class Face:
    """Functions of one kind, and a manager of the same kind."""

    asynchronous: bool
    clock: ManualClock = field(default_factory=lambda: ManualClock(0))
    store: ScriptedStore = field(default_factory=ScriptedStore)
    calls: list[Any] = field(default_factory=list)

    def manager(self, **settings: Any) -> Manager:
        if self.asynchronous:
            return AsyncProxyManager(for_asyncio(self.store), clock=self.clock, **settings)
        return ProxyManager(self.store, clock=self.clock, **settings)

    def function(self) -> Callable[..., Any]:
        """One that takes note of its calls."""

        def send(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            return args[0] if args else None

        async def asend(*args: Any, **kwargs: Any) -> Any:
            return send(*args, **kwargs)

        return asend if self.asynchronous else send

    def limited(self, limits: Any, **options: Any) -> Callable[..., Awaitable[Any]]:
        manager = options.pop("manager", None) or self.manager()
        function = limited(limits, manager=manager, **dict[str, Any](name="send") | options)(self.function())

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await settled(function(*args, **kwargs))

        return call

    def callable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, made async if the limited functions are."""

        async def afunction(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return function(*args, **kwargs)

        return afunction if self.asynchronous else function


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Face:
    return Face(request.param == "async")


async def test_a_call_beyond_the_limit_is_refused_and_does_not_happen(face: Face) -> None:
    send = face.limited("2/hour")
    assert [await send(1, to="a"), await send(2)] == [1, 2]
    with pytest.raises(RateLimitExceeded) as refusal:
        await send(3)
    assert (refusal.value.key, refusal.value.retry_after) == ("send", 1800)
    assert face.calls == [((1,), {"to": "a"}), ((2,), {})]
    face.clock.advance(1800)
    assert await send(4) == 4


async def test_a_callable_key_gets_the_arguments_of_the_call(face: Face) -> None:
    send = face.limited("1/hour", key=face.callable(lambda user, text="": f"{user}{text}"))
    await send("ann", text="1")
    await send("ann")
    with pytest.raises(RateLimitExceeded) as refusal:
        await send("ann", text="1")
    assert refusal.value.key == "send:ann1"


async def test_a_call_with_the_key_none_is_not_limited(face: Face) -> None:
    send = face.limited("1/hour", key=lambda user: None if user == "root" else user)
    assert [await send("root") for _ in range(3)] == ["root"] * 3
    assert len(face.store) == 0


@pytest.mark.parametrize(
    ("key", "stored"),
    [(None, b"send"), ("all", b"send:all"), (b"\xff", b"send:\xff"), ("", b"send:"), ("é:", b"send:\xc3\xa9:")],
)
async def test_the_bucket_is_named_by_name_and_key(face: Face, key: str | bytes | None, stored: bytes) -> None:
    await face.limited("5/hour", key=key)()
    assert face.store.get(stored) is not None
    if key is not None:
        await face.limited("5/hour", key=lambda: key)()
        assert await settled(face.manager().bucket(stored, "5/hour").available_tokens()) == 3


@pytest.mark.parametrize("limits", [["3/hour", "2/minute"], lambda _: ("3/hour", "2/minute")])
async def test_a_list_of_limits_is_several_limits(face: Face, limits: Any) -> None:
    send = face.limited(limits)
    for wait in (60, 3600):
        with pytest.raises(RateLimitExceeded):
            for _ in range(3):
                await send()
        face.clock.advance(wait)
    assert len(face.calls) == 3


async def test_functions_of_one_name_share_a_bucket(face: Face) -> None:
    send, post = face.limited("1/hour", name="out"), face.limited("1/hour", name="out")
    await send()
    with pytest.raises(RateLimitExceeded):
        await post()


async def test_the_bucket_is_that_of_the_function_where_no_name_is_given(face: Face) -> None:
    await face.limited("5/hour", name=None)()
    kind = "asend" if face.asynchronous else "send"
    place = f"tests.integrations.test_functions.Face.function.<locals>.{kind}"
    assert face.store.get(f"{place}|5/hour") is not None


async def test_two_limits_of_one_function_have_buckets_of_their_own(face: Face) -> None:
    send = face.limited("1/hour", name=None)
    other = face.limited("2/hour", name=None)
    await send()
    await other()
    await other()
    for call in (send, other):
        with pytest.raises(RateLimitExceeded):
            await call()


async def test_a_higher_version_replaces_the_limits_of_live_buckets(
    face: Face, caplog: pytest.LogCaptureFixture
) -> None:
    await face.limited("1/hour", name="out", version=1)()
    new = face.limited("3/hour", name="out", version=2)
    with pytest.raises(RateLimitExceeded):
        await new()
    assert not caplog.records
    with pytest.raises(RateLimitExceeded):
        await face.limited("9/hour", name="out", version=1)()
    assert "the limits of 'out' are 9/hour in the code, but 3/hour in the store" in caplog.text


async def test_limits_can_be_switched_off(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    off = face.limited("1/hour", name="out", enabled=False)
    await off()
    await off()
    send = face.limited("1/hour", name="out")
    monkeypatch.setenv("RATELIMIT_ENABLED", "false")
    await send()
    await send()
    monkeypatch.delenv("RATELIMIT_ENABLED")
    await send()
    with pytest.raises(RateLimitExceeded):
        await send()


async def test_services_count_apart_by_their_namespaces(face: Face) -> None:
    for namespace in ("shop", "billing"):
        await face.limited("1/hour", name="out", namespace=namespace)()
    assert face.store.get("shop||out") is not None


async def test_a_call_costs_what_its_cost_says(face: Face) -> None:
    send = face.limited("10/hour", cost=face.callable(len))
    await send("12345678")
    with pytest.raises(RateLimitExceeded):
        await send("123")
    await send("")
    await send("12")
    assert await settled(face.manager().bucket("send", "10/hour").available_tokens()) == 0


async def test_more_than_the_bucket_can_hold_is_refused_for_ever(face: Face) -> None:
    with pytest.raises(RateLimitExceeded) as refusal:
        await face.limited("10/hour", cost=11)()
    assert refusal.value.retry_after is None


@pytest.mark.parametrize("cost", [-1, 1.0, True, False, None, "1"])
async def test_a_cost_that_cannot_be_is_an_error_and_the_call_does_not_happen(face: Face, cost: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="the answer of cost must be an int from 0"):
        await face.limited("10/hour", cost=lambda: cost)()
    assert face.calls == []


async def test_a_key_that_cannot_be_is_an_error_and_the_call_does_not_happen(face: Face) -> None:
    with pytest.raises(InvalidArgumentError, match="the answer of key must be a str, bytes or None; got 42"):
        await face.limited("10/hour", key=lambda user: user)(42)
    assert face.calls == []


async def test_limits_are_looked_up_by_the_key_without_the_name(face: Face) -> None:
    plans = {"ann": "1/hour", "bob": BucketConfiguration.parse("2/hour"), "root": None}
    send = face.limited(face.callable(lambda user: plans[user]), key=lambda user: user)
    for user, allowed in (("ann", 1), ("bob", 2)):
        for _ in range(allowed):
            await send(user)
        with pytest.raises(RateLimitExceeded):
            await send(user)
    assert [await send("root") for _ in range(5)] == ["root"] * 5


async def test_limits_are_looked_up_by_the_name_where_there_is_no_key(face: Face) -> None:
    send = face.limited({"out": "1/hour"}.get, name="out")
    await send()
    with pytest.raises(RateLimitExceeded):
        await send()


async def test_a_refusal_has_the_probe_of_the_bucket(face: Face) -> None:
    for max_wait, name in ((0, "send"), (5, "post")):
        send = face.limited("3/hour", cost=2, max_wait=max_wait, name=name)
        await send()
        with pytest.raises(RateLimitExceeded) as refusal:
            await send()
        probe = refusal.value.probe
        assert (probe.consumed, probe.remaining_tokens, probe.retry_after) == (False, 1, refusal.value.retry_after)
        assert refusal.value.retry_after == 1200


async def test_plans_say_what_a_customer_has_bought(face: Face) -> None:
    bought = {"ann": "paid", "root": "internal"}
    plans = Plans({"free": "1/hour", "paid": "2/hour", "internal": None}, face.callable(bought.get), default="free")
    send = face.limited(plans, key=lambda user: user)
    for user, allowed in (("ann", 2), ("bob", 1)):
        for _ in range(allowed):
            await send(user)
        with pytest.raises(RateLimitExceeded):
            await send(user)
    assert [await send("root") for _ in range(3)] == ["root"] * 3


async def test_a_call_that_does_not_wait_is_refused(face: Face) -> None:
    send = face.limited("1/second", max_wait=0)
    await send()
    with pytest.raises(RateLimitExceeded):
        await send()
    assert face.clock.slept == []


async def test_a_call_that_waits_gets_its_turn(face: Face) -> None:
    send = face.limited("1/second", max_wait=None)
    assert [await send(number) for number in range(3)] == [0, 1, 2]
    assert face.clock.slept == [10**9, 10**9]


@pytest.mark.parametrize("max_wait", [5, timedelta(seconds=5)])
async def test_a_wait_beyond_the_bound_is_refused_at_once_and_takes_nothing(face: Face, max_wait: Any) -> None:
    send = face.limited("4/hour", max_wait=max_wait)
    for _ in range(4):
        await send()
    with pytest.raises(RateLimitExceeded) as refusal:
        await send()
    assert (refusal.value.retry_after, face.clock.slept, len(face.calls)) == (900, [], 4)
    face.clock.advance(896)
    await send()
    assert face.clock.slept == [4 * 10**9]


async def test_a_wait_that_is_interrupted_gives_its_tokens_back_and_the_call_does_not_happen() -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "2/hour")
    happened: list[None] = []

    @limited("2/hour", cost=2, max_wait=None, name="send", manager=manager)
    async def send() -> None:
        happened.append(None)

    await send()
    waiting = asyncio.create_task(send())
    while await manager.available_tokens("send") == 0:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await manager.available_tokens("send"), len(happened)) == (0, 1)


async def test_tokens_are_gone_also_where_the_function_fails(face: Face) -> None:
    manager = face.manager()

    def fail() -> None:
        raise ZeroDivisionError

    async def afail() -> None:
        raise ZeroDivisionError

    failing = limited("2/hour", name="fail", manager=manager)(afail if face.asynchronous else fail)
    with pytest.raises(ZeroDivisionError):
        await settled(failing())
    assert await settled(manager.bucket("fail", "2/hour").available_tokens()) == 1


@pytest.mark.parametrize("max_wait", [0, None])
async def test_a_store_that_fails_is_an_error_by_default(face: Face, max_wait: float | None) -> None:
    face.store.fail()
    with pytest.raises(StoreUnavailableError):
        await face.limited("2/hour", max_wait=max_wait)()
    assert face.calls == []


@pytest.mark.parametrize("max_wait", [0, None])
async def test_a_store_that_fails_is_answered_as_the_manager_says(face: Face, max_wait: float | None) -> None:
    face.store.fail(times=3)
    assert await face.limited("2/hour", max_wait=max_wait, manager=face.manager(on_error=OnError.ALLOW))(1) == 1
    with pytest.raises(RateLimitExceeded) as refusal:
        await face.limited("2/hour", max_wait=max_wait, manager=face.manager(on_error=OnError.DENY))(2)
    assert refusal.value.retry_after == 1
    assert face.calls == [((1,), {})]


async def test_methods_are_limited_with_their_object_as_the_first_argument() -> None:
    class Client:
        def __init__(self, account: str) -> None:
            self.account = account

        @limited("1/hour", key=lambda self, *_: self.account, manager=(manager := ProxyManager(MemoryStore())))
        def send(self, text: str) -> str:
            return f"{self.account}: {text}"

        @classmethod
        @limited("1/hour", manager=manager)
        def make(cls, account: str) -> Client:
            return cls(account)

        @staticmethod
        @limited("1/hour", manager=AsyncProxyManager(AsyncMemoryStore()))
        async def ping() -> str:
            return "pong"

    ann = Client.make("ann")
    assert [ann.send("1"), Client("bob").send("2"), await Client.ping()] == ["ann: 1", "bob: 2", "pong"]
    for call in (lambda: ann.send("3"), lambda: Client.make("bob")):
        with pytest.raises(RateLimitExceeded):
            call()
    with pytest.raises(RateLimitExceeded):
        await ann.ping()


def test_a_function_keeps_its_name_its_signature_and_its_types() -> None:
    @limited("5/second")
    def send(text: str, *, times: int = 1) -> bool:
        """Send it."""
        return bool(text * times)

    @limited("5/second", max_wait=None)
    async def asend(text: str) -> bool:
        return bool(text)

    assert (send.__name__, send.__doc__) == ("send", "Send it.")
    assert str(inspect.signature(send)) == "(text: 'str', *, times: 'int' = 1) -> 'bool'"
    assert inspect.iscoroutinefunction(asend)
    assert not inspect.iscoroutinefunction(send)

    async def check_types() -> None:
        assert_type(send("a", times=2), bool)
        assert_type(await asend("a"), bool)
        send(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # as the function itself

    assert callable(check_types)


def test_nothing_is_opened_at_decoration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATELIMIT_URL", "nonsense://")

    @limited("1/hour")
    def send() -> str:
        return "sent"

    with pytest.raises(InvalidConfigurationError, match="nonsense"):
        send()
    monkeypatch.setenv("RATELIMIT_URL", "memory://")
    assert send() == "sent"
    with pytest.raises(RateLimitExceeded):
        send()


def of_generators() -> list[Any]:
    def numbers() -> Iterator[int]:
        yield 1

    async def anumbers() -> AsyncIterator[int]:
        yield 1

    return [numbers, anumbers]


@pytest.mark.parametrize("generator", of_generators())
def test_generators_are_refused_at_decoration(generator: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="is a generator, a call of which runs nothing yet"):
        limited("1/hour")(generator)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (classmethod(print), "limited must be placed below classmethod"),
        (staticmethod(print), "limited must be placed below staticmethod"),
        (dict, "must be a function; got <class 'dict'>"),
        (None, "must be a function; got None"),
        (functools.partial(print, 1), "has no name of its own: give it one with name="),
    ],
)
def test_what_is_no_function_is_refused_at_decoration(what: Any, complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        limited("1/hour")(what)


def test_what_has_no_name_of_its_own_can_be_given_one() -> None:
    power = limited("1/hour", name="power", manager=ProxyManager(MemoryStore()))(functools.partial(pow, 2))
    assert power(3) == 8
    with pytest.raises(RateLimitExceeded):
        power(3)


async def test_objects_that_are_called_are_limited_by_the_kind_of_their_call() -> None:
    class Sender:
        async def __call__(self) -> str:
            return "sent"

    send = limited("1/hour", name="send", manager=AsyncProxyManager(AsyncMemoryStore()))(Sender())
    assert await send() == "sent"
    with pytest.raises(RateLimitExceeded):
        await send()


def test_a_manager_of_the_other_kind_is_refused_at_decoration(face: Face) -> None:
    other = Face(not face.asynchronous).manager()
    with pytest.raises(
        InvalidArgumentError, match=rf"must be an? (Async)?ProxyManager or a URL; got {type(other).__name__}\("
    ):
        limited("1/hour", manager=other)(face.function())


async def later(*_: object) -> Any: ...


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"key": 42}, "key must be a str, bytes, or a callable; got 42"),
        ({"key": later}, "key must be sync, as the function is"),
        ({"cost": 0}, "cost must be an int from 1"),
        ({"cost": later}, "cost must be sync, as the function is"),
        ({"limits": later}, "limits must be sync, as the function is"),
        ({"max_wait": -1}, "max_wait must be 0 or more; got -1"),
        ({"max_wait": "5"}, "max_wait must be a timedelta or a number of seconds; got '5'"),
        ({"name": b"send"}, "name must be a str; got b'send'"),
        ({"manager": 42}, "manager of a sync function must be a ProxyManager or a URL; got 42"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_decoration(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint):
        limited(**dict[str, Any](limits="1/hour") | arguments)(print)


def test_limits_that_cannot_be_are_refused_at_decoration() -> None:
    with pytest.raises(InvalidConfigurationError):
        limited("often")


@pytest.mark.redis
async def test_sync_and_async_functions_of_one_name_share_a_bucket_in_redis(redis_url: str) -> None:
    @limited("3/hour", name="send", key="all", manager=redis_url)
    def send() -> None: ...

    async with AsyncProxyManager.from_url(redis_url, prefix="ratelimit:") as manager:

        @limited("3/hour", name="send", key="all", manager=manager)
        async def asend() -> None: ...

        send()
        await asend()
        send()
        with pytest.raises(RateLimitExceeded):
            await asend()
    with pytest.raises(RateLimitExceeded):
        send()
