"""Managers and handles: settings, keys, prefixes, versions; all on a store in memory."""

from __future__ import annotations

import asyncio
import gc
from inspect import iscoroutinefunction
from typing import Any
from weakref import ref

import pytest

from ratelimit import (
    AsyncBucket,
    AsyncMemoryStore,
    AsyncProxyManager,
    Bandwidth,
    Bucket,
    BucketConfiguration,
    CountingListener,
    Expiration,
    InvalidArgumentError,
    InvalidConfigurationError,
    Lost,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    RateLimitError,
    Recovery,
    StoreError,
    TokensInheritance,
)
from ratelimit.core.token_bucket import codec
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, SwappingMemoryStore
from tests.support.both_faces import Settled, settled
from tests.support.inside import pipeline_of
from tests.support.reservations import entered

NOW = 1_700_000_000 * 10**9


def test_the_first_lines_of_a_user() -> None:
    with ProxyManager.from_url("memory://", "3/minute") as manager:
        assert [manager.try_consume("user:42") for _ in range(4)] == [True, True, True, False]


async def test_the_first_lines_of_an_asyncio_user() -> None:
    async with AsyncProxyManager.from_url("memory://", "3/minute") as manager:
        assert [await manager.try_consume("user:42") for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("limits", [["3/hour", "2/minute"], ("3/hour", Bandwidth.greedy(2, 60)), "3/hour\n2/minute,"])
@pytest.mark.parametrize("face", [ProxyManager, AsyncProxyManager])
async def test_a_list_of_limits_is_taken_wherever_limits_are(face: Any, limits: Any) -> None:
    several = BucketConfiguration.parse("3/hour; 2/minute")
    for manager in (face.from_url("memory://", limits), face.from_url("memory://", lambda _: limits)):
        assert await settled(manager.try_consume("key"))
        assert await settled(manager.configuration("key")) == several
    bucket = face.from_url("memory://", "9/day").bucket("key", limits)
    assert await settled(bucket.try_consume())
    assert (await settled(bucket.snapshot())).configuration == several
    manager = face.from_url("memory://", "9/day")
    assert await settled(manager.try_consume("key"))
    await settled(manager.replace_configuration("key", limits, TokensInheritance.AS_IS))
    assert await settled(manager.configuration("key")) == several


VERBS: dict[str, tuple[Any, ...]] = {
    "try_consume": (),
    "try_consume_and_return_remaining": (),
    "try_consume_as_much_as_possible": (),
    "consume_ignoring_rate_limits": (1,),
    "consume": (),
    "estimate_ability_to_consume": (1,),
    "available_tokens": (),
    "add_tokens": (1,),
    "force_add_tokens": (1,),
    "give_back": (1,),
    "hold_back": (0.5,),
    "reset": (),
    "replace_configuration": ("5/second", TokensInheritance.AS_IS),
    "snapshot": (),
}


EVERY_DAY = {
    *("try_consume", "try_consume_and_return_remaining", "try_consume_as_much_as_possible", "consume"),
    "available_tokens",
    *("reset", "replace_configuration", "snapshot"),
}
"""The verbs that a manager has as well."""


@pytest.mark.parametrize("face", ["sync", "asyncio"])
def test_a_manager_has_the_verbs_of_every_day(face: str) -> None:
    manager = ProxyManager if face == "sync" else AsyncProxyManager
    assert callable(manager.reserve)
    assert {verb for verb in VERBS if hasattr(manager, verb)} == EVERY_DAY


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("face", ["sync", "asyncio"])
async def test_every_verb_is_on_the_bucket_and_its_verbose_form(verb: str, face: str) -> None:
    def manager() -> Any:
        clock = ManualClock(NOW)
        if face == "sync":
            return ProxyManager(MemoryStore(), "5/minute", clock=clock)
        return AsyncProxyManager(AsyncMemoryStore(), "5/minute", clock=clock)

    plain = await settled(getattr(manager().bucket("key"), verb)(*VERBS[verb]))
    if verb in EVERY_DAY:
        assert await settled(getattr(manager(), verb)("key", *VERBS[verb])) == plain
    verbose = await settled(getattr(manager().bucket("key").verbose, verb)(*VERBS[verb]))
    assert verbose.value == plain
    assert verbose.operation_time_nanos == NOW
    assert verbose.available_tokens == min(verbose.available_tokens_per_bandwidth)


@pytest.mark.parametrize("tokens", [0, -1, 1.0, "1", True, [1], 2**63])
@pytest.mark.parametrize("verb", [name for name, given in VERBS.items() if given == (1,) or "consume" in name])
def test_a_number_of_tokens_is_an_int_of_one_or_more(verb: str, tokens: Any) -> None:
    manager = ProxyManager(MemoryStore(), "5/minute")
    with pytest.raises(InvalidArgumentError, match="must be an int from 1"):
        getattr(manager.bucket("key"), verb)(tokens)
    assert manager.configuration("key") is None


async def test_more_than_the_capacity_is_refused_for_ever() -> None:
    manager = ProxyManager(MemoryStore(), "5/minute")
    probe = manager.try_consume_and_return_remaining("key", 6)
    assert not probe
    assert (probe.nanos_to_wait_for_refill, probe.retry_after) == (2**63 - 1, None)
    assert manager.bucket("key").estimate_ability_to_consume(6).retry_after is None


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("user:42", b"user:42"),
        ("schlüssel", "schlüssel".encode()),
        (b"\xff\0", b"\xff\0"),
        ("", b""),
        ("a\nb\0", b"a\nb\0"),
    ],
)
def test_a_key_is_stored_under_its_bytes_after_the_prefix(key: str | bytes, stored: bytes) -> None:
    store = MemoryStore()
    assert ProxyManager(store, "5/minute").try_consume(key)
    assert store.get(stored) is not None
    for prefix in ("rl:", b"rl:"):
        manager = ProxyManager(store, "5/minute", prefix=prefix)
        manager.try_consume(key)
        assert manager.bucket(key).key == key
    data = store.get(b"rl:" + stored)
    assert data is not None
    assert codec.decode(data).consumed_tokens == 2


