"""Connections of a client's pool that a store keeps from one request to the next: nobody else may notice."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ratelimit import CircuitBreaker, ProxyManager, RedisStore, StoreTimeoutError, StoreUnavailableError
from ratelimit.stores.redis.cluster import ClusterChannel
from ratelimit.stores.redis.pool import PoolChannel
from tests.support import servers
from tests.support.lifecycle import forked
from tests.support.servers import Cluster, RedisServer, ServerBinary, wait_until
from tests.support.topologies import give_all_slots

pytestmark = pytest.mark.redis

LIMITS = "100000/day"
PAUSE = 0.05
SECOND = 1.0
"""Seconds after which a kept connection is looked at by its pool before it is used again."""


class Clock:
    """A clock that decides how long connections are kept; it stands still until a test moves it."""

    def __init__(self) -> None:
        # The deadlines of decisions are by the real clock.
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def store(self, client: redis.Redis) -> RedisStore:
        """Make a store that keeps connections by this clock."""
        return RedisStore.over(PoolChannel(client, breaker=CircuitBreaker(), monotonic=self.monotonic))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(server: RedisServer) -> Generator[redis.Redis]:
    with server.client(client_name="kept", socket_timeout=5) as client:
        client.flushdb()
        yield client


@pytest.fixture
def store(client: redis.Redis, clock: Clock) -> RedisStore:
    return clock.store(client)


def connection_id(store: RedisStore) -> int:
    return int(store.ask(b"key", "CLIENT", "ID"))


def in_use(client: redis.Redis) -> int:
    """Count the connections of a pool that are in use."""
    pool: Any = client.connection_pool
    if isinstance(pool, redis.BlockingConnectionPool):
        return len(pool._connections) - len([idle for idle in pool.pool.queue if idle is not None])
    return len(pool._in_use_connections)


def count_visits(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows with every connection that the pool gives out."""
    visits: list[None] = []
    given = client.connection_pool.get_connection

    def get_connection(*arguments: Any, **keywords: Any) -> Any:
        visits.append(None)
        return given(*arguments, **keywords)

    monkeypatch.setattr(client.connection_pool, "get_connection", get_connection)
    return visits


