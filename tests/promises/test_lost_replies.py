"""Replies and requests lost on the wire to a real Redis: nothing is charged twice, whatever redis-py repeats."""

from __future__ import annotations

import asyncio
import random
import re
import struct
import threading
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from ratelimit import AsyncProxyManager, AsyncRedisStore, ProxyManager, RedisStore, StoreUnavailableError
from ratelimit.stores.operations import Operation
from ratelimit.stores.redis.scripts import load
from tests.support.both_faces import Settled
from tests.support.decision_paths import By, deciding_by
from tests.support.proxies import Proxy
from tests.support.redis_monitor import monitored
from tests.support.servers import RedisServer

pytestmark = pytest.mark.redis

LIMITS = "100/day"


@pytest.fixture
async def proxy(redis_url: str) -> AsyncGenerator[Proxy]:
    with Proxy(urlsplit(redis_url).port or 6379) as proxy:
        yield proxy


@pytest.fixture(params=["url", "url asyncio", "client that retries", "asyncio client that retries"])
async def face(request: pytest.FixtureRequest, proxy: Proxy) -> AsyncGenerator[Settled]:
    url = f"redis://127.0.0.1:{proxy.port}/0"
    backoff = ExponentialBackoff(base=0.001, cap=0.01)
    match request.param:
        case "url":
            with ProxyManager.from_url(url, LIMITS) as manager:
                yield Settled(manager)
        case "url asyncio":
            async with AsyncProxyManager.from_url(url, LIMITS) as amanager:
                yield Settled(amanager)
        case "client that retries":
            with redis.Redis.from_url(url, retry=Retry(backoff, 3), retry_on_error=[redis.ConnectionError]) as client:
                yield Settled(ProxyManager(RedisStore(client), LIMITS))
        case "asyncio client that retries":
            aretry = redis.asyncio.retry.Retry(backoff, 3)
            async with redis.asyncio.Redis.from_url(
                url, retry=aretry, retry_on_error=[redis.ConnectionError]
            ) as aclient:
                yield Settled(AsyncProxyManager(AsyncRedisStore(aclient), LIMITS))


@pytest.fixture
def witness(redis_url: str) -> Generator[ProxyManager]:
    """Another process, as it were, whose connection is sound."""
    with ProxyManager.from_url(redis_url, LIMITS) as manager:
        yield manager


def consumed(witness: ProxyManager, key: str = "key") -> int:
    return witness.bucket(key).snapshot().consumed_tokens


async def test_a_client_left_to_itself_does_charge_twice(proxy: Proxy) -> None:
    """The fault that is guarded against: the proxy and redis-py together do produce it."""
    retry = Retry(ExponentialBackoff(base=0.001, cap=0.01), 3)
    with redis.Redis(port=proxy.port, retry=retry, retry_on_error=[redis.ConnectionError]) as client:
        client.set("counter", 0)
        proxy.about = b"INCR"
        proxy.lose_replies = 1
        client.incr("counter")
        assert client.get("counter") == b"2"


@pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])
async def test_a_swap_whose_reply_or_request_is_lost_is_charged_once(
    face: Settled, proxy: Proxy, witness: ProxyManager, loss: str
) -> None:
    for number in range(1, 6):
        assert await face.try_consume("key")
        setattr(proxy, loss, 1)
        assert await face.try_consume("key")
        assert proxy.lost == number
        assert consumed(witness) == 2 * number


async def test_a_creation_whose_reply_is_lost_is_charged_once(
    face: Settled, proxy: Proxy, witness: ProxyManager
) -> None:
    await face.try_consume("warm up")
    proxy.lose_replies = 1
    assert await face.try_consume("key", 7)
    assert proxy.lost == 1
    assert consumed(witness) == 7