@pytest.mark.parametrize("key", [None, 5, ["key"], "\ud800", bytearray(b"key")])
def test_what_is_no_key_is_refused(key: Any) -> None:
    manager = ProxyManager(MemoryStore(), "5/minute")
    for use in (manager.bucket, manager.try_consume, manager.configuration, manager.remove):
        with pytest.raises(InvalidArgumentError, match="key"):
            use(key)


@pytest.mark.parametrize("face", [ProxyManager, AsyncProxyManager])
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"configuration": 5}, InvalidConfigurationError),
        ({"configuration": "5/fortnight"}, InvalidConfigurationError),
        ({"configuration_version": "1"}, InvalidArgumentError),
        ({"configuration_version": True}, InvalidArgumentError),
        ({"configuration_version": 2**63}, InvalidArgumentError),
        ({"inheritance": "RESET"}, InvalidArgumentError),
        ({"recovery": "raise"}, InvalidArgumentError),
        ({"expiration": 5}, InvalidArgumentError),
        ({"prefix": 5}, InvalidArgumentError),
        ({"max_attempts": 0}, InvalidArgumentError),
        ({"max_attempts": True}, InvalidArgumentError),
        ({"clock": 5}, InvalidArgumentError),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(
    face: Any, settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        face.from_url("memory://", **settings)


@pytest.mark.parametrize(
    ("face", "store", "words"),
    [
        (ProxyManager, None, r"store must be a store such as RedisStore\(client\); got None"),
        (ProxyManager, {}, r"got \{\}"),
        (ProxyManager, AsyncMemoryStore(), "such as RedisStore.*got AsyncMemoryStore"),
        (AsyncProxyManager, MemoryStore(), "asyncio store.*got MemoryStore"),
    ],
)
def test_what_is_no_store_of_the_face_is_refused(face: Any, store: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        face(store, "5/minute")


def test_a_bucket_needs_a_configuration_from_somewhere() -> None:
    manager = ProxyManager(MemoryStore())
    with pytest.raises(InvalidConfigurationError, match="neither the manager nor this bucket"):
        manager.try_consume("key")
    assert manager.bucket("key", "1/hour").try_consume()
    assert not manager.bucket("key", BucketConfiguration.parse("5/hour")).try_consume()
    assert manager.configuration("key") == BucketConfiguration.parse("1/hour")


def test_a_bandwidth_is_taken_for_a_configuration() -> None:
    assert ProxyManager(MemoryStore(), Bandwidth.greedy(1, 60)).try_consume("key")


async def test_an_async_callable_needs_the_asyncio_face() -> None:
    async def plan(_: str) -> str:
        return "1/hour"

    with pytest.warns(RuntimeWarning, match="never awaited"):  # noqa: PT031  # the coroutine goes with the error
        with pytest.raises(InvalidConfigurationError, match="coroutine"):
            ProxyManager(MemoryStore(), plan).try_consume("key")  # type: ignore[arg-type]
        gc.collect()


def test_a_bucket_may_have_settings_of_its_own() -> None:
    clock = ManualClock(NOW)
    store = MemoryStore(clock=clock)
    manager = ProxyManager(store, "5/minute", clock=clock)
    bucket = manager.bucket("key", expiration=Expiration.fixed(1), recovery=Recovery.RAISE, configuration_version=3)
    assert bucket.try_consume()
    assert bucket.snapshot().configuration_version == 3
    clock.advance(2)
    with pytest.raises(Exception, match="no bucket under the key 'key'"):
        bucket.try_consume()


def test_a_lower_version_is_replaced_and_a_higher_one_stays() -> None:
    clock, store = ManualClock(NOW), MemoryStore()

    def manager(limits: str, version: int | None) -> ProxyManager:
        return ProxyManager(
            store, limits, clock=clock, configuration_version=version, inheritance=TokensInheritance.AS_IS
        )

    assert manager("10/hour", None).try_consume("key", 4)
    assert manager("100/hour", 1).available_tokens("key") == 6
    assert manager("20/hour", 1).configuration("key") == BucketConfiguration.parse("100/hour")
    assert manager("20/hour", 2).try_consume("key")
    assert manager("20/hour", 1).try_consume("key")
    snapshot = manager("30/hour", None).snapshot("key")
    assert (str(snapshot.configuration), snapshot.configuration_version) == ("20/hour", 2)
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (4, 6)


def test_an_explicit_replacement_keeps_the_version() -> None:
    manager = ProxyManager(MemoryStore(), "10/hour", configuration_version=7)
    bucket = manager.bucket("key")
    bucket.try_consume(4)
    bucket.replace_configuration("100/hour", TokensInheritance.PROPORTIONALLY)
    snapshot = bucket.snapshot()
    assert (snapshot.available_tokens, snapshot.configuration_version) == (60, 7)
    with pytest.raises(InvalidConfigurationError):
        bucket.replace_configuration("100/sol", TokensInheritance.RESET)
    with pytest.raises(InvalidArgumentError):
        bucket.replace_configuration("100/hour", "RESET")  # type: ignore[arg-type]


def test_a_store_of_the_callers_is_not_closed() -> None:
    class Closing(MemoryStore):
        closed = False

        def close(self) -> None:
            self.closed = True

    store = Closing()
    with ProxyManager(store, "5/minute") as manager:
        manager.try_consume("key")
    assert not store.closed


def public(thing: object) -> set[str]:
    return {name for name in dir(type(thing)) if not name.startswith("_")}


@pytest.mark.parametrize("limits", ["5/minute", lambda _: None], ids=["limited", "not limited"])
@pytest.mark.parametrize("on_error", [OnError.RAISE, OnError.ALLOW, OnError.local(1)], ids=str)
@pytest.mark.parametrize("store", [MemoryStore, AsyncMemoryStore, SwappingMemoryStore, AsyncSwappingMemoryStore])
async def test_a_closed_manager_says_so(store: Any, on_error: OnError, limits: Any) -> None:
    opened = store()
    make: Any = AsyncProxyManager if iscoroutinefunction(store.swap) else ProxyManager
    manager = make(opened, limits, on_error=on_error, listener=CountingListener())
    bucket = manager.bucket("key")
    assert public(bucket) - {"key", "verbose"} == VERBS.keys() | {"reserve", "sync"}
    assert public(bucket.verbose) - {"key"} <= VERBS.keys()
    assert await settled(bucket.try_consume())
    for _ in range(2):
        await settled(manager.aclose() if make is AsyncProxyManager else manager.close())
    refused = pytest.raises(RateLimitError, match="the manager is closed")
    for verb, arguments in {**VERBS, "sync": ()}.items():
        for owner in (bucket, manager.bucket("new"), bucket.verbose):
            if hasattr(owner, verb):
                with refused as caught:
                    await settled(getattr(owner, verb)(*arguments))
                assert not isinstance(caught.value, StoreError | ValueError)
        if verb in EVERY_DAY:
            with refused:
                await settled(getattr(manager, verb)("key", *arguments))
    for owner in (bucket, manager.bucket("new")):
        with refused:
            async with entered(owner.reserve(1)):
                pytest.fail("the block was entered")
    for verb in ("remove", "configuration"):
        with refused:
            await settled(getattr(manager, verb)("key"))
    assert await settled(make(opened, "5/minute").try_consume("key"))


async def test_a_call_that_is_under_way_goes_on_when_its_manager_is_closed() -> None:
    class SlowStore(AsyncSwappingMemoryStore):
        async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
            await asyncio.sleep(0.01)
            return await super().swap(key, before, after, ttl_millis)

    manager = AsyncProxyManager(SlowStore(), "5/minute")
    calls = [asyncio.create_task(manager.try_consume("key")) for _ in range(7)]
    await asyncio.sleep(0)
    await manager.aclose()
    assert (await asyncio.gather(*calls)).count(True) == 5


@pytest.mark.redis
@pytest.mark.parametrize("make", [ProxyManager, AsyncProxyManager])
async def test_a_store_of_a_url_serves_other_managers_after_closing(redis_url: str, make: Any) -> None:
    first = make.from_url(redis_url, "5/minute")
    other = make(first.store, "5/minute")
    close = "aclose" if make is AsyncProxyManager else "close"
    assert await settled(first.try_consume("key"))
    assert await settled(other.try_consume("key"))
    await settled(getattr(other, close)())
    assert await settled(first.try_consume("key"))
    another = make(first.store, "5/minute")
    await settled(getattr(first, close)())
    assert await settled(another.try_consume("key"))
    assert await settled(another.available_tokens("key")) == 1
    await settled(getattr(another.store, close)())


@pytest.mark.parametrize("face", ["sync", "asyncio"])
def test_handles_are_of_their_face_and_made_without_await(face: str) -> None:
    if face == "sync":
        assert isinstance(ProxyManager(MemoryStore(), "5/minute").bucket("key"), Bucket)
    else:
        assert isinstance(AsyncProxyManager(AsyncMemoryStore(), "5/minute").bucket("key"), AsyncBucket)


async def test_tasks_and_threads_share_a_store_in_memory_exactly() -> None:
    store = MemoryStore()
    amanager = AsyncProxyManager(AsyncMemoryStore(store), "1000/day intervally")
    manager = ProxyManager(store, "1000/day intervally")
    tasks = [amanager.try_consume("key") for _ in range(800)]
    threads = [asyncio.to_thread(manager.try_consume, "key") for _ in range(800)]
    answers = await asyncio.gather(*tasks, *threads)
    assert answers.count(True) == 1000


def test_handles_say_whose_they_are() -> None:
    assert repr(ProxyManager(MemoryStore(), "5/minute").bucket("user:42")) == "Bucket('user:42')"
    assert len(repr(AsyncProxyManager(AsyncMemoryStore(), "5/minute").bucket(b"k" * 10**6))) < 200


async def test_probes_offer_seconds() -> None:
    clock = ManualClock(NOW)
    face = Settled(ProxyManager(MemoryStore(), "3/second", clock=clock))
    await face.try_consume("key", 3)
    probe = await face.try_consume_and_return_remaining("key")
    assert probe.nanos_to_wait_for_refill == 333_333_333
    assert probe.retry_after == 0.333334
    assert probe.reset_after == 1.0
    clock.advance(probe.retry_after)
    assert await face.try_consume("key")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merging": False},
        {"listener": CountingListener()},
        {"on_error": OnError.local(1)},
        {"optimization": Optimization.delaying(5, 60)},
        {"listener": CountingListener(), "on_error": OnError.ALLOW, "clock": ManualClock(NOW)},
    ],
    ids=lambda settings: " ".join(settings) or "no settings",
)
@pytest.mark.parametrize("store", [MemoryStore, SwappingMemoryStore])
def test_a_dropped_manager_is_gone_at_once(store: Any, settings: dict[str, Any]) -> None:
    """Its connections go back at once, and not when the garbage collector comes by."""
    manager = ProxyManager(store(), "5/minute", **settings)
    assert manager.try_consume("key")
    assert manager.consume("key")
    inside: list[Any] = [ref(pipeline_of(manager)), ref(manager)]
    gc.disable()
    try:
        del manager
        assert [reference() for reference in inside] == [None, None]
    finally:
        gc.enable()
