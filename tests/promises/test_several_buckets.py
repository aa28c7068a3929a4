"""Several buckets in one decision over Redis: what it costs, and that the ledger of every bucket is exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from ratelimit import (
    AsyncProxyManager,
    BucketConfiguration,
    CorruptStateError,
    ProxyManager,
    StoreError,
    StoreUnavailableError,
    all_of,
)
from ratelimit.core.token_bucket import codec
from ratelimit.stores.redis.scripts import load
from ratelimit.stores.redis.server_time import FIRST_REPLIES
from tests.support import several_load
from tests.support.both_faces import Face, Settled, closing
from tests.support.decision_paths import By, Way, deciding_by
from tests.support.permissions import ACL_COMMANDS, allow, limited_url
from tests.support.proxies import Proxy
from tests.support.redis_monitor import monitored
from tests.support.servers import RedisServer
from tests.support.several_load import Books, books_of
from tests.support.verbs import PREFIX
from tests.support.workers import PROCESSES, Workers

pytestmark = pytest.mark.redis

SWAP_ALL, DECIDE_ALL = load("compare_and_swap_all"), load("decide_all")
SWAP, DECISION = "swap_all", "decide_all"
SCRIPTS = {
    SWAP_ALL.sha.encode(): SWAP,
    SWAP_ALL.text: SWAP,
    DECIDE_ALL.sha.encode(): DECISION,
    DECIDE_ALL.text: DECISION,
}


class Buckets:
    """Managers of users and tenants over one store of Redis."""

    def __init__(self, face: Face, manager: Any, **settings: Any) -> None:
        self.tenants = manager
        self.users: Any = face(manager.store, "20/day", prefix="user:", **settings)

    def both(self, user: str = "1", tokens: int = 1) -> Settled:
        parts = self.users.bucket(f"{{acme}}:{user}"), (self.tenants.bucket("{acme}"), tokens)
        return Settled(all_of(*parts))


@pytest.fixture
async def buckets(face: Face, redis_url: str) -> AsyncGenerator[Buckets]:
    """Managers that are in use: connected, their scripts known to the server, and the server's time to them."""
    async with closing(face.from_url(redis_url, "30/day", prefix="tenant:")) as manager:
        made = Buckets(face, manager)
        for number in range(max(4, FIRST_REPLIES)):
            await made.both(f"warm up {number}").try_consume()
            await made.both(f"warm up {number}").try_consume()
        await Settled(manager).remove("{acme}")
        yield made


@pytest.fixture
def other(redis_url: str) -> Generator[Buckets]:
    """Another process, as it were."""
    with ProxyManager.from_url(redis_url, "30/day", prefix="tenant:") as manager:
        yield Buckets(ProxyManager, manager)


@pytest.fixture
def sent(buckets: Buckets) -> Callable[[], list[str]]:
    """What the managers have sent since the last call, one name for each round trip."""
    channel = buckets.tenants.store._channel
    send, names = channel.send, list[str]()

    def sending(key: bytes, commands: Any, deadline: float | None = None) -> Any:
        command = commands[-1]
        names.append(SCRIPTS.get(command[1]) or command[0].decode())
        return send(key, commands, deadline)

    channel.send = sending

    def taken() -> list[str]:
        found, names[:] = list(names), []
        return found

    return taken


def consumed(url: str) -> dict[str, int]:
    with redis.Redis.from_url(url) as client:
        keys: Any = client.keys("*")
        found = {key.decode(): client.get(key) for key in keys}
    return {key: codec.decode(data).consumed_tokens for key, data in found.items() if isinstance(data, bytes)}


# Round trips


async def test_buckets_that_nobody_has_used_cost_one(buckets: Buckets, sent: Callable[[], list[str]]) -> None:
    assert await buckets.both().try_consume()
    assert sent() == [DECISION]


async def test_buckets_that_only_this_process_uses_cost_one(buckets: Buckets, sent: Callable[[], list[str]]) -> None:
    limit = buckets.both()
    await limit.try_consume()
    sent()
    for _ in range(3):
        assert await limit.try_consume()
        assert sent() == [SWAP]
    # A user of whom nothing is known.
    assert await buckets.both("2").try_consume()
    assert sent() == [DECISION]
    assert await buckets.both("2").try_consume()
    assert sent() == [SWAP]


