"""Clusters that change while they are used: nodes that are new, gone, slow, elsewhere, or whose clocks differ."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    Expiration,
    OnError,
    ProxyManager,
    RedisStore,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from ratelimit.stores.redis.shared_connection import SharedConnection
from tests.support import servers
from tests.support.audited_load import CLUSTER_DOWN, LONGEST_CALL, Load
from tests.support.both_faces import Face, Settled, closing, settled
from tests.support.inside import pipeline_of
from tests.support.proxies import Proxy
from tests.support.scripted_proxy import ScriptedProxy
from tests.support.servers import SLOTS, Cluster, RedisServer, ServerBinary
from tests.support.topologies import PATIENT_MILLIS, ask, begin_to_move, end_move, move_keys, role, settled_by
from tests.support.workers import patient

pytestmark = pytest.mark.redis

LIMITS = "10/hour"
HOUR = 3_600 * 10**9


@asynccontextmanager
async def managing(face: Face, url: str, limits: str = LIMITS, **settings: Any) -> AsyncGenerator[Settled]:
    settings = {"expiration": Expiration.none(), "timeout": 5, **settings}
    async with closing(face.from_url(url, limits, **settings)) as manager:
        yield Settled(manager)


@asynccontextmanager
async def both_faces(url: str) -> AsyncGenerator[list[Settled]]:
    url = patient(url)
    async with managing(ProxyManager, url) as manager, managing(AsyncProxyManager, url) as amanager:
        yield [manager, amanager]


async def until_served(manager: Settled, key: str) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(StoreError):
                if await manager.try_consume(key):
                    return
            await asyncio.sleep(0.02)


@contextmanager
def joining(cluster: Cluster) -> Generator[RedisServer]:
    """A node without slots, which the others know and clients have not heard of."""
    first = cluster.nodes[0]
    with RedisServer.start(first.binary, "--cluster-enabled", "yes", "--cluster-node-timeout", "2000") as node:
        ask(node, "CLUSTER SET-CONFIG-EPOCH", len(cluster.nodes) + 1)
        ask(first, "CLUSTER MEET", node.host, node.port)
        everybody = [*cluster.nodes, node]
        settled_by(lambda: all(knows(one, everybody) for one in everybody), "the nodes know each other")
        yield node


def knows(node: RedisServer, others: list[RedisServer]) -> bool:
    info = ask(node, "CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(others)


def slot_of(cluster: Cluster, key: str) -> int:
    return int(ask(cluster.nodes[0], "CLUSTER KEYSLOT", key))


def keys_of(cluster: Cluster, name: str, count: int = 1) -> list[list[str]]:
    """Keys of each of the two nodes, each in a slot of its own."""
    keys: list[list[str]] = [[], []]
    for number in range(1_000):
        key = f"{name} {number}"
        half = keys[slot_of(cluster, key) * 2 // SLOTS]
        if len(half) < count:
            half.append(key)
        if all(len(half) == count for half in keys):
            return keys
    raise AssertionError("no such keys")


# Nodes that are new


async def test_a_slot_that_moves_to_a_node_that_is_new_is_followed_at_every_step(server_binary: ServerBinary) -> None:
    with servers.cluster(server_binary) as cluster, joining(cluster) as target:
        source = cluster.nodes[0]
        async with both_faces(cluster.url) as managers:
            names = [keys_of(cluster, f"moving {number}", 2)[0] for number in range(len(managers))]
            slots = [slot_of(cluster, key) for keys in names for key in keys]
            for manager, (known, _) in zip(managers, names, strict=True):
                assert await manager.try_consume(known)
            for slot in slots:
                begin_to_move(source, target, slot)
            for manager, keys in zip(managers, names, strict=True):
                for key in keys:
                    assert await manager.try_consume(key)  # here, or, where there is no bucket, ASK
                move_keys(source, target, keys[0])
                for key in keys:
                    assert await manager.try_consume(key)  # ASK
            for slot in slots:
                end_move(source, target, slot, cluster.nodes[1:])
            for manager, (known, new) in zip(managers, names, strict=True):
                assert await manager.try_consume(known)  # MOVED
                assert await manager.try_consume(new)
                assert (await manager.snapshot(known)).consumed_tokens == 4
                assert (await manager.snapshot(new)).consumed_tokens == 3


async def test_nodes_that_join_and_leave_under_load_cost_no_token(server_binary: ServerBinary) -> None:
    """The slots of half of the keys go to a node that joins; then the node that had them leaves, and is killed."""
    with servers.cluster(server_binary) as cluster, joining(cluster) as newcomer:
        for node in (*cluster.nodes, newcomer):
            # None of them holds another one for dead because the machine is busy.
            ask(node, "CONFIG SET", "cluster-node-timeout", PATIENT_MILLIS)
        groups = keys_of(cluster, "resharded", 3)
        leaving, staying = cluster.nodes
        url = patient(f"redis+cluster://{staying.host}:{staying.port}")
        with Load(url, groups, deadline=5) as load:
            load.await_progress(tokens=5)
            for key in groups[0]:
                slot = slot_of(cluster, key)
                begin_to_move(leaving, newcomer, slot)
                load.await_progress([key], 3)  # the key is still here
                move_keys(leaving, newcomer, key)
                load.await_progress([key], 3)  # ASK
                end_move(leaving, newcomer, slot, [staying])
                load.await_progress([key], 3)  # MOVED
            assert not load.errors()
            give_all(newcomer, SLOTS // 2)
            # The others hear of it by and by, and the node without slots turns into a replica.
            settled_by(lambda: role(leaving) == "slave", "the node has left")
            load.await_progress(tokens=3)
            # On a busy machine a node may hold the cluster down for a moment, while its slots go from hand to hand.
            assert set(load.errors()) <= {CLUSTER_DOWN}
            # The node that stays may not have heard yet that this one has left.
            leaving.kill()
            load.await_progress(tokens=5)
        stored = load.stored()
        for key in load.keys:
            acknowledged = load.acknowledged(key)
            assert acknowledged <= stored[key] <= acknowledged + load.in_doubt(key), (key, load.summary())
        assert load.slowest < LONGEST_CALL


async def test_a_manager_that_is_new_reaches_the_other_nodes_while_one_is_down(
    face: Face, server_binary: ServerBinary
) -> None:
    """No node has taken over yet, so that the first one in the table is still the one that is down."""
    with servers.cluster(server_binary) as cluster:
        down, up = cluster.nodes
        ask(up, "CONFIG SET", "cluster-node-timeout", PATIENT_MILLIS)
        (key,) = keys_of(cluster, "new")[1]
        down.kill()
        async with managing(face, patient(f"redis+cluster://{up.host}:{up.port}")) as manager:
            assert serves(down, by=up)
            assert await manager.try_consume(key)


def serves(node: RedisServer, by: RedisServer) -> bool:
    """Return whether a node has slots, by what another one knows."""
    return any(row[2][1] == node.port for row in ask(by, "CLUSTER SLOTS"))


def give_all(target: RedisServer, slots: int) -> None:
    """Let a node take the first slots, whose keys it has."""
    id_ = ask(target, "CLUSTER MYID")
    with target.client() as client, client.pipeline(transaction=False) as pipeline:
        for slot in range(slots):
            pipeline.execute_command("CLUSTER SETSLOT", slot, "NODE", id_)
        pipeline.execute()


# What redis-py raises


@pytest.mark.parametrize(
    "error",
    [AttributeError("no such node"), queue.Full(), asyncio.IncompleteReadError(b"", 1)],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("topology", ["redis", "redis+cluster"])
async def test_client_errors_are_store_errors_and_obey_on_error(
    face: Face, server: RedisServer, monkeypatch: pytest.MonkeyPatch, topology: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    ask(server, "FLUSHALL")
    with ScriptedProxy(server) as front:
        url = patient(f"{topology}://127.0.0.1:{front.port}")
        for connection in (redis.Connection, redis.asyncio.Connection):
            monkeypatch.setattr(connection, "on_connect", fail)
            monkeypatch.setattr(connection, "on_connect_check_health", fail, raising=False)  # newer than redis-py 5
        async with managing(face, url) as manager, managing(face, url, on_error=OnError.ALLOW) as lenient:
            with pytest.raises(StoreError) as caught:
                await manager.try_consume("key")
            assert error in causes(caught.value)
            assert not caught.value.in_doubt
            assert await lenient.try_consume("key")
            monkeypatch.undo()
            await until_served(manager, "key")


def causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


@pytest.mark.parametrize("where", ["get_node_from_key", "keyslot"])
async def test_a_client_that_cannot_find_nodes_is_a_store_error(
    face: Face, server: RedisServer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ask(server, "FLUSHALL")
    with ScriptedProxy(server) as front:
        async with managing(face, patient(f"redis+cluster://127.0.0.1:{front.port}")) as manager:
            assert await manager.try_consume("key")

            def fail(*_: Any, **__: Any) -> Any:
                raise KeyError(where)

            for client in (redis.RedisCluster, redis.asyncio.RedisCluster):
                monkeypatch.setattr(client, where, fail)
            with pytest.raises(StoreUnavailableError, match="KeyError") as caught:
                await manager.try_consume("key")
            assert not caught.value.in_doubt
            monkeypatch.undo()
            assert await manager.try_consume("key")


def test_a_client_that_cannot_follow_redirections_is_a_store_error(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError

    def answer(command: list[bytes]) -> bytes | None:
        if not command[0].startswith((b"EVAL", b"SET")):
            return None
        monkeypatch.setattr(redis.RedisCluster, "get_redis_connection", fail)
        return b"-MOVED 12539 127.0.0.1:%d\r\n" % front.port

    ask(server, "FLUSHALL")
    with ScriptedProxy(server) as front, ExitStack() as stack:
        url = patient(f"redis+cluster://127.0.0.1:{front.port}")
        manager = stack.enter_context(ProxyManager.from_url(url, LIMITS, timeout=5))
        assert manager.try_consume("key")
        front.answer = answer
        with pytest.raises(StoreUnavailableError, match="KeyError") as caught:
            manager.try_consume("key")
        assert not caught.value.in_doubt
        monkeypatch.undo()
        front.answer = lambda _: None
        assert manager.try_consume("key")


def test_a_pool_that_takes_nothing_back_is_a_store_error(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise queue.Full

    ask(server, "FLUSHALL")
    with redis.Redis(host=server.host, port=server.port, max_connections=1) as client:
        manager = ProxyManager(RedisStore(client), LIMITS)  # which keeps none of the connections
        monkeypatch.setattr(client.connection_pool, "release", fail)
        with pytest.raises(StoreUnavailableError, match="Full") as caught:
            manager.try_consume("key")
        assert caught.value.in_doubt


# Nodes that never stop redirecting


@pytest.mark.parametrize("storm", ["ASK", "MOVED"])
async def test_nodes_that_redirect_without_end_cost_the_timeout_and_no_storm(
    face: Face, server: RedisServer, storm: str
) -> None:
    ask(server, "FLUSHALL")
    with ScriptedProxy(server) as front:
        async with managing(face, patient(f"redis+cluster://127.0.0.1:{front.port}")) as manager:
            assert await manager.try_consume("key")
            slot = 12_539  # of the key
            redirected = 0

            def answer(command: list[bytes]) -> bytes | None:
                nonlocal redirected
                if not command[0].startswith((b"EVAL", b"SET")):
                    return None
                redirected += 1
                return b"-%s %d 127.0.0.1:%d\r\n" % (storm.encode(), slot, front.port)

            front.answer = answer
            for timeout, kind in ((0.5, StoreTimeoutError), (10, StoreUnavailableError)):
                redirected = 0
                began = time.monotonic()
                with pytest.raises(kind) as caught:
                    await manager.try_consume("key", timeout=timeout)
                assert time.monotonic() - began < timeout + 2
                assert not caught.value.in_doubt
                assert 0 < redirected < 50
            front.answer = lambda _: None
            assert await manager.try_consume("key")
            assert (await manager.snapshot("key")).consumed_tokens == 2


# Connecting that takes long


async def test_to_find_a_cluster_may_take_longer_than_a_decision(face: Face, server: RedisServer) -> None:
    ask(server, "FLUSHALL")
    with ScriptedProxy(server) as front, Proxy(front.port) as proxy, proxy.slow(delay=0.15):
        async with managing(face, f"redis+cluster://127.0.0.1:{proxy.port}", timeout=0.1) as manager:
            with pytest.raises(StoreTimeoutError):
                await manager.try_consume("key")
            connections = proxy.connections
            await until_served(manager, "key")
            assert proxy.connections <= connections + 1  # it was not begun over and over


async def test_a_connection_slower_than_every_deadline_is_made(
    server: RedisServer,
) -> None:
    ask(server, "FLUSHALL")
    with Proxy(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}?socket_timeout=5&socket_connect_timeout=5"
        async with managing(AsyncProxyManager, url, timeout=0.25) as manager:
            with proxy.slow(delay=1):
                for _ in range(4):
                    with pytest.raises(StoreError):
                        await manager.try_consume("key")
                    await asyncio.sleep(0.2)
            await until_served(manager, "key")
            assert proxy.connections == 1


async def test_connecting_ends_also_where_the_client_has_no_timeouts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        shared = SharedConnection(
            lambda: redis.asyncio.Connection(port=port, socket_timeout=None, socket_connect_timeout=None),
            longest_connecting=0.2,
        )
        with pytest.raises(StoreTimeoutError):
            await asyncio.wait_for(shared.send(b"key", [(b"PING",)]), 5)
        shared.close()


@pytest.mark.parametrize("hung", [1, 2])
async def test_sentinels_that_hang_are_passed_over(face: Face, server_binary: ServerBinary, hung: int) -> None:
    with ExitStack() as stack:
        setup = stack.enter_context(servers.sentinel(server_binary))
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100)) for _ in range(hung)]
        places = [f"127.0.0.1:{one.getsockname()[1]}" for one in silent]
        places.append(f"{setup.sentinel.host}:{setup.sentinel.port}")
        url = f"redis+sentinel://{','.join(places)}/{setup.service}?socket_timeout=0.7&socket_connect_timeout=0.7"
        async with managing(face, url, timeout=0.3) as manager:
            began = time.monotonic()
            await until_served(manager, "key")
            assert time.monotonic() - began < 10


# Names


NAME = "cluster.example"


class Resolver:
    """Lets a name lead to a port of this machine, whatever port is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = 0
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)

    def _resolve(self, host: Any, port: Any, *arguments: Any, **keywords: Any) -> Any:
        if host == NAME:
            host, port = "127.0.0.1", self.port
        return self._real(host, port, *arguments, **keywords)


