"""Many processes on one bucket: never a token too many, by the clock of Redis, whatever happens meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from itertools import pairwise

import pytest
import redis

from ratelimit import (
    Bandwidth,
    BucketConfiguration,
    Expiration,
    ProxyManager,
    RedisStore,
    TokensInheritance,
)
from ratelimit.core.token_bucket import codec
from tests.support.decision_paths import WAYS, By, Way
from tests.support.servers import RedisServer, ServerBinary, wait_until
from tests.support.workers import (
    CALLERS,
    PATIENCE,
    PROCESSES,
    Access,
    Tally,
    Wait,
    Workers,
    by_tasks,
    by_threads,
    cancel_half_way,
    cancel_one_of_many,
    consume_through_trouble,
    consume_until_the_sign,
    drain,
    drain_after_the_sign,
    first_use_by_tasks,
    first_use_by_threads,
    line_up,
    patient,
    redis_nanos,
    wait_by_tasks,
    wait_by_threads,
)

pytestmark = pytest.mark.redis

AGES = 10**6  # seconds; no test lives to see such a refill
QUOTA = BucketConfiguration(Bandwidth.intervally(1000, AGES))
SMALL_QUOTA = BucketConfiguration(Bandwidth.intervally(20, AGES))
RATE = BucketConfiguration(Bandwidth.greedy(50, 1, refill_tokens=200))

both_faces = pytest.mark.parametrize("by_callers", [by_threads, by_tasks])


def over(*ways: Way) -> pytest.MarkDecorator:
    """Let the decisions of the processes go these ways; without it they go as it comes."""
    return pytest.mark.parametrize("workers", ways, ids=str, indirect=True)


every_way = over(*WAYS)
few_ways = over(Way(), Way(By.SWAPS, merging=False), Way(By.SCRIPT))


@pytest.fixture
def server(server_binary: ServerBinary) -> Generator[RedisServer]:
    with RedisServer.start(server_binary) as server:
        yield server


def consumed(client: redis.Redis, access: Access) -> int:
    """Count the tokens that were ever taken from the bucket."""
    return ProxyManager(RedisStore(client), access.limits).snapshot(access.key).consumed_tokens


BEHIND = 25_000_000
"""Nanoseconds that a client of a busy machine may be behind the server; what a full bucket is dated back by them comes
in once more."""


def bound(limits: BucketConfiguration, nanos: int) -> int:
    """Give the most that a full bucket can yield within this time."""
    (limit,) = limits
    nanos += 1_000 + BEHIND  # a difference of two times in whole microseconds may be short of nearly one
    return limit.capacity + nanos * limit.refill_tokens // limit.refill_period_nanos


@every_way
@both_faces
def test_a_bucket_that_does_not_refill_admits_exactly_its_capacity(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, QUOTA)
    assert sum(workers.do(by_callers, (drain, access))) == 1000
    assert consumed(client, access) == 1000


@few_ways
@both_faces
def test_a_bucket_that_refills_admits_no_more_than_its_bound(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, RATE)
    begin = redis_nanos(client)
    with workers.doing(by_callers, (consume_until_the_sign, access)) as doing:
        wait_until(lambda: consumed(client, access) >= 200, "the capacity is taken, and as much again and again")
    end = redis_nanos(client)
    taken = sum(doing.answers)
    assert 200 <= taken <= bound(RATE, end - begin)
    assert taken == consumed(client, access)


@every_way
@pytest.mark.parametrize("first_use", [first_use_by_threads, first_use_by_tasks])
def test_a_missing_bucket_is_made_once(
    workers: Workers, client: redis.Redis, url: str, first_use: Callable[..., list[list[int]]]
) -> None:
    access = Access(url, SMALL_QUOTA)
    keys = [f"user:{i}" for i in range(20)]
    taken = workers.do(first_use, access, keys)
    assert [sum(shares) for shares in zip(*taken, strict=True)] == [20] * len(keys)
    for key in keys:
        assert consumed(client, access._replace(key=key)) == 20


@both_faces
def test_a_bucket_that_expires_in_use_is_made_again(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, SMALL_QUOTA, settings={"expiration": Expiration.fixed(0.05)})

    def expired() -> int:
        return int(client.info("stats")["expired_keys"])

    before = expired()
    with workers.doing(by_callers, (consume_until_the_sign, access)) as doing:
        wait_until(lambda: expired() >= before + 5, "the bucket has expired five times")
    lives = expired() - before + 1
    assert 5 <= sum(doing.answers) <= 20 * lives


@few_ways
@both_faces
def test_a_bucket_that_is_removed_in_use_is_made_again(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, SMALL_QUOTA)
    lives: list[int] = []
    with workers.doing(by_callers, (consume_until_the_sign, access)) as doing:
        while len(lives) < 20:
            state = client.getdel(access.key)
            if isinstance(state, bytes):
                lives.append(codec.decode(state).consumed_tokens)
    lives.append(consumed(client, access))
    assert sum(doing.answers) == sum(lives)
    assert max(lives) <= 20


@both_faces
def test_managers_that_remove_the_bucket_disturb_nobody(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, SMALL_QUOTA)
    manager = ProxyManager(RedisStore(client), SMALL_QUOTA)
    with workers.doing(by_callers, (consume_until_the_sign, access)) as doing:
        for _ in range(20):
            wait_until(lambda: client.exists(access.key) == 1, "the bucket is made again")
            manager.remove(access.key)
    assert 0 < sum(doing.answers) <= 20 * 21


@over(Way(), Way(By.SCRIPT))
@both_faces
def test_scripts_that_are_flushed_under_load_are_loaded_again(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    access = Access(url, QUOTA)
    with workers.doing(by_callers, (drain, access)) as doing:
        while doing.busy:
            client.script_flush()
            time.sleep(0.001)
    assert sum(doing.answers) == 1000
    assert consumed(client, access) == 1000


@few_ways
@both_faces
@pytest.mark.parametrize("limits", [QUOTA, BucketConfiguration(Bandwidth.greedy(1000, AGES))], ids=["whole", "greedy"])
def test_no_token_is_taken_twice_where_connections_break(
    workers: Workers, server: RedisServer, by_callers: Callable[..., list[Tally]], limits: BucketConfiguration
) -> None:
    access = Access(patient(server.url), limits)
    with server.client() as client:
        with workers.doing(by_callers, (consume_through_trouble, access)) as doing:
            for _ in range(30):
                client.client_kill_filter(_type="normal", skipme=True)
                time.sleep(0.02)
            wait_until(lambda: consumed(client, access) == 1000, "all is taken", PATIENCE)
        tallies = doing.answers
        taken = sum(tally.taken + tally.taken_after_trouble for tally in tallies)
        in_doubt = sum(tally.in_doubt + tally.in_doubt_after_trouble for tally in tallies)
        assert taken <= consumed(client, access) == 1000 <= taken + in_doubt
    assert all(tally.errors <= {"StoreUnavailableError"} for tally in tallies)


@both_faces
def test_a_server_that_restarts_under_load_begins_anew(
    workers: Workers, server: RedisServer, by_callers: Callable[..., list[Tally]]
) -> None:
    access = Access(patient(server.url), RATE)
    with server.client() as client:
        with workers.doing(by_callers, (consume_through_trouble, access)) as doing:
            wait_until(lambda: consumed(client, access) >= 100, "the load has begun")
            server.kill()
            workers.wait_for_trouble()
            begin = time.time_ns()  # the clock of this machine is that of Redis, which does not run now
            server.restart()
            wait_until(lambda: consumed(client, access) >= 100, "the load goes on")
        nanos = redis_nanos(client) - begin
        tallies = doing.answers
        taken_anew = sum(tally.taken_after_trouble for tally in tallies)
        assert 100 <= taken_anew <= bound(RATE, nanos)
        assert (
            taken_anew
            <= consumed(client, access)
            <= taken_anew + sum(tally.in_doubt_after_trouble for tally in tallies)
        )
    assert set().union(*(tally.errors for tally in tallies)) <= {"StoreUnavailableError", "StoreTimeoutError"}


@every_way
@both_faces
def test_a_newer_configuration_replaces_the_older_under_load(
    workers: Workers, client: redis.Redis, url: str, by_callers: Callable[..., list[int]]
) -> None:
    newer_limits = BucketConfiguration(Bandwidth.intervally(3000, 2 * AGES))
    older = Access(url, QUOTA, settings={"configuration_version": 1})
    newer = Access(url, newer_limits, settings={"configuration_version": 2, "inheritance": TokensInheritance.AS_IS})
    bucket = ProxyManager(RedisStore(client), QUOTA, configuration_version=1).bucket(older.key)
    seen = [bucket.snapshot()]
    with workers.doing(by_callers, (drain, older), (drain_after_the_sign, newer)) as doing:
        wait_until(lambda: bucket.snapshot().consumed_tokens >= 100, "the older configuration is in use")
        doing.give_sign()
        while doing.busy:
            seen.append(bucket.snapshot())
            time.sleep(0.001)
    seen.append(bucket.snapshot())
    assert sum(doing.answers) == 1000 == seen[-1].consumed_tokens
    stages = [(snapshot.configuration_version, snapshot.configuration) for snapshot in seen]
    change = stages.index((2, newer_limits))
    assert stages[:change] == [(1, QUOTA)] * change
    assert stages[change:] == [(2, newer_limits)] * (len(stages) - change)


PATIENT = BucketConfiguration(Bandwidth.greedy(1, 0.005))


def check_turns(waits: list[Wait], limits: BucketConfiguration, nanos: int) -> None:
    """Check that no two waits were for the same token, and none was cut short; all were within these nanoseconds."""
    (limit,) = limits
    dues = sorted(wait.due for wait in waits)
    steps = [later - earlier for earlier, later in pairwise(dues)]
    assert min(steps) >= limit.refill_period_nanos // limit.refill_tokens
    # A token is due by the clocks of all who wrote before; the estimates of the server's time drift by less than 0.1 %.
    error = max(wait.clock_error for wait in waits) + nanos // 1000
    assert len(waits) <= bound(limits, nanos + error)
    for wait in waits:
        assert wait.served + error >= wait.due


@few_ways
@pytest.mark.parametrize("wait", [wait_by_threads, wait_by_tasks])
def test_waiters_are_served_at_the_rate(
    workers: Workers, client: redis.Redis, url: str, wait: Callable[..., list[Wait]]
) -> None:
    access = Access(url, PATIENT)
    begin = redis_nanos(client)
    waits = workers.do(wait, access, 4)
    nanos = redis_nanos(client) - begin
    assert len(waits) == PROCESSES * CALLERS * 4 == consumed(client, access)
    check_turns(waits, PATIENT, nanos)


@few_ways
def test_first_reserved_is_first_served(workers: Workers, client: redis.Redis, url: str) -> None:
    limits = BucketConfiguration(Bandwidth.greedy(1, 0.05))
    access = Access(url, limits)
    begin = redis_nanos(client)
    waits = workers.do(line_up, access)
    nanos = redis_nanos(client) - begin
    assert len(waits) == PROCESSES == consumed(client, access)
    assert waits == sorted(waits, key=lambda wait: wait.due)
    check_turns(waits, limits, nanos)


@few_ways
@pytest.mark.parametrize("limits", [QUOTA, PATIENT], ids=["whole", "greedy"])
def test_waits_that_are_cancelled_give_their_tokens_back(
    workers: Workers, client: redis.Redis, url: str, limits: BucketConfiguration
) -> None:
    access = Access(url, limits)
    taken = sum(workers.do(cancel_half_way, access, 10))
    given_up = 2 * PROCESSES * CALLERS * 10 - taken
    assert 0 <= given_up <= PROCESSES * CALLERS * 10
    # The place of a wait stays empty where another process stands behind it. No call has to wait for the whole quota.
    assert taken <= consumed(client, access) <= taken + (0 if limits is QUOTA else given_up)


@every_way
@pytest.mark.parametrize("limits", [QUOTA, BucketConfiguration(Bandwidth.greedy(1000, AGES))], ids=["whole", "greedy"])
def test_a_call_that_is_cancelled_is_no_trouble_for_the_others(
    workers: Workers, client: redis.Redis, url: str, limits: BucketConfiguration
) -> None:
    access = Access(url, limits)
    taken = workers.do(cancel_one_of_many, access, 20)
    calls = PROCESSES * CALLERS * 20
    assert sum(taken) == len(taken) == calls - PROCESSES * 20
    assert len(taken) <= consumed(client, access) <= calls