async def test_two_losses_in_a_row_are_an_error_that_says_what_is_in_doubt(
    face: Settled, proxy: Proxy, witness: ProxyManager
) -> None:
    assert await face.try_consume("key")
    proxy.lose_replies = 2
    with pytest.raises(StoreUnavailableError) as caught:
        await face.try_consume("key")
    assert proxy.lost == 2
    assert caught.value.in_doubt
    assert isinstance(caught.value.__cause__, redis.RedisError)
    assert consumed(witness) == 2
    assert await face.try_consume("key")
    assert consumed(witness) == 3


async def test_answers_stay_matched_to_their_questions_after_losses(face: Settled, proxy: Proxy) -> None:
    for number in range(20):
        assert await face.try_consume(f"key {number}", number + 1)
        proxy.lose_replies = number % 2
        assert await face.try_consume(f"key {number}")
        proxy.lose_replies = 0
        assert await face.available_tokens(f"key {number}") == 100 - number - 2


async def test_a_read_whose_reply_is_lost_is_an_error_without_doubt_about_tokens(
    face: Settled, proxy: Proxy, witness: ProxyManager
) -> None:
    assert await face.try_consume("key")
    proxy.about = b"GETRANGE"
    proxy.lose_replies = 1
    with pytest.raises(StoreUnavailableError):
        await face.available_tokens("key")
    assert await face.available_tokens("key") == 99
    assert consumed(witness) == 1


losses = pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])


@losses
async def test_a_lost_decision_is_in_doubt_and_not_repeated(
    face: Settled, proxy: Proxy, witness: ProxyManager, redis_url: str, loss: str
) -> None:
    proxy.about = load("decide").sha.encode()
    taken = 3 if loss == "lose_replies" else 0
    for number, verb in enumerate(("consume", "consume_ignoring_rate_limits"), start=1):
        with deciding_by(By.SCRIPT, face):
            for _ in range(2):
                assert await face.try_consume(verb)
            with monitored(redis_url) as monitor:
                setattr(proxy, loss, 1)
                with pytest.raises(StoreUnavailableError, match="may have been carried out") as caught:
                    await getattr(face, verb)(verb, 3)
                sent = [command for command in monitor.sent() if command != "TIME"]
                assert sent == ["EVALSHA"] * (taken > 0)
            assert (proxy.lost, caught.value.key, caught.value.in_doubt) == (number, verb, True)
            assert isinstance(caught.value.__cause__, redis.RedisError)
            assert consumed(witness, verb) == 2 + taken
            assert await face.try_consume(verb)
            assert consumed(witness, verb) == 3 + taken


@losses
async def test_tokens_that_are_consumed_if_they_are_there_are_asked_for_again_and_taken_once(
    face: Settled, proxy: Proxy, witness: ProxyManager, redis_url: str, loss: str
) -> None:
    proxy.about = load("decide").sha.encode()
    with deciding_by(By.SCRIPT, face):
        for key in ("another key", "and another"):
            assert await face.try_consume(key)
        for number in range(10):
            key = f"key {number}"
            setattr(proxy, loss, 1)
            with monitored(redis_url) as monitor:
                if number % 2:
                    assert await face.try_consume(key, 3)
                else:
                    probe = await face.try_consume_and_return_remaining(key, 3)
                    assert (probe.consumed, probe.remaining_tokens) == (True, 97)
                sent = [command for command in monitor.sent() if command not in ("TIME", "GETRANGE")]
            assert sent == ["EVALSHA"] * (2 if loss == "lose_replies" else 1)
            assert consumed(witness, key) == 3
            assert not await face.try_consume(key, 98)
            setattr(proxy, loss, 1)
            assert not await face.try_consume(key, 98)
            assert consumed(witness, key) == 3
            proxy.lose_replies = proxy.lose_requests = 0


async def test_a_lost_decision_is_in_doubt_where_others_have_taken_tokens_since(
    face: Settled, proxy: Proxy, witness: ProxyManager
) -> None:
    proxy.about = load("decide").sha.encode()
    with deciding_by(By.SCRIPT, face):
        assert await face.try_consume("key")
        proxy.lose_replies = 1
        proxy.after_loss = lambda: witness.try_consume("key", 5)
        with pytest.raises(StoreUnavailableError, match="while others were changing") as caught:
            await face.try_consume("key", 3)
    assert caught.value.in_doubt
    assert consumed(witness) == 9