async def test_a_refusal_costs_one_and_charges_nothing(
    buckets: Buckets, sent: Callable[[], list[str]], redis_url: str
) -> None:
    assert await buckets.both(tokens=29).try_consume()
    sent()
    before = consumed(redis_url)
    for _ in range(3):
        probe = await buckets.both(tokens=2).try_consume_and_return_remaining()
        assert probe.refused_by == ("{acme}",)
        assert [part.remaining_tokens for part in probe.parts] == [19, 1]
        assert sent() == [SWAP]  # which only compares
    assert consumed(redis_url) == before


async def test_a_bucket_that_another_process_has_changed_costs_two(
    buckets: Buckets, other: Buckets, sent: Callable[[], list[str]], redis_url: str
) -> None:
    await buckets.both().try_consume()
    assert await other.both("2").try_consume()
    sent()
    assert await buckets.both().try_consume()
    assert sent() == [SWAP, DECISION]
    assert consumed(redis_url)["tenant:{acme}"] == 3


async def test_a_bucket_that_another_process_keeps_changing_costs_one(
    buckets: Buckets, other: Buckets, sent: Callable[[], list[str]]
) -> None:
    await buckets.both().try_consume()
    for number in range(8):
        assert await other.both("2").try_consume()
        sent()
        assert await buckets.both().try_consume()
        assert sent() == ([DECISION] if number else [SWAP, DECISION])


async def test_a_refusal_by_what_was_remembered_is_never_told(
    buckets: Buckets, other: Buckets, sent: Callable[[], list[str]]
) -> None:
    assert await buckets.both(tokens=30).try_consume()
    await Settled(other.tenants.bucket("{acme}")).add_tokens(30)
    sent()
    assert await buckets.both().try_consume()
    assert sent()[:2] == [SWAP, SWAP]


async def test_reading_costs_one(buckets: Buckets, sent: Callable[[], list[str]]) -> None:
    limit = buckets.both()
    await limit.try_consume()
    sent()
    assert await limit.estimate_ability_to_consume()
    assert [one.consumed_tokens for one in await limit.snapshot()] == [1, 1]
    assert sent() == [SWAP] * 2


async def test_what_the_script_cannot_decide_is_swapped(
    buckets: Buckets, other: Buckets, sent: Callable[[], list[str]], face: Face
) -> None:
    quotas: Any = face(buckets.tenants.store, "7/hour intervally id quota", prefix="quota:")
    limit = Settled(all_of(quotas.bucket("{acme}"), buckets.tenants.bucket("{acme}")))
    assert await limit.try_consume()
    assert sent() == [DECISION, SWAP]
    assert await limit.try_consume()
    assert sent() == [SWAP]
    await other.both("2").try_consume()
    assert await limit.try_consume()
    assert sent() == [SWAP, DECISION, SWAP]
    assert [one.consumed_tokens for one in await limit.snapshot()] == [3, 4]


async def test_a_server_that_forgot_its_scripts_is_taught_them_again(
    buckets: Buckets, sent: Callable[[], list[str]], redis_url: str
) -> None:
    await buckets.both().try_consume()
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    sent()
    assert await buckets.both().try_consume()
    assert sent() == [SWAP, SWAP]
    assert await buckets.both("3").try_consume()
    assert sent() == [DECISION]


@pytest.mark.parametrize("by", By)
async def test_either_way_charges_all_or_none(face: Face, redis_url: str, by: By) -> None:
    with deciding_by(by):
        async with closing(face.from_url(redis_url, "3/day; 100/week", prefix="tenant:")) as manager:
            limit = Buckets(face, manager).both()
            probes = [await limit.try_consume_and_return_remaining() for _ in range(5)]
    assert [probe.consumed for probe in probes] == [True] * 3 + [False] * 2
    assert [[part.remaining_tokens for part in probe.parts] for probe in probes[2:]] == [[17, 0]] * 3
    assert consumed(redis_url) == {"user:{acme}:1": 3, "tenant:{acme}": 3}


