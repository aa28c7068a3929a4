"""Java services with Bucket4j and Python services with this library on the same buckets."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Self

import pytest
import redis

from ratelimit import (
    Bandwidth,
    BucketConfiguration,
    Expiration,
    ProxyManager,
    RateLimitError,
    RedisStore,
    TokensInheritance,
)
from ratelimit.core.token_bucket import codec
from ratelimit.settings import SettingsByName
from ratelimit.testing import ManualClock
from tests.promises.interop.peer import JavaError, Peer
from tests.promises.test_concurrency import AGES, QUOTA, RATE, SMALL_QUOTA, both_faces, bound, every_way, few_ways
from tests.promises.test_traces import KEY, TRACES, Replay, as_due, each_category
from tests.support import vectors
from tests.support.decision_paths import By, deciding_by
from tests.support.servers import SharedServer, wait_until
from tests.support.workers import PATIENCE, Access, Workers, by_tasks, by_threads, consume_until_the_sign, redis_nanos

pytestmark = pytest.mark.redis

NOW = 1_700_000_000_000_000_000
SEVERAL = BucketConfiguration(
    Bandwidth.intervally(1000, AGES), Bandwidth.intervally(1500, 2 * AGES), Bandwidth.greedy(10_000, 2 * AGES, id="g")
)

by_either = pytest.mark.parametrize("writer", ["python", "java"])


@pytest.fixture(scope="module")
def peers(redis_server: SharedServer) -> Generator[list[Peer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Peer(redis_server.url)) for _ in range(2)]


@pytest.fixture
def peer(peers: list[Peer]) -> Peer:
    return peers[0]


@pytest.fixture
def access(url: str, request: pytest.FixtureRequest) -> Access:
    return Access(url, request.param)


def stored(client: redis.Redis, key: str) -> bytes:
    state = client.get(key)
    assert isinstance(state, bytes)
    return state


def consumed(client: redis.Redis, access: Access) -> int:
    """Count the tokens that were ever taken from the bucket, without touching it."""
    state = client.get(access.key)
    return codec.decode(state).consumed_tokens if isinstance(state, bytes) else 0


def wait_until_taken(client: redis.Redis, access: Access, tokens: int) -> None:
    wait_until(lambda: consumed(client, access) >= tokens, f"{tokens} are taken", PATIENCE)


class Hammers:
    """What Java takes until the end of the ``with`` block."""

    def __init__(self, peers: list[Peer], access: Access, **how: Any) -> None:
        self.taken = 0
        self._peers = peers
        for peer in peers:
            peer.ask("hammer", access.key, access.limits, threads=2, **how)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.taken = sum(sum(peer.ask("stop")) for peer in self._peers)


@every_way
@pytest.mark.parametrize(
    ("access", "by_callers"),
    [(QUOTA, by_threads), (SEVERAL, by_tasks)],
    ids=["one limit", "several limits"],
    indirect=["access"],
)
def test_what_both_take_is_exactly_what_there_is(
    workers: Workers, peers: list[Peer], client: redis.Redis, access: Access, by_callers: Callable[..., list[int]]
) -> None:
    limits = access.limits
    manager = ProxyManager(RedisStore(client), limits)
    # Each side first empties the bucket alone. Where both take at once, one of them may find nothing left.
    with Hammers(peers, access) as alone:
        wait_until_taken(client, access, 1000)
    with workers.doing(by_callers, (consume_until_the_sign, access)) as python:
        manager.bucket(access.key).add_tokens(100)
        wait_until_taken(client, access, 1100)
        total = 1100
        with Hammers(peers, access) as java:
            for i in range(10):
                total += 200
                if i % 2 == 0:
                    manager.bucket(access.key).add_tokens(200)
                else:
                    peers[0].ask("add_tokens", access.key, limits, tokens=200)
                wait_until_taken(client, access, total)
    assert alone.taken == 1000
    assert sum(python.answers) >= 100
    assert alone.taken + java.taken + sum(python.answers) == total == consumed(client, access)
    assert manager.available_tokens(access.key) == 0 == peers[0].ask("get_available_tokens", access.key, limits)


@few_ways
@both_faces
def test_a_missing_bucket_is_made_once(
    workers: Workers, peers: list[Peer], client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, SMALL_QUOTA)
    lives: list[int] = []
    with workers.doing(by_callers, (consume_until_the_sign, access)) as python, Hammers(peers, access) as java:
        while len(lives) < 50:
            state = client.getdel(access.key)
            if isinstance(state, bytes):
                lives.append(codec.decode(state).consumed_tokens)
    lives.append(consumed(client, access))
    assert java.taken + sum(python.answers) == sum(lives)
    assert max(lives) <= 20


@few_ways
@both_faces
def test_a_bucket_that_refills_admits_no_more_than_its_bound(
    workers: Workers, peers: list[Peer], client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, RATE)
    begin = redis_nanos(client)
    with workers.doing(by_callers, (consume_until_the_sign, access)) as python, Hammers(peers, access) as java:
        wait_until_taken(client, access, 200)  # the capacity, and as much again and again
    nanos = redis_nanos(client) - begin
    assert 200 <= java.taken + sum(python.answers) == consumed(client, access) <= bound(RATE, nanos)


@few_ways
@pytest.mark.parametrize("newer", ["java", "python"])
def test_a_newer_configuration_replaces_the_older_under_load(
    workers: Workers, peers: list[Peer], client: redis.Redis, url: str, newer: str
) -> None:
    wanted = BucketConfiguration(Bandwidth.intervally(3000, 2 * AGES))
    limits = {1: QUOTA, 2: wanted}
    in_java, in_python = (2, 1) if newer == "java" else (1, 2)
    settings: SettingsByName = {"configuration_version": in_python, "inheritance": TokensInheritance.AS_IS}
    access = Access(url, limits[in_python], settings=settings)
    # The older limits make the bucket: the newer ones would begin with more.
    ProxyManager(RedisStore(client), QUOTA, configuration_version=1).available_tokens(access.key)
    implicit = {"version": in_java, "strategy": "AS_IS"}
    with (
        workers.doing(by_tasks, (consume_until_the_sign, access)) as python,
        Hammers(peers, Access(url, limits[in_java]), implicit=implicit) as java,
    ):
        wait_until_taken(client, access, 1000)
    assert java.taken + sum(python.answers) == 1000 == consumed(client, access)
    state = codec.decode(stored(client, access.key))
    assert (state.configuration_version, state.configuration) == (2, wanted)


class Mixed(Replay):
    """Every other step of a trace is done by Java.

    :ivar done_by_java: whether the last one was.
    """

    peer: Peer
    by_java: bool
    done_by_java: bool

    async def step(self, step: dict[str, Any]) -> Any:
        self.by_java = not self.by_java
        self.done_by_java = self.by_java and step["op"] not in ("command", "sync", "recreate_proxy")
        if not self.done_by_java:
            return await super().step(step)
        proxy = self.proxies[step["proxy"]]
        args = dict(step.get("args", {}))
        if "configuration" in args:
            args["configuration"] = vectors.as_recorded(self.configurations[args["configuration"]])
        return self.peer.ask(
            step["op"],
            KEY,
            self.configurations[proxy["configuration"]],
            now=step["t"],
            implicit=proxy["implicit_replacement"],
            **args,
        )


@pytest.mark.parametrize("by", [By.SWAPS, By.SCRIPT], ids=lambda by: by.name.lower())
@pytest.mark.parametrize("first", ["java", "python"])
@each_category
async def test_traces_by_turns(peer: Peer, client: redis.Redis, category: str, first: str, by: By) -> None:
    store = RedisStore(client)
    for trace in TRACES:
        if trace["category"] != category or any(proxy["recovery"] != "RECONSTRUCT" for proxy in trace["proxies"]):
            continue  # a handle that throws must know what all the handles of its trace have done
        client.delete(KEY)
        replay = Mixed(trace, store, store, merged=True)
        replay.peer, replay.by_java = peer, first != "java"
        state: bytes | None = None
        for number, step in enumerate(trace["steps"]):
            place = f"{trace['name']}, step {number}: {step['op']} {step.get('args', '')}"
            with deciding_by(by):
                try:
                    assert await replay.step(step) == step["result"], place
                except (JavaError, RateLimitError) as error:
                    assert "error" in step, f"{place}: {error}"
            if step["op"] == "remove":
                state = None
            elif "state" in step:
                state = bytes.fromhex(step["state"])
                if not replay.done_by_java and (stored := as_due(step)) != state:
                    assert client.get(KEY) == stored, place
                    client.set(KEY, state)  # on which the next steps go on
            assert client.get(KEY) == state, place


KINDS = {
    "greedy": BucketConfiguration(Bandwidth.greedy(10, 7, refill_tokens=3, initial_tokens=4, id="é\0😀")),
    "intervally": BucketConfiguration(Bandwidth.intervally(10, 60, refill_tokens=20)),
    "aligned": BucketConfiguration(
        Bandwidth.intervally_aligned(10, 60, first_refill=datetime(2023, 11, 14, 22, 13, tzinfo=UTC), initial_tokens=5)
    ),
    "adaptive": BucketConfiguration(
        Bandwidth.intervally_aligned(
            400, 3600, first_refill=datetime(2023, 11, 14, 23, tzinfo=UTC), adaptive_initial_tokens=True
        )
    ),
    "several": SEVERAL,
}


@pytest.mark.parametrize("version", [None, -1, 2**40])
@pytest.mark.parametrize("limits", KINDS.values(), ids=KINDS)
def test_a_debt_is_stored_alike_and_read_field_for_field(
    peer: Peer, client: redis.Redis, limits: BucketConfiguration, version: int | None
) -> None:
    clock = ManualClock(NOW + 1_234_567)
    manager = ProxyManager(RedisStore(client), limits, clock=clock, configuration_version=version)
    implicit = None if version is None else {"version": version, "strategy": "RESET"}
    for tokens in (2, 1500):
        verb = "consume_ignoring_rate_limits"
        penalty = manager.bucket("python").consume_ignoring_rate_limits(tokens)
        now = clock.now_nanos()
        assert peer.ask(verb, "java", limits, now=now, implicit=implicit, tokens=tokens) == penalty
        state = stored(client, "java")
        assert state == stored(client, "python")
        decoded = codec.decode(state)
        assert peer.ask("read", "python") == {
            "configuration": vectors.as_recorded(limits),
            "configuration_version": version,
            "consumed_tokens": decoded.consumed_tokens,
            "bandwidth_states": vectors.states_as_recorded(decoded.bandwidth_states),
            "hex": state.hex(),
        }
        for key in ("java", "python"):
            snapshot = manager.snapshot(key)
            assert (snapshot.configuration, snapshot.configuration_version) == (limits, version)
            assert snapshot.bandwidth_states == decoded.bandwidth_states
        clock.advance(1.7)
    assert manager.available_tokens("java") < 0 > peer.ask("get_available_tokens", "python", limits, now=now)


def test_by_its_own_clock_each_goes_on_where_the_other_stopped(peer: Peer, client: redis.Redis) -> None:
    limits = BucketConfiguration(Bandwidth.greedy(1000, 1000))
    manager = ProxyManager(RedisStore(client), limits)
    begin = redis_nanos(client)
    for i in range(50):
        probe = peer.ask("try_consume_and_return_remaining", "key", limits, tokens=10)
        assert probe["remaining_tokens"] >= 1000 - 20 * i - 10
        assert manager.try_consume_and_return_remaining("key", 10).remaining_tokens >= 1000 - 20 * i - 20
    nanos = redis_nanos(client) - begin
    # a token a second: none may be lost, and none be there before its time
    assert 0 <= manager.available_tokens("key") <= bound(limits, nanos) - 1000


EXPIRATIONS = {Expiration.none(): -1, Expiration.fixed(60): 60_000, Expiration.after_refill(10): 40_000}


@by_either
@pytest.mark.parametrize("expiration", EXPIRATIONS, ids=lambda expiration: expiration.kind)
def test_the_time_to_live_is_set_by_writes_alone(
    peer: Peer, client: redis.Redis, writer: str, expiration: Expiration
) -> None:
    limits = BucketConfiguration.parse("10/100 seconds")
    manager = ProxyManager(RedisStore(client), limits, clock=ManualClock(NOW), expiration=expiration)

    def consume(by: str, tokens: int) -> bool:
        if by == "python":
            return manager.try_consume("key", tokens)
        admitted: bool = peer.ask("try_consume", "key", limits, now=NOW, expiration=expiration, tokens=tokens)
        return admitted

    other = "java" if writer == "python" else "python"
    wanted = EXPIRATIONS[expiration]  # 3 of 10 tokens will be missing: 30 seconds
    assert consume(other, 1)
    for present in (True, False):
        if not present:  # the write makes the bucket
            client.delete("key")
        assert consume(writer, 3 - present)
        assert max(-1, wanted - 5_000) <= client.pttl("key") <= wanted

    client.pexpire("key", 1_000_000)
    for by in (writer, other):
        assert not consume(by, 8)
    assert 995_000 < client.pttl("key") <= 1_000_000


def test_java_without_an_expiration_removes_that_of_python(peer: Peer, client: redis.Redis) -> None:
    limits = BucketConfiguration.parse("10/100 seconds")
    manager = ProxyManager(RedisStore(client), limits)
    assert manager.try_consume("key")
    assert client.pttl("key") > 0
    assert peer.ask("try_consume", "key", limits, tokens=1)
    assert client.pttl("key") == -1
    assert manager.try_consume("key")
    assert client.pttl("key") > 0


def test_a_bucket_of_java_that_has_expired_is_made_anew(peer: Peer, client: redis.Redis) -> None:
    manager = ProxyManager(RedisStore(client), SMALL_QUOTA)
    assert peer.ask("try_consume", "key", SMALL_QUOTA, expiration=Expiration.fixed(1), tokens=20)
    assert not manager.try_consume("key")
    wait_until(lambda: not client.exists("key"), "the bucket has expired")
    assert manager.try_consume("key", 20)
    assert not peer.ask("try_consume", "key", SMALL_QUOTA, tokens=1)


@by_either
@pytest.mark.parametrize("strategy", TokensInheritance, ids=lambda strategy: strategy.name)
def test_limits_that_one_replaces_are_those_of_the_other(
    peer: Peer, client: redis.Redis, writer: str, strategy: TokensInheritance
) -> None:
    limits = BucketConfiguration.parse("10/100 seconds")
    wanted = BucketConfiguration.parse("40/3 minutes; 100/day intervally id daily")
    manager = ProxyManager(RedisStore(client), limits, clock=ManualClock(NOW))
    assert manager.try_consume("key", 4)
    if writer == "python":
        manager.replace_configuration("key", wanted, strategy)
    else:
        configuration = vectors.as_recorded(wanted)
        peer.ask("replace_configuration", "key", limits, now=NOW, configuration=configuration, strategy=strategy.name)
    tokens = {"AS_IS": 6, "PROPORTIONALLY": 24, "ADDITIVE": 36, "RESET": 40}[strategy.name]
    answer = peer.ask("verbose_get_available_tokens", "key", limits, now=NOW)
    assert answer["available_tokens_per_bandwidth"] == [tokens, 100]
    assert answer["configuration"] == vectors.as_recorded(wanted)
    result = manager.bucket("key").verbose.available_tokens()
    assert result.available_tokens_per_bandwidth == (tokens, 100)
    assert result.configuration == wanted == manager.configuration("key")


QUOTAS = [
    "7/month tz Europe/Berlin",
    "7/day tz America/New_York; 20/week calendar; 90/year tz Asia/Kolkata",
    "7/day tz Africa/Cairo",
]
# In Berlin, New York and Cairo clocks are put forward and back within these hours; one of the days has no midnight.
TURNS = [datetime(*day, 20, tzinfo=UTC) for day in ((2024, 4, 25), (2026, 3, 28), (2026, 10, 31), (2027, 12, 31))]


@pytest.mark.parametrize("limits", QUOTAS)
@pytest.mark.parametrize("begin", TURNS, ids=lambda begin: f"{begin:%Y-%m-%d}")
def test_both_take_from_one_quota_of_the_calendar(
    peer: Peer, client: redis.Redis, limits: str, begin: datetime
) -> None:
    configuration = BucketConfiguration.parse(limits)
    quotas = [{"capacity": one.capacity, "unit": one.unit, "tz": one.tz} for one in configuration]  # type: ignore[attr-defined]
    clock = ManualClock(int(begin.timestamp()) * 10**9)
    manager = ProxyManager(
        RedisStore(client),
        configuration,
        clock=clock,
        configuration_version=3,
        inheritance=TokensInheritance.AS_IS,
        expiration=Expiration.none(),
    )
    for hour in range(60):
        now = clock.now_nanos()
        calendar = peer.ask("calendar", now=now, quotas=quotas, version=3)
        assert calendar["configuration"] == vectors.as_recorded(configuration.at(now))
        own = vectors.configuration(calendar["configuration"])
        implicit = {"version": calendar["version"], "strategy": "AS_IS"}

        admitted = []
        before = manager.bucket("copy").snapshot().available_tokens
        # By turns the first to come in an hour is Java or Python: it is the one that turns the period.
        for by_java in (True, False) if hour % 2 else (False, True):
            if by_java:
                admitted.append(peer.ask("try_consume", "key", own, now=now, implicit=implicit, tokens=1))
            else:
                admitted.append(manager.try_consume("key"))
        assert admitted == [before >= 1, before >= 2]
        state = codec.decode(stored(client, "key"))
        assert (state.configuration, state.configuration_version) == (configuration.at(now), calendar["version"])
        manager.bucket("copy").try_consume_as_much_as_possible(2)
        assert stored(client, "copy") == stored(client, "key")
        clock.advance(3_600)