WRITERS, DECISIONS, SHARED = 3, 400, 30


def doubts_over_shared_keys(server: RedisServer, by: By, witness: ProxyManager) -> tuple[int, int]:
    """Let writers share keys while each loses a tenth of its replies; return how many it lost, and were in doubt."""
    books: dict[str, list[int]] = {f"{by.name} {number}": [0, 0] for number in range(SHARED)}
    lock = threading.Lock()

    def write(seed: int) -> int:
        chance = random.Random(seed)
        with Proxy(server.port) as proxy, deciding_by(by):
            with ProxyManager.from_url(f"redis://127.0.0.1:{proxy.port}/0", "1000000/day") as manager:
                for _ in range(DECISIONS):
                    key = chance.choice(list(books))
                    proxy.lose_replies = chance.random() < 0.1
                    try:
                        outcome = 0 if manager.try_consume(key) else None
                    except StoreUnavailableError as error:
                        outcome = 1 if error.in_doubt else None
                    if outcome is not None:
                        with lock:
                            books[key][outcome] += 1
            return proxy.lost

    with ThreadPoolExecutor(WRITERS) as threads:
        lost = sum(threads.map(write, range(WRITERS)))
    for key, (acknowledged, in_doubt) in books.items():
        assert acknowledged <= consumed(witness, key) <= acknowledged + in_doubt
    return lost, sum(in_doubt for _, in_doubt in books.values())


@pytest.mark.usefixtures("admin")  # which empties the server
def test_over_shared_keys_decisions_of_the_server_are_in_doubt_no_more_often_than_swaps(server: RedisServer) -> None:
    with ProxyManager.from_url(server.url, "1000000/day") as witness:
        lost_swaps, doubtful_swaps = doubts_over_shared_keys(server, By.SWAPS, witness)
        lost, doubtful = doubts_over_shared_keys(server, By.EITHER, witness)
    assert min(lost, lost_swaps) > WRITERS * DECISIONS / 20
    assert doubtful / lost <= doubtful_swaps / lost_swaps


@losses
async def test_merged_calls_are_asked_for_again_together(proxy: Proxy, witness: ProxyManager, loss: str) -> None:
    async with AsyncProxyManager.from_url(f"redis://127.0.0.1:{proxy.port}/0", LIMITS) as manager:
        with deciding_by(By.SCRIPT, manager):
            for key in ("key", "another"):
                assert await manager.try_consume(key)
            # Of the second five, 20 tokens each, four go together, and only three of them are admitted.
            for tokens, admitted in ((1, 5), (20, 4)):
                proxy.about = re.escape(struct.pack(">BIq", Operation.TRY_CONSUME, 4, tokens))
                setattr(proxy, loss, 1)
                answers = await asyncio.gather(*(manager.try_consume("key", tokens) for _ in range(5)))
                assert answers == [True] * admitted + [False] * (5 - admitted)
            assert proxy.lost == 2
    assert consumed(witness) == 86


async def test_all_merged_calls_learn_of_a_doubt(proxy: Proxy, witness: ProxyManager) -> None:
    proxy.about = load("decide").sha.encode()
    async with AsyncProxyManager.from_url(f"redis://127.0.0.1:{proxy.port}/0", LIMITS) as manager:
        with deciding_by(By.SCRIPT, manager):
            for _ in range(2):
                assert await manager.try_consume("key")
            proxy.lose_replies = 2  # of the first alone, and of the others together
            bucket = manager.bucket("key")
            calls = [bucket.consume_ignoring_rate_limits(1) for _ in range(5)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, StoreUnavailableError) and answer.in_doubt for answer in answers] == [True] * 5
    assert len(set(map(id, answers))) == 5
    assert consumed(witness) == 2 + 5