async def test_a_user_with_the_least_permissions_can_do_everything(
    face: Face, server: RedisServer, admin: redis.Redis
) -> None:
    allow(admin, *ACL_COMMANDS)
    async with closing(face.from_url(limited_url(server), "5/day", prefix=PREFIX)) as manager:
        buckets: list[Any] = [manager.bucket(f"{{tag}}{number}") for number in range(3)]
        limit: Any = Settled(all_of(*buckets))
        for _ in range(3):
            assert await limit.try_consume()
        await limit.give_back()
        assert await limit.estimate_ability_to_consume()
        assert await limit.consume(max_wait=0)
        assert [one.consumed_tokens for one in await limit.snapshot()] == [3] * 3


# Foreign values


async def test_a_value_of_another_type_is_an_error_and_nothing_is_charged(buckets: Buckets, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.rpush("tenant:{acme}", "one")
        with pytest.raises(StoreError, match="another type") as caught:
            await buckets.both().try_consume()
        assert not caught.value.in_doubt
        assert client.get("user:{acme}:1") is None


@pytest.mark.parametrize("value", [b"", b"garbage"])
async def test_foreign_bytes_are_an_error_and_nothing_is_charged(
    buckets: Buckets, redis_url: str, value: bytes
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("tenant:{acme}", value)
        for _ in range(2):
            with pytest.raises(CorruptStateError) as caught:
                await buckets.both().try_consume()
            assert caught.value.key == "{acme}"
            assert client.get("user:{acme}:1") is None
            assert client.get("tenant:{acme}") == value


# Lost replies


@pytest.fixture
def proxy(redis_url: str) -> Generator[Proxy]:
    with Proxy(urlsplit(redis_url).port or 6379) as proxy:
        yield proxy


@pytest.fixture
async def behind(face: Face, proxy: Proxy) -> AsyncGenerator[Buckets]:
    """Managers whose requests go through the proxy."""
    async with closing(face.from_url(f"redis://127.0.0.1:{proxy.port}/0", "30/day", prefix="tenant:")) as manager:
        yield Buckets(face, manager)


losses = pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])


@losses
async def test_a_swap_whose_reply_or_request_is_lost_is_charged_once(
    behind: Buckets, proxy: Proxy, redis_url: str, loss: str
) -> None:
    limit = behind.both()
    await limit.try_consume()
    for number in range(2, 6):
        setattr(proxy, loss, 1)
        assert await limit.try_consume()
        assert proxy.lost == number - 1
        assert consumed(redis_url) == {"user:{acme}:1": number, "tenant:{acme}": number}


@losses
async def test_where_others_have_changed_one_bucket_since_another_one_shows_what_has_happened(
    behind: Buckets, other: Buckets, proxy: Proxy, redis_url: str, loss: str
) -> None:
    limit = behind.both()
    await limit.try_consume()
    proxy.after_loss = lambda: other.tenants.try_consume("{acme}")
    setattr(proxy, loss, 1)
    assert await limit.try_consume()
    assert proxy.lost == 1
    assert consumed(redis_url) == {"user:{acme}:1": 2, "tenant:{acme}": 3}


async def test_where_others_have_changed_all_buckets_it_is_in_doubt(
    behind: Buckets, other: Buckets, proxy: Proxy, redis_url: str
) -> None:
    limit, others = behind.both(), other.both()
    await limit.try_consume()
    proxy.after_loss = others.face.try_consume
    proxy.lose_replies = 1
    with pytest.raises(StoreUnavailableError, match="while others were changing the buckets") as caught:
        await limit.try_consume()
    assert caught.value.in_doubt
    assert consumed(redis_url) == {"user:{acme}:1": 3, "tenant:{acme}": 3}
    assert await limit.try_consume()


@losses
async def test_a_lost_decision_of_the_server_is_in_doubt_and_not_repeated(
    behind: Buckets, proxy: Proxy, redis_url: str, loss: str
) -> None:
    assert await behind.both("0").try_consume()
    setattr(proxy, loss, 1)
    with pytest.raises(StoreUnavailableError, match="may have been carried out") as caught:
        await behind.both().try_consume()
    assert caught.value.in_doubt
    assert consumed(redis_url).get("user:{acme}:1", 0) == (loss == "lose_replies")


