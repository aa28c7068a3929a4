"""One scenario over every kind of client and server that redis-py knows, sync and asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
from redis.backoff import ExponentialBackoff
from redis.cache import CacheConfig

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    BucketConfiguration,
    Expiration,
    ProxyManager,
    RedisStore,
    StoreUnavailableError,
)
from ratelimit.testing import areset_all, reset_all
from tests.support import servers
from tests.support.both_faces import Manager, closing, settled
from tests.support.servers import Cluster, RedisServer, SentinelSetup, ServerBinary, TlsServer, wait_until

pytestmark = pytest.mark.redis

LIMITS = BucketConfiguration.parse("5/hour")
PASSWORD = "a/b:c@d?e#f%g h"


class Face(NamedTuple):
    name: str
    manager: type[ProxyManager | AsyncProxyManager]
    store: Any
    redis: ModuleType
    retry: Any

    def over(self, client: Any) -> Manager:
        return self.manager(self.store(client), LIMITS)

    def from_url(self, url: str) -> Manager:
        return self.manager.from_url(url, LIMITS)


SYNC = Face("sync", ProxyManager, RedisStore, redis, redis.retry.Retry)
ASYNCIO = Face("asyncio", AsyncProxyManager, AsyncRedisStore, redis.asyncio, redis.asyncio.retry.Retry)


@pytest.fixture(params=[SYNC, ASYNCIO], ids=lambda face: face.name)
def face(request: pytest.FixtureRequest) -> Face:
    chosen: Face = request.param
    return chosen


@pytest.fixture(scope="module")
def cluster(server_binary: ServerBinary) -> Generator[Cluster]:
    with servers.cluster(server_binary) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sentinel(server_binary: ServerBinary) -> Generator[SentinelSetup]:
    with servers.sentinel(server_binary) as setup:
        yield setup


async def check_scenario(manager: Manager, other: Manager, key: str = "user:42") -> None:
    """Check what a service does with a bucket that it shares with another one."""
    await settled(manager.remove(key))
    assert await settled(manager.configuration(key)) is None

    assert await settled(manager.try_consume(key))
    assert await settled(manager.try_consume(key))
    assert await settled(other.try_consume_and_return_remaining(key))
    assert await settled(manager.available_tokens(key)) == 2
    assert await settled(manager.consume(key, 2))

    probe = await settled(manager.try_consume_and_return_remaining(key))
    assert (probe.consumed, probe.remaining_tokens) == (False, 0)
    assert 0 < probe.nanos_to_wait_for_refill <= 720 * 10**9
    assert not await settled(manager.consume(key, max_wait=1))
    assert not await settled(other.try_consume(key))

    snapshot = await settled(manager.snapshot(key))
    assert (snapshot.consumed_tokens, snapshot.configuration, snapshot.configuration_version) == (5, LIMITS, None)
    assert await settled(other.configuration(key)) == LIMITS

    await settled(other.remove(key))
    assert await settled(manager.configuration(key)) is None
    assert await settled(manager.try_consume(key, 5))
    assert await settled(manager.bucket(key, expiration=Expiration.none()).available_tokens()) == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as redis-py has it"),
        pytest.param({"decode_responses": True}, id="decode_responses"),
        pytest.param({"decode_responses": True, "encoding": "ascii"}, id="decode_responses in ASCII"),
        pytest.param({"protocol": 2}, id="RESP2"),
        pytest.param({"protocol": 3}, id="RESP3"),
        pytest.param({"protocol": 3, "decode_responses": True}, id="RESP3 and decode_responses"),
        pytest.param({"single_connection_client": True}, id="a single connection"),
        pytest.param({"max_connections": 1}, id="one connection at a time"),
        pytest.param({"health_check_interval": 0.001}, id="health checks"),
        pytest.param({"db": 7, "client_name": "limiter"}, id="a database and a name"),
    ],
)
async def test_a_client_of_the_caller_serves(face: Face, server: RedisServer, options: dict[str, Any]) -> None:
    async with (
        closing(face.redis.Redis(host=server.host, port=server.port, **options)) as client,
        closing(face.redis.Redis(host=server.host, port=server.port, db=options.get("db", 0))) as other,
    ):
        await check_scenario(face.over(client), face.over(other))


async def test_a_client_with_retries_serves(face: Face, server: RedisServer) -> None:
    retry = face.retry(ExponentialBackoff(), 3)
    async with closing(face.redis.Redis(host=server.host, port=server.port, retry=retry)) as client:
        await check_scenario(face.over(client), face.over(client))


async def test_a_client_with_a_cache_of_its_own_serves(server: RedisServer) -> None:
    if server.binary.name != "Redis" or [int(part) for part in server.version.split(".")[:2]] < [7, 4]:
        pytest.skip(f"redis-py has such a cache for Redis 7.4 and newer, not for {server.binary}")
    with server.client(protocol=3, cache_config=CacheConfig()) as client, server.client() as other:
        await check_scenario(SYNC.over(client), SYNC.over(other))


async def test_a_client_with_a_blocking_pool_serves(face: Face, server: RedisServer) -> None:
    pool = face.redis.BlockingConnectionPool.from_url(server.url, max_connections=1, timeout=5)
    async with closing(face.redis.Redis.from_pool(pool)) as client:
        await check_scenario(face.over(client), face.over(client))


async def test_a_url_serves(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(server.url)) as manager, closing(face.from_url(server.url)) as other:
        await check_scenario(manager, other)


async def test_sync_and_asyncio_code_share_buckets(server: RedisServer) -> None:
    async with closing(SYNC.from_url(server.url)) as manager, closing(ASYNCIO.from_url(server.url)) as other:
        await check_scenario(manager, other)


async def test_a_unix_socket_serves(face: Face, server: RedisServer) -> None:
    url = f"unix://{server.unix_socket}"
    async with closing(face.from_url(url)) as manager, closing(face.from_url(server.url)) as other:
        await check_scenario(manager, other)


async def test_a_unix_socket_has_databases(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(f"unix://{server.unix_socket}?db=5")) as manager:
        await settled(manager.try_consume("a key of database 5"))
    with server.client(db=5) as client:
        assert client.exists("a key of database 5")


async def test_a_url_chooses_the_database(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(f"redis://{server.host}:{server.port}/3")) as manager:
        await settled(manager.try_consume("a key of database 3"))
    with server.client(db=3) as third, server.client() as first:
        assert third.exists("a key of database 3")
        assert not first.exists("a key of database 3")


async def test_a_url_holds_a_password(face: Face, server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary, "--requirepass", PASSWORD) as server:
        url = f"redis://:{quote(PASSWORD, safe='')}@{server.host}:{server.port}"
        async with closing(face.from_url(url)) as manager, closing(face.from_url(url)) as other:
            await check_scenario(manager, other)


async def test_a_url_holds_a_user_and_a_password(face: Face, server: RedisServer) -> None:
    with server.client() as admin:
        admin.acl_setuser("limiter", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"])
    url = f"redis://limiter:{quote(PASSWORD, safe='')}@{server.host}:{server.port}"
    async with closing(face.from_url(url)) as manager, closing(face.from_url(server.url)) as other:
        await check_scenario(manager, other)


async def test_tls_serves_with_a_private_authority_and_a_client_certificate(face: Face, tls_server: TlsServer) -> None:
    _, address, authority, certificate = tls_server
    url = f"rediss://{address}/0?ssl_ca_certs={authority}&ssl_certfile={certificate}&ssl_keyfile={certificate}"
    async with closing(face.from_url(url)) as manager, closing(face.from_url(tls_server.server.url)) as other:
        await check_scenario(manager, other)


async def test_tls_serves_a_client_of_the_caller(face: Face, tls_server: TlsServer) -> None:
    with tls_server.server.client() as admin:
        admin.config_set("tls-auth-clients", "no")
    host, port = tls_server.address.split(":")
    options = {"ssl": True, "ssl_ca_certs": str(tls_server.authority), "decode_responses": True}
    async with closing(face.redis.Redis(host=host, port=int(port), **options)) as client:
        await check_scenario(face.over(client), face.over(client))


async def test_tls_with_an_unknown_authority_is_refused(face: Face, tls_server: TlsServer) -> None:
    async with closing(face.from_url(f"rediss://{tls_server.address}")) as manager:
        with pytest.raises(StoreUnavailableError, match="certificate verify failed"):
            await settled(manager.try_consume("user:42"))


def keys_on_both_nodes(cluster: Cluster) -> list[str]:
    with redis.RedisCluster(host=cluster.nodes[0].host, port=cluster.nodes[0].port) as client:
        by_node = {client.keyslot(key) // (servers.SLOTS // 2): key for key in (f"user:{i}" for i in range(20))}
    assert len(by_node) == len(cluster.nodes)
    return list(by_node.values())


async def test_a_cluster_url_serves(face: Face, cluster: Cluster) -> None:
    async with closing(face.from_url(cluster.url)) as manager, closing(face.from_url(cluster.url)) as other:
        for key in keys_on_both_nodes(cluster):
            await check_scenario(manager, other, key)


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3}, {"protocol": 2}], ids=str)
async def test_a_cluster_client_serves(face: Face, cluster: Cluster, options: dict[str, Any]) -> None:
    node = cluster.nodes[1]
    async with closing(face.redis.RedisCluster(host=node.host, port=node.port, **options)) as client:
        for key in keys_on_both_nodes(cluster):
            await check_scenario(face.over(client), face.over(client), key)


async def test_a_bucket_stays_itself_when_its_slot_moves_to_another_node(face: Face, cluster: Cluster) -> None:
    key = f"a key that moves, {face.name}"
    async with closing(face.from_url(cluster.url)) as manager:
        assert await settled(manager.try_consume(key, 3))
        move_slot(cluster, key)
        assert await settled(manager.try_consume(key, 2))
        assert not await settled(manager.try_consume(key))
        assert (await settled(manager.snapshot(key))).consumed_tokens == 5


def move_slot(cluster: Cluster, key: str) -> None:
    def ask(node: RedisServer, *command: str | int) -> Any:
        with node.client() as client:
            return client.execute_command(*command)

    slot = ask(cluster.nodes[0], "CLUSTER KEYSLOT", key)
    half = servers.SLOTS // 2
    source, target = cluster.nodes if slot < half else reversed(cluster.nodes)
    source_id, target_id = (ask(node, "CLUSTER MYID").decode() for node in (source, target))
    ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    ask(source, "MIGRATE", target.host, target.port, key, 0, 5000)
    for node in (target, source):
        ask(node, "CLUSTER SETSLOT", slot, "NODE", target_id)


async def test_a_sentinel_url_serves(face: Face, sentinel: SentinelSetup) -> None:
    async with closing(face.from_url(sentinel.url)) as manager, closing(face.from_url(sentinel.url)) as other:
        await check_scenario(manager, other)


async def test_a_sentinel_url_chooses_the_database(face: Face, sentinel: SentinelSetup) -> None:
    async with closing(face.from_url(f"{sentinel.url}/4")) as manager:
        await settled(manager.try_consume("a key of database 4"))
    with sentinel.master.client(db=4) as client:
        assert client.exists("a key of database 4")


async def test_a_client_that_sentinel_gives_serves(face: Face, sentinel: SentinelSetup) -> None:
    watcher = sentinel.sentinel
    finder = face.redis.Sentinel([(watcher.host, watcher.port)])
    async with closing(finder.master_for(sentinel.service)) as client:
        await check_scenario(face.over(client), face.over(client))
    for asked in finder.sentinels:
        async with closing(asked):
            pass


def connections(server: RedisServer) -> int:
    """Count the connections to a server: clients, not replicas, nor the one that asks."""
    with server.client() as client:
        return len(client.client_list(_type="normal")) - 1


def check_released(server: RedisServer, before: int) -> None:
    # a server sees the end of a connection a moment after the client does
    wait_until(lambda: connections(server) <= before, f"{server!r} has {before} connections again", 5)


async def test_a_manager_by_url_releases_its_connections(face: Face, server: RedisServer) -> None:
    before = connections(server)
    async with closing(face.from_url(server.url)) as manager:
        await settled(manager.try_consume("user:42"))
        assert connections(server) > before
    check_released(server, before)


async def test_a_manager_of_a_cluster_releases_its_connections(face: Face, cluster: Cluster) -> None:
    before = [connections(node) for node in cluster.nodes]
    async with closing(face.from_url(cluster.url)) as manager:
        for key in keys_on_both_nodes(cluster):
            await settled(manager.try_consume(key))
        assert all(connections(node) > count for node, count in zip(cluster.nodes, before, strict=True))
    for node, count in zip(cluster.nodes, before, strict=True):
        check_released(node, count)


async def test_a_manager_over_sentinel_releases_its_connections(face: Face, sentinel: SentinelSetup) -> None:
    asked = [sentinel.master, sentinel.sentinel]
    before = [connections(server) for server in asked]
    async with closing(face.from_url(sentinel.url)) as manager:
        await settled(manager.try_consume("user:42"))
        assert connections(sentinel.master) > before[0]
    for server, count in zip(asked, before, strict=True):
        check_released(server, count)


async def test_closing_a_manager_that_never_did_anything_is_fine(
    face: Face, server: RedisServer, cluster: Cluster, sentinel: SentinelSetup
) -> None:
    for url in (server.url, cluster.url, sentinel.url, f"unix://{server.unix_socket}", "memory://"):
        async with closing(face.from_url(url)):
            pass


async def test_closing_a_manager_twice_is_fine(
    face: Face, server: RedisServer, cluster: Cluster, sentinel: SentinelSetup
) -> None:
    for url in (server.url, cluster.url, sentinel.url):
        async with closing(face.from_url(url)) as manager, closing(manager):
            await settled(manager.try_consume("user:42"))


@pytest.mark.parametrize("options", [{}, {"single_connection_client": True}], ids=["a pool", "a single connection"])
async def test_the_callers_client_outlives_the_manager(
    face: Face, server: RedisServer, options: dict[str, Any]
) -> None:
    async with closing(face.redis.Redis(host=server.host, port=server.port, **options)) as client:
        connection = await settled(client.client_id())
        async with closing(face.over(client)) as manager:
            await settled(manager.try_consume("user:42"))
        assert connection in [int(one["id"]) for one in await settled(client.client_list())]
        assert await settled(face.over(client).configuration("user:42")) == LIMITS


async def test_the_callers_cluster_client_outlives_the_manager(face: Face, cluster: Cluster) -> None:
    node = cluster.nodes[0]
    async with closing(face.redis.RedisCluster(host=node.host, port=node.port)) as client:
        await settled(client.get("user:42"))
        async with closing(face.over(client)) as manager:
            await settled(manager.try_consume("user:42"))
        before = [connections(node) for node in cluster.nodes]
        assert await settled(client.get("user:42"))
        assert all(connections(node) >= count for node, count in zip(cluster.nodes, before, strict=True))


async def until_served(manager: Manager) -> None:
    for _ in range(1000):
        try:
            await settled(manager.configuration("user:42"))
        except StoreUnavailableError:
            await asyncio.sleep(0.01)
        else:
            return


async def test_sentinel_leads_to_the_new_master_after_a_failover(face: Face, server_binary: ServerBinary) -> None:
    with servers.sentinel(server_binary) as setup:
        async with closing(face.from_url(setup.url)) as manager:
            assert await settled(manager.try_consume("user:42", 5))
            with setup.master.client() as client:
                client.set("the last write", "of this connection, which WAIT waits for")
                assert client.wait(1, 5000) == 1
            setup.master.kill()
            with pytest.raises(StoreUnavailableError):
                await settled(manager.try_consume("user:42"))
            # Sentinel names the new master a moment before it vouches for it
            wait_until(lambda: setup.is_master(setup.replica), "failover to the replica")
            await until_served(manager)
            assert not await settled(manager.try_consume("user:42"))
            assert (await settled(manager.snapshot("user:42"))).consumed_tokens == 5


@pytest.mark.parametrize("topology", ["cluster", "sentinel"])
async def test_all_buckets_under_a_prefix_are_removed_and_no_others(
    face: Face, topology: str, request: pytest.FixtureRequest
) -> None:
    servers_of: Cluster | SentinelSetup = request.getfixturevalue(topology)
    keys = [f"user:{number}" for number in range(20)]
    async with (
        closing(face.manager.from_url(servers_of.url, LIMITS, prefix="reset[*]:")) as manager,
        closing(face.manager.from_url(servers_of.url, LIMITS, prefix="reset*:")) as other,
    ):
        for _ in range(2):
            for key in keys:
                assert await settled(manager.try_consume(key, 5))
            await settled(other.try_consume("kept", 5))
            if isinstance(manager, ProxyManager):
                reset_all(manager)
            else:
                await areset_all(manager)
            assert [await settled(manager.configuration(key)) for key in keys] == [None] * len(keys)
            assert await settled(other.available_tokens("kept")) == 0
        await settled(other.remove("kept"))


def test_a_store_says_where_its_servers_are(face: Face, cluster: Cluster, sentinel: SentinelSetup) -> None:
    kind = face.store.__name__
    node = cluster.nodes[0]
    by_sentinel = f"{kind}({sentinel.service}/0 by Sentinel at 127.0.0.1:{sentinel.sentinel.port})"
    assert repr(face.from_url(cluster.url).store) == f"{kind}(cluster at {node.host}:{node.port})"
    assert repr(face.from_url(sentinel.url).store) == by_sentinel
    client = face.redis.RedisCluster(host=node.host, port=node.port)
    assert f"{node.host}:{node.port}" in repr(face.store(client))
    if face is SYNC:
        client.close()