def at_once(threads: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the result of each thread; raise an error of any of them."""
    gate = threading.Barrier(threads)

    def one(number: int) -> Any:
        gate.wait(10)
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(threads), timeout=60))


# Keeping


def test_requests_in_a_row_use_one_connection_and_ask_the_pool_once(
    store: RedisStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = count_visits(client, monkeypatch)
    assert len({connection_id(store) for _ in range(200)}) == 1
    assert len(visits) == 1


def test_after_a_pause_a_connection_is_used_again_unless_the_server_has_closed_it(
    clock: Clock, store: RedisStore, client: redis.Redis, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = count_visits(client, monkeypatch)
    ids = set()
    for _ in range(9):
        ids.add(connection_id(store))
        clock.now += PAUSE
    assert len(visits) == len(ids) == 1
    with server.client() as other:
        (used,) = ids
        other.execute_command("CLIENT", "KILL", "ID", used)
    assert connection_id(store) not in ids
    assert len(visits) == 2


def test_a_connection_goes_back_without_the_time_limit_of_a_decision(server: RedisServer) -> None:
    with server.client(max_connections=1, socket_timeout=None, retry=Retry(NoBackoff(), 0)) as client:
        store = RedisStore(client)
        ProxyManager(store, LIMITS, timeout=0.3).try_consume("anyone")
        store.close()
        assert client.blpop(["nothing"], timeout=0.6) is None


def test_once_a_second_a_connection_in_constant_use_passes_through_the_pool(
    clock: Clock, store: RedisStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = count_visits(client, monkeypatch)
    for _ in range(5000):
        clock.now += 0.001
        store.get(b"key")
    assert 5 <= len(visits) <= 6


def test_a_manager_that_is_dropped_gives_its_connection_back(server: RedisServer) -> None:
    with server.client(max_connections=2) as client:
        for number in range(10):
            assert ProxyManager(RedisStore(client), LIMITS).try_consume(f"key {number}")
        assert in_use(client) == 0


class OldBlockingPool(redis.BlockingConnectionPool):
    """A pool as that of redis-py 5 and 6, which can only close all connections, also those that are in use."""

    def disconnect(self) -> None:  # type: ignore[override]
        super().disconnect()


class FailingProvider(redis.CredentialProvider):
    def get_credentials(self) -> tuple[str]:
        raise LookupError("no password")


@pytest.mark.parametrize("kind", [redis.ConnectionPool, redis.BlockingConnectionPool, OldBlockingPool])
def test_a_connection_whose_handshake_was_broken_off_is_closed_and_no_other(server: RedisServer, kind: Any) -> None:
    pool = kind(host=server.host, port=server.port, max_connections=2)
    busy = pool.get_connection()
    pool.connection_kwargs["credential_provider"] = FailingProvider()
    with redis.Redis(connection_pool=pool) as client:
        with pytest.raises(StoreUnavailableError, match="no password"):
            ProxyManager(RedisStore(client), LIMITS).try_consume("key")
        idle = pool.pool.queue if hasattr(pool, "pool") else pool._available_connections
        assert [connection._sock for connection in idle if connection is not None] == [None]
        assert busy._sock is not None
        pool.release(busy)


def test_threads_reuse_connections(client: redis.Redis, server: RedisServer) -> None:
    store = RedisStore(client)
    ids = at_once(8, lambda _: {connection_id(store) for _ in range(100)})
    assert len(set().union(*ids)) <= 8
    with server.client() as other:
        assert len([one for one in other.client_list() if one["name"] == "kept"]) <= 8


# A pool that others use, too


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_of_a_shared_pool_half_is_kept_at_most(clock: Clock, server: RedisServer, most: int) -> None:
    with server.client(max_connections=most) as client, server.client() as other:
        store = clock.store(client)
        with ThreadPoolExecutor(most) as pool:
            waiting = [pool.submit(store.ask, b"list", "BLPOP", b"list", 10) for _ in range(most)]
            wait_until(lambda: other.info("clients")["blocked_clients"] == most, "all of them wait")
            assert in_use(client) == most
            other.rpush("list", *range(most))
            assert sorted(int(one.result()[1]) for one in waiting) == list(range(most))
        assert in_use(client) == most // 2


def test_after_a_second_all_that_was_kept_goes_back(server: RedisServer, clock: Clock) -> None:
    with server.client(max_connections=8) as client, server.client() as other:
        store = clock.store(client)
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(store.ask, b"list", "BLPOP", b"list", 10) for _ in range(4)]
            wait_until(lambda: other.info("clients")["blocked_clients"] == 4, "all of them wait")
            other.rpush("list", *range(4))
            assert sorted(int(one.result()[1]) for one in waiting) == list(range(4))
        assert in_use(client) == 4
        clock.now += SECOND
        store.get(b"key")
        assert in_use(client) == 1


def test_what_connecting_took_is_not_waited_for_once_more(
    clock: Clock, store: RedisStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = client.connection_pool.get_connection
    connections: list[Any] = []

    def get_connection() -> Any:
        clock.now += 0.6
        connections.append(given())
        return connections[-1]

    monkeypatch.setattr(client.connection_pool, "get_connection", get_connection)
    store.get(b"key", deadline=clock.now + 1)
    (connection,) = connections
    wait = connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.calcsize("@ll"))
    seconds, microseconds = struct.unpack("@ll", wait)
    assert seconds + microseconds / 1_000_000 == pytest.approx(0.4, abs=0.005)


def test_a_thread_that_comes_first_leaves_what_others_keep(
    clock: Clock, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise those others would have to ask the pool again, make still others ask it, and so on without an end."""
    threads, taken = 16, []
    with server.client() as client, ThreadPoolExecutor(threads) as pool:
        get_connection = client.connection_pool.get_connection

        def counted(*arguments: Any) -> Any:
            taken.append(threading.get_ident())
            return get_connection(*arguments)

        monkeypatch.setattr(client.connection_pool, "get_connection", counted)
        store = clock.store(client)
        together = threading.Barrier(threads)

        def ask(_: int) -> None:
            together.wait(30)
            for _ in range(50):
                store.get(b"key")

        list(pool.map(ask, range(threads)))
    assert len(taken) <= threads


POOLS: dict[str, Callable[[str], redis.ConnectionPool]] = {
    "blocking": lambda url: redis.BlockingConnectionPool.from_url(url, max_connections=1, timeout=0.5),
    "plain": lambda url: redis.ConnectionPool.from_url(url, max_connections=1),
}


@pytest.mark.parametrize("kind", POOLS)
def test_the_only_connection_of_a_pool_is_the_callers_between_requests(
    clock: Clock, server: RedisServer, kind: str
) -> None:
    with redis.Redis.from_pool(POOLS[kind](server.url)) as client:
        client.flushdb()
        with ProxyManager(clock.store(client), LIMITS) as manager:
            for number in range(50):
                assert manager.try_consume("key")
                assert client.incr("counter") == number + 1
                assert client.exists("key")
                assert in_use(client) == 0


def test_more_threads_than_connections_wait_and_are_all_served(server: RedisServer) -> None:
    pool = redis.BlockingConnectionPool.from_url(server.url, max_connections=2, timeout=5)
    with redis.Redis.from_pool(pool) as client:
        client.flushdb()
        manager = ProxyManager(RedisStore(client), LIMITS)

        def work(number: int) -> int:
            done = 0
            for turn in range(50):
                if number % 4 == 0:  # the caller's own, in between
                    client.incr("counter")
                else:
                    done += manager.try_consume(f"key {number} {turn % 2}")
            return done

        assert sum(at_once(16, work)) == 12 * 50
        assert int(client.get("counter") or 0) == 4 * 50
        assert in_use(client) <= 1


def test_a_manager_by_url_serves_more_threads_than_it_has_connections(server: RedisServer) -> None:
    with ProxyManager.from_url(f"{server.url}?max_connections=2&timeout=5", LIMITS) as manager:
        assert at_once(16, lambda number: sum(manager.try_consume(f"key {number}") for _ in range(50))) == [50] * 16


# Connections that break


def kill_connections(server: RedisServer, name: str = "kept") -> int:
    with server.client() as other:
        victims = [one for one in other.client_list() if one["name"] == name]
        for victim in victims:
            other.client_kill_filter(_id=victim["id"])
        wait_until(lambda: not [one for one in other.client_list() if one["name"] == name], "they are gone")
    return len(victims)


def test_a_connection_that_the_server_closes_in_a_pause_costs_no_error(
    clock: Clock, store: RedisStore, server: RedisServer
) -> None:
    for _ in range(5):
        before = connection_id(store)
        assert kill_connections(server) == 1
        clock.now += PAUSE
        assert connection_id(store) != before


def test_a_connection_that_the_server_closes_between_two_requests_costs_a_decision_no_error(
    clock: Clock, client: redis.Redis, server: RedisServer
) -> None:
    manager = ProxyManager(clock.store(client), LIMITS)
    for number in range(1, 6):
        assert manager.try_consume("key", 7)
        assert kill_connections(server) == 1
        assert manager.try_consume("key")
        assert manager.snapshot("key").consumed_tokens == 8 * number


def test_a_restart_of_the_server_costs_no_error(server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server, ProxyManager.from_url(server.url, LIMITS) as manager:
        for _ in range(3):
            at_once(4, lambda number: manager.try_consume(f"key {number}"))
            server.restart()
            assert manager.try_consume("key")


def test_a_request_without_a_reply_gives_its_connection_back_closed(clock: Clock, server: RedisServer) -> None:
    with server.client(socket_timeout=0.1) as client:
        store = clock.store(client)
        store.swap(b"key", None, b"state", -1)
        store.get(b"key")
        server.pause()
        try:
            with pytest.raises(StoreTimeoutError):
                store.ask(b"key", "ECHO", "belated")
            assert in_use(client) == 0
        finally:
            server.resume()
        assert store.ask(b"key", "ECHO", "new") == b"new"
        assert in_use(client) == 1
        store.delete(b"key")


def test_an_error_of_the_server_leaves_the_connection_in_use(store: RedisStore) -> None:
    before = connection_id(store)
    with pytest.raises(Exception, match="unknown command"):
        store.ask(b"key", "NOSUCHCOMMAND")
    assert connection_id(store) == before


# What the caller does to the client


ENDINGS: dict[str, Callable[[redis.Redis], Any]] = {
    "client.close()": lambda client: client.close(),
    "pool.disconnect()": lambda client: client.connection_pool.disconnect(),
    "pool.disconnect(inuse_connections=False)": lambda client: client.connection_pool.disconnect(False),
    "pool.reset()": lambda client: client.connection_pool.reset(),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("pause", [0, PAUSE], ids=["at once", "after a pause"])
def test_what_the_caller_closes_costs_no_error(clock: Clock, client: redis.Redis, ending: str, pause: float) -> None:
    store = clock.store(client)
    manager = ProxyManager(store, LIMITS)
    for number in range(1, 4):
        assert manager.try_consume("key")
        ENDINGS[ending](client)
        clock.now += pause
        assert store.ask(b"key", "ECHO", b"%d" % number) == b"%d" % number
    assert manager.snapshot("key").consumed_tokens == 3


def test_a_store_that_is_closed_has_given_everything_back_and_goes_on(clock: Clock, server: RedisServer) -> None:
    with server.client(max_connections=20) as client:
        store = clock.store(client)
        at_once(8, lambda _: [store.get(b"key") for _ in range(20)])
        assert in_use(client) > 0
        store.close()
        assert in_use(client) == 0
        before = len(client.connection_pool._available_connections)
        store.get(b"key")
        assert len(client.connection_pool._available_connections) == before - 1
        store.close()


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_connections_of_its_own(store: RedisStore) -> None:
    mine = connection_id(store)
    for number in range(10):

        def work(number: int = number) -> Any:
            ids = {connection_id(store) for _ in range(5)}
            return [*ids], [store.ask(b"key", "ECHO", b"child %d" % number).decode() for _ in range(20)]

        ids, echoes = forked(work)
        assert len(ids) == 1
        assert mine not in ids
        assert set(echoes) == {f"child {number}"}
        assert connection_id(store) == mine


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.skipif(sys.platform == "darwin", reason="a fork beside threads is not safe there")
def test_a_fork_beside_busy_threads_mixes_no_replies(server: RedisServer) -> None:
    with server.client(socket_timeout=5) as client:
        store = RedisStore(client)
        end = threading.Event()

        def busy(number: int) -> int:
            turns = 0
            while not end.is_set():
                word = b"parent %d %d" % (number, turns)
                assert store.ask(b"key", "ECHO", word) == word
                turns += 1
            return turns

        def work() -> Any:
            return [store.ask(b"key", "ECHO", b"child %d" % turn).decode() for turn in range(50)]

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(busy, number) for number in range(4)]
            try:
                for _ in range(20):
                    assert forked(work) == [f"child {turn}" for turn in range(50)]
            finally:
                end.set()
            assert all(one.result(10) for one in running)


# A cluster


@pytest.fixture
def cluster(server_binary: ServerBinary) -> Generator[Cluster]:
    with servers.cluster(server_binary) as cluster:
        yield cluster


def keys_of(cluster: Cluster, count: int) -> list[list[str]]:
    """Return keys of each of the two nodes."""
    keys: list[list[str]] = [[], []]
    with cluster.nodes[0].client() as client:
        for number in range(count * 10):
            slot: Any = client.execute_command("CLUSTER KEYSLOT", f"key {number}")
            keys[int(slot) * 2 // servers.SLOTS].append(f"key {number}")
    return [of_one[:count] for of_one in keys]


def calls(node: RedisServer, *names: str) -> int:
    with node.client() as client:
        stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in names)


def test_each_node_of_a_cluster_is_asked_for_its_own_keys_its_time_and_its_swaps(cluster: Cluster) -> None:
    first, second = keys_of(cluster, 3)
    with ProxyManager.from_url(cluster.url, LIMITS) as manager:
        for key in first:
            assert manager.try_consume(key)
        assert [calls(node, "time") > 0 for node in cluster.nodes] == [True, False]
        assert [calls(node, "set", "eval") > 0 for node in cluster.nodes] == [True, False]
        for key in second:
            assert manager.try_consume(key)
        assert [calls(node, "time") > 0 for node in cluster.nodes] == [True, True]
        for node in cluster.nodes:
            with node.client() as client:
                assert client.dbsize() == 3
                assert "errorstat_MOVED" not in client.info("errorstats")


def move(source: RedisServer, target: RedisServer, keys: list[str]) -> None:
    """Move the slot of some keys."""
    with source.client() as here, target.client() as there:
        slot: Any = here.execute_command("CLUSTER KEYSLOT", keys[0])
        source_id: Any = here.execute_command("CLUSTER MYID")
        target_id: Any = there.execute_command("CLUSTER MYID")
        there.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
        here.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
        here.execute_command("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
        for one in (there, here):
            one.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)


@pytest.mark.parametrize("keys", [1, 4], ids=["one bucket for all", "a bucket for each"])
def test_a_slot_that_moves_under_load_loses_no_token_and_gives_none_away(cluster: Cluster, keys: int) -> None:
    ((tag, *_), _) = keys_of(cluster, 1)
    buckets = [f"{{{tag}}}{number}" for number in range(keys)]
    end = threading.Event()
    with ProxyManager.from_url(cluster.url, LIMITS, merging=False) as manager:

        def work(number: int) -> int:
            taken = 0
            try:
                while not end.is_set():
                    taken += manager.try_consume(buckets[number % keys])
            finally:
                end.set()
            return taken

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(work, number) for number in range(4)]
            try:
                for turn in range(6):
                    source, target = cluster.nodes[turn % 2], cluster.nodes[1 - turn % 2]
                    enough = calls(source, "set") + 50
                    wait_until(lambda s=source, e=enough: calls(s, "set") >= e or end.is_set(), "it is used here")  # type: ignore[misc]
                    if end.is_set():
                        break
                    move(source, target, buckets)
            finally:
                end.set()
            taken = [one.result(10) for one in running]
        assert all(taken)
        assert sum(manager.snapshot(bucket).consumed_tokens for bucket in buckets) == sum(taken)


def test_connections_of_a_node_that_left_the_cluster_are_given_back(cluster: Cluster) -> None:
    leaving, staying = cluster.nodes
    keys, _ = keys_of(cluster, 20)
    with redis.RedisCluster.from_url(cluster.url.replace("+cluster", "")) as client:
        channel = ClusterChannel(lambda: client, server="a cluster")
        assert channel.send(keys[0].encode(), [(b"GET", keys[0].encode())]) == [None]
        node: Any = client.get_node(leaving.host, leaving.port)
        pool: Any = client.get_redis_connection(node).connection_pool
        assert len(pool._in_use_connections) == 1
        give_all_slots(leaving, staying)
        for key in keys:
            assert channel.send(key.encode(), [(b"GET", key.encode())]) == [None]
        assert [node.port for node in client.get_nodes()] == [staying.port]
        wait_until(lambda: not pool._in_use_connections, "its connection is given back")


def test_a_node_that_is_killed_costs_errors_only_for_its_keys_and_only_while_it_is_down(cluster: Cluster) -> None:
    (mine, *_), (other, *_) = keys_of(cluster, 1)
    killed = cluster.nodes[1]
    with ProxyManager.from_url(cluster.url, LIMITS) as manager:
        for _ in range(3):
            assert manager.try_consume(mine)
            assert manager.try_consume(other)
        killed.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                manager.try_consume(other)
            assert manager.try_consume(mine)
        killed.restart()
        wait_until(lambda: served(manager, mine) and served(manager, other), "the cluster is whole again")
        for _ in range(20):
            assert manager.try_consume(mine)
            assert manager.try_consume(other)


def served(manager: ProxyManager, key: str) -> bool:
    try:
        manager.try_consume(key)
    except StoreUnavailableError:
        return False
    return True