async def test_two_losses_in_a_row_are_in_doubt(behind: Buckets, proxy: Proxy, redis_url: str) -> None:
    limit = behind.both()
    await limit.try_consume()
    proxy.lose_replies = 2
    with pytest.raises(StoreUnavailableError) as caught:
        await limit.try_consume()
    assert caught.value.in_doubt
    assert consumed(redis_url) == {"user:{acme}:1": 2, "tenant:{acme}": 2}


async def test_a_lost_look_is_an_error_without_doubt(behind: Buckets, proxy: Proxy, redis_url: str) -> None:
    limit = behind.both(tokens=30)
    await limit.try_consume()
    for call in (limit.try_consume, limit.snapshot, limit.estimate_ability_to_consume):
        proxy.lose_replies = 1
        with pytest.raises(StoreUnavailableError) as caught:
            await call()
        assert not caught.value.in_doubt
    assert consumed(redis_url) == {"user:{acme}:1": 1, "tenant:{acme}": 30}


# Many processes


def check_ledger(books: Books, url: str) -> None:
    stored = consumed(url)
    for key in stored.keys() | books.admitted.keys():
        low = books.admitted[key]
        assert low <= stored.get(key, 0) <= low + books.in_doubt[key], (key, stored.get(key), books)


WAYS = [Way(), Way(merging=False), Way(By.SWAPS), Way(By.SCRIPT)]
PLENTY = ("1000000/day", "1000000/day", "1000000/day")
SCARCE = ("300/day", "40/day", "150/day")


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("workers", WAYS, indirect=True, ids=str)
def test_the_ledger_of_every_bucket_is_exact(
    workers: Workers, url: str, redis_url: str, limits: tuple[str, str, str]
) -> None:
    books = books_of(workers.do(several_load.by_both, url, limits, 25, 0.0))
    print(books.decisions, "decisions,", books.refused, "refused, trips", dict(books.round_trips))
    assert books.decisions == PROCESSES * 4 * 25
    assert not books.in_doubt
    stored = consumed(redis_url)
    assert {key: count for key, count in stored.items() if count} == dict(books.admitted)
    if limits is SCARCE:
        for key, count in stored.items():
            limit = BucketConfiguration.parse(limits[["tenant", "user", "route"].index(key.split(":")[0])])
            assert count <= limit.bandwidths[0].capacity + 1
    elif workers.way == Way(merging=False):
        assert max(books.round_trips) <= 3


def test_the_ledger_of_every_bucket_is_exact_where_replies_are_lost(workers: Workers, url: str, redis_url: str) -> None:
    books = books_of(workers.do(several_load.by_both, url, PLENTY, 25, 0.05))
    print(books.decisions, "decisions, admitted", books.admitted["tenant:{acme}"], "in doubt", dict(books.in_doubt))
    check_ledger(books, redis_url)


# Calls that go together


async def test_tasks_of_a_hot_tenant_go_together(redis_url: str) -> None:
    async with AsyncProxyManager.from_url(redis_url, "1000/day", prefix="tenant:") as manager:
        buckets = Buckets(AsyncProxyManager, manager)
        await buckets.both("warm").try_consume()
        with monitored(redis_url) as monitor:
            answers = await asyncio.gather(*(buckets.both(str(number)).try_consume() for number in range(40)))
            scripts = [command for command in monitor.sent() if command in ("EVAL", "EVALSHA")]
        assert answers == [True] * 40
        # The first one alone, and then all others.
        assert len(scripts) == 2
    assert consumed(redis_url)["tenant:{acme}"] == 41


async def test_what_is_wrong_with_one_bucket_is_an_error_of_those_alone_that_ask_for_it(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("user:{acme}:3", b"garbage")
        client.rpush("user:{acme}:5", "one")
    async with AsyncProxyManager.from_url(redis_url, "1000/day", prefix="tenant:") as manager:
        buckets = Buckets(AsyncProxyManager, manager)
        calls = [buckets.both(str(number)).try_consume() for number in range(8)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [answer is True for answer in answers] == [number not in (3, 5) for number in range(8)]
    assert isinstance(answers[3], CorruptStateError)
    assert answers[3].key == "{acme}:3"
    assert isinstance(answers[5], StoreError)
    assert consumed_of_tenant(redis_url) == 6


def consumed_of_tenant(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        data = client.get("tenant:{acme}")
    assert isinstance(data, bytes)
    return codec.decode(data).consumed_tokens