@pytest.mark.parametrize("form", ["a URL", "a URL with fixed names", "a client"])
async def test_a_cluster_whose_nodes_are_all_elsewhere_is_found_by_its_name(
    face: Face, server: RedisServer, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    ask(server, "FLUSHALL")
    resolver = Resolver(monkeypatch)
    asynchronous = face is AsyncProxyManager
    async with contextlib.AsyncExitStack() as stack:
        after = stack.enter_context(ScriptedProxy(server))
        before = ScriptedProxy(server)
        resolver.port = before.port
        if form == "a client":
            api: Any = redis.asyncio if asynchronous else redis
            client = await stack.enter_async_context(closing(api.RedisCluster(host=NAME, port=7000)))
            store: Any = AsyncRedisStore(client) if asynchronous else RedisStore(client)
            manager = await stack.enter_async_context(closing(face(store, LIMITS)))
        else:
            option = "?dynamic_startup_nodes=no" if "fixed" in form else ""
            manager = await stack.enter_async_context(
                closing(face.from_url(f"redis+cluster://{NAME}:7000{option}", LIMITS))
            )
        assert await settled(manager.try_consume("key"))
        before.__exit__(None, None, None)
        with pytest.raises(StoreError):
            await settled(manager.try_consume("key"))
        resolver.port = after.port
        await until_served(Settled(manager), "key")
        for _ in range(3):
            assert await settled(manager.try_consume("key"))
        assert (await settled(manager.snapshot("key"))).consumed_tokens == 5
    if asynchronous:
        await asyncio.get_running_loop().shutdown_default_executor()  # in which names are resolved


async def test_a_cluster_without_some_slots_serves_the_others(
    server_binary: ServerBinary,
) -> None:
    with servers.cluster(server_binary) as cluster:
        ((mine,), (other,)) = keys_of(cluster, "partial")
        for node in cluster.nodes:
            ask(node, "CONFIG SET", "cluster-require-full-coverage", "no")
        slot = slot_of(cluster, mine)
        ask(cluster.nodes[0], "CLUSTER DELSLOTS", slot)
        async with both_faces(cluster.url) as managers:
            for manager in managers:
                assert await manager.try_consume(other)
                with pytest.raises(StoreUnavailableError):
                    await manager.try_consume(mine)
                assert await manager.try_consume(other)
            ask(cluster.nodes[0], "CLUSTER ADDSLOTS", slot)
            for manager in managers:
                await until_served(manager, mine)


# Clocks


def an_hour_ahead(command: list[bytes]) -> bytes | None:
    if command[0].upper() != b"TIME":
        return None
    seconds = b"%d" % (time.time() + 3_600)
    return b"*2\r\n$%d\r\n%s\r\n$1\r\n0\r\n" % (len(seconds), seconds)


async def test_the_time_of_one_node_is_never_taken_for_that_of_another(server_binary: ServerBinary) -> None:
    """The first node is an hour ahead; its slots move while its time is asked for along with each command."""
    with servers.cluster(server_binary) as cluster, ExitStack() as stack:
        source, target = cluster.nodes
        fronts = [stack.enter_context(ScriptedProxy(node, alone=False)) for node in cluster.nodes]
        fronts[0].answer = an_hour_ahead
        for node, front in zip(cluster.nodes, fronts, strict=True):
            node.restart("--cluster-announce-port", str(front.port))  # Redis 6 heeds it only from the beginning
        settled_by(lambda: all(announced(node) == {one.port for one in fronts} for node in cluster.nodes), "ports")
        async with both_faces(f"redis+cluster://127.0.0.1:{fronts[0].port}") as managers:
            for number, manager in enumerate(managers):
                ((moving,), (untouched,)) = keys_of(cluster, f"clocks {number}")
                assert await manager.try_consume(untouched, 6)
                assert await manager.try_consume(moving)
                slot = slot_of(cluster, moving)
                begin_to_move(source, target, slot)
                move_keys(source, target, moving)
                end_move(source, target, slot)
                assert await manager.try_consume(moving)
                now = pipeline_of(manager).requests.now
                assert abs(now(untouched.encode()) - time.time_ns()) < HOUR // 2
                assert abs(now(moving.encode()) - time.time_ns()) < HOUR // 2  # it is with the other node now
                assert await manager.available_tokens(untouched) == 4


def announced(node: RedisServer) -> set[int]:
    """The ports at which the nodes of a cluster want to be found, as one of them knows; none while it is down."""
    if ask(node, "CLUSTER INFO")["cluster_state"] != "ok":
        return set()
    return {int(port) for _, _, (_, port, *_), *_ in ask(node, "CLUSTER SLOTS")}
