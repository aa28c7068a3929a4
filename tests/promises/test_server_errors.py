"""Every error that a server can answer with: handled, or told as what it is, and over as soon as it is over there.

Memory, replicas that are missing, a replica that is asked, a server that loads its data as a replica, and permissions
are in :mod:`tests.promises.test_unavailable_servers` and :mod:`tests.promises.test_permissions`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import NamedTuple
from urllib.parse import quote

import pytest
import redis
import redis.asyncio
from redis.exceptions import RedisClusterException

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    Expiration,
    ProxyManager,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from tests.support import servers
from tests.support.both_faces import Face, Settled, closing
from tests.support.decision_paths import By, deciding_by
from tests.support.scripted_proxy import ScriptedProxy
from tests.support.servers import Cluster, RedisServer, SentinelSetup, ServerBinary, wait_until
from tests.support.topologies import ask, begin_to_move, end_move, move_keys
from tests.support.workers import patient

pytestmark = pytest.mark.redis

LIMITS = "1000000/day"
PASSWORD = "open sesame"


@pytest.fixture(params=[By.EITHER, By.SCRIPT], ids=["by swaps", "by the server"])
def way(request: pytest.FixtureRequest) -> Generator[None]:
    """Let either the client or the server decide."""
    with deciding_by(request.param):
        yield


@asynccontextmanager
async def managing(face: Face, url: str) -> AsyncGenerator[Settled]:
    async with closing(face.from_url(url, LIMITS, expiration=Expiration.none())) as manager:
        yield Settled(manager)


async def check_refusal(manager: Settled, key: str, kind: type[StoreError], match: str) -> None:
    """Check that a decision fails without doubt, and that the error names the key and no secret."""
    with pytest.raises(kind, match=match) as caught:
        await manager.try_consume(key)
    error = caught.value
    assert type(error) is kind
    assert not error.in_doubt
    assert error.key == key
    assert repr(key) in str(error)
    assert PASSWORD not in str(error)
    assert isinstance(error.__cause__, redis.RedisError | RedisClusterException | OSError)


async def until_served(manager: Settled, key: str) -> None:
    """Take a token as soon as the server gives one; check that no error before is in doubt."""
    async with asyncio.timeout(20):
        while True:
            try:
                assert await manager.try_consume(key)
            except StoreError as error:
                assert not error.in_doubt
                await asyncio.sleep(0.01)
            else:
                return


# One server


Trouble = Callable[[RedisServer], AbstractContextManager[None]]


@contextmanager
def disk_fails(server: RedisServer) -> Generator[None]:
    """Nothing can be written to a file whose name a directory has."""
    place = server.directory / "dump.rdb"
    place.unlink(missing_ok=True)
    place.mkdir()
    with server.client() as admin:

        def save(status: str) -> None:
            admin.bgsave()
            wait_until(lambda: not admin.info("persistence")["rdb_bgsave_in_progress"], "the server has tried to save")
            assert admin.info("persistence")["rdb_last_bgsave_status"] == status

        admin.config_set("save", "3600 1")
        try:
            save("err")
            yield
        finally:
            place.rmdir()
            save("ok")
            admin.config_set("save", "")


@contextmanager
def script_runs_on(server: RedisServer) -> Generator[None]:
    with server.client() as admin, server.client(socket_timeout=30) as busy:
        admin.config_set("lua-time-limit", 10)

        def loop() -> None:
            with pytest.raises(redis.ResponseError):  # it is killed
                busy.eval("while true do end", 0)

        def is_busy() -> bool:
            try:
                admin.ping()
            except redis.ResponseError as error:
                return "BUSY" in str(error)
            return False

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        wait_until(is_busy, "the server is busy with a script")
        try:
            yield
        finally:
            admin.script_kill()
            thread.join()
        admin.config_set("lua-time-limit", 5000)


@contextmanager
def scripts_are_forbidden(server: RedisServer) -> Generator[None]:
    with server.client() as admin:
        admin.execute_command("ACL SETUSER", "limiter", "-eval", "-evalsha")
        yield
        admin.execute_command("ACL SETUSER", "limiter", "+eval", "+evalsha")


@contextmanager
def memory_is_full(server: RedisServer) -> Generator[None]:
    with server.client() as admin:
        admin.config_set("maxmemory", 1)
        yield
        admin.config_set("maxmemory", 0)


class Case(NamedTuple):
    trouble: Trouble
    kind: type[StoreError]
    match: str


CASES = [
    Case(disk_fails, StoreUnavailableError, "cannot persist"),
    Case(script_runs_on, StoreUnavailableError, "busy with a script"),
    Case(memory_is_full, StoreUnavailableError, "out of memory"),
    Case(scripts_are_forbidden, StoreError, "may not do that"),
]


def make_user(server: RedisServer) -> None:
    commands = ("getrange", "set", "del", "time", "eval", "evalsha")
    ask(server, "ACL SETUSER", "limiter", "reset", "on", f">{PASSWORD}", "~*", *(f"+{command}" for command in commands))


@pytest.fixture
def limited_url(server: RedisServer) -> str:
    """The URL of a user who may do what the library does, and no more."""
    ask(server, "FLUSHALL")
    make_user(server)
    return f"redis://limiter:{quote(PASSWORD)}@{server.host}:{server.port}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.trouble.__name__)
async def test_a_trouble_of_the_server_is_told_and_over_with_it(
    face: Face, server: RedisServer, limited_url: str, case: Case
) -> None:
    with deciding_by(By.SCRIPT):
        async with managing(face, limited_url) as manager, managing(face, limited_url) as fresh:
            assert await manager.try_consume("used", 5)
            with case.trouble(server):
                for _ in range(3):
                    await check_refusal(manager, "used", case.kind, case.match)
                await check_refusal(fresh, "new", case.kind, case.match)
            await until_served(manager, "used")
            await until_served(fresh, "new")
            assert (await manager.snapshot("used")).consumed_tokens == 6
            assert (await manager.snapshot("new")).consumed_tokens == 1


async def test_a_removed_user_is_refused_until_it_is_back(face: Face, server: RedisServer, limited_url: str) -> None:
    async with managing(face, limited_url) as manager:
        assert await manager.try_consume("key")
        ask(server, "ACL DELUSER", "limiter")  # which closes its connections
        with pytest.raises(StoreError) as caught:
            await manager.try_consume("key")
        doubt = caught.value.in_doubt
        for _ in range(2):
            await check_refusal(manager, "key", StoreError, "user name or password")
        make_user(server)
        await until_served(manager, "key")
        assert 2 <= (await manager.snapshot("key")).consumed_tokens <= 2 + doubt


async def test_a_client_too_many_gets_an_error_that_says_so(face: Face, server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server, server.client() as admin:
        async with managing(face, server.url) as manager, managing(face, server.url) as late:
            assert await manager.try_consume("key")
            admin.config_set("maxclients", len(admin.client_list()))
            for _ in range(3):
                await check_refusal(late, "key", StoreUnavailableError, "(?i)max number of clients|too many clients")
                assert await manager.try_consume("key")
            admin.config_set("maxclients", 100)
            await until_served(late, "key")
            assert (await manager.snapshot("key")).consumed_tokens == 5


@pytest.mark.parametrize("topology", ["redis", "redis+cluster"])
@pytest.mark.parametrize(
    ("error", "match"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading its data"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "lost its master"),
        ("NOREPLICAS Not enough good replicas to write.", "too few replicas"),
        ("CLUSTERDOWN The cluster is down", "cluster is down"),
        ("READONLY You can't write against a read only replica.", "read-only replica"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "out of memory"),
        ("BUSY Redis is busy running a script.", "busy with a script"),
        ("MISCONF Redis is configured to save RDB snapshots", "cannot persist"),
        ("UNKILLABLE something that nobody has heard of", "Redis refused"),
    ],
    ids=lambda text: text.split()[0],
)
async def test_an_error_in_the_place_of_a_reply_is_told_and_over_with_it(
    face: Face, server: RedisServer, topology: str, error: str, match: str
) -> None:
    ask(server, "FLUSHALL")
    kind = StoreError if match == "Redis refused" else StoreUnavailableError
    with ScriptedProxy(server) as front, deciding_by(By.SCRIPT):
        async with managing(face, patient(f"{topology}://127.0.0.1:{front.port}")) as manager:
            assert await manager.try_consume("key", 5)
            front.answer = lambda command: b"-%s\r\n" % error.encode() if command[0].startswith(b"EVAL") else None
            for _ in range(2):
                await check_refusal(manager, "key", kind, match)
            front.answer = lambda _: None
            await until_served(manager, "key")
            assert (await manager.snapshot("key")).consumed_tokens == 6


# Cluster


@pytest.fixture(scope="module")
def cluster(server_binary: ServerBinary) -> Generator[Cluster]:
    with servers.cluster(server_binary) as cluster:
        yield cluster


def key_of(cluster: Cluster, node: int, name: str) -> tuple[str, int]:
    """A key that a node serves, and its slot."""
    half = servers.SLOTS // 2
    for number in range(1000):
        key = f"{name} {number}"
        slot = int(ask(cluster.nodes[0], "CLUSTER KEYSLOT", key))
        if slot // half == node:
            return key, slot
    raise AssertionError("no such key")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("known", [True, False], ids=["a bucket", "no bucket"])
async def test_a_slot_that_moves_is_followed_at_every_step(
    face: Face, cluster: Cluster, request: pytest.FixtureRequest, known: bool
) -> None:
    """ASK where the bucket has gone ahead of its slot or was not there, MOVED afterwards; to a node without scripts."""
    source, target = cluster.nodes
    key, slot = key_of(cluster, 0, f"{face.__name__} {request.node.name} {known}")
    async with managing(face, cluster.url) as manager, managing(face, cluster.url) as other:
        if known:
            assert await manager.try_consume(key)
        ask(target, "SCRIPT FLUSH")
        begin_to_move(source, target, slot)
        taken = int(known)
        for _ in range(2):
            for one in (manager, other):
                assert await one.try_consume(key)
                taken += 1
            if known:
                move_keys(source, target, key)
                ask(target, "SCRIPT FLUSH")
        end_move(source, target, slot)
        for _ in range(3):
            for one in (manager, other):
                assert await one.try_consume(key)
                taken += 1
        assert (await manager.snapshot(key)).consumed_tokens == taken
    begin_to_move(target, source, slot)
    move_keys(target, source, key)
    end_move(target, source, slot)


async def test_several_connections_follow_a_bucket_to_its_new_node(
    cluster: Cluster,
) -> None:
    """redis-py may send ASKING over one of them, and the command over another."""
    source, target = cluster.nodes
    key, slot = key_of(cluster, 0, "several connections")
    async with closing(redis.asyncio.RedisCluster(host=source.host, port=source.port)) as client:
        manager = AsyncProxyManager(AsyncRedisStore(client), LIMITS)
        assert await manager.try_consume(key)
        node = client.get_node(host=target.host, port=target.port)
        await asyncio.gather(*(client.execute_command("PING", target_nodes=node) for _ in range(4)))
        begin_to_move(source, target, slot)
        move_keys(source, target, key)
        for _ in range(3):
            assert await manager.try_consume(key)
        end_move(source, target, slot)
        assert (await manager.snapshot(key)).consumed_tokens == 4
        await manager.aclose()
    begin_to_move(target, source, slot)
    move_keys(target, source, key)
    end_move(target, source, slot)


@pytest.mark.usefixtures("way")
async def test_a_bucket_that_is_in_between_is_asked_for_again(face: Face, server: RedisServer) -> None:
    """TRYAGAIN, which servers answer to commands of several keys, and proxies to any."""
    ask(server, "FLUSHALL")
    with ScriptedProxy(server) as front:
        async with managing(face, patient(f"redis+cluster://127.0.0.1:{front.port}")) as manager:
            assert await manager.try_consume("key")
            left = 3

            def answer(command: list[bytes]) -> bytes | None:
                nonlocal left
                if not (command[0].startswith((b"EVAL", b"SET")) and left):
                    return None
                left -= 1
                return b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"

            front.answer = answer
            assert await manager.try_consume("key")
            left = 2**31
            with pytest.raises(StoreTimeoutError, match="still redirect") as caught:
                await manager.try_consume("key", timeout=0.5)
            assert (caught.value.key, caught.value.in_doubt) == ("key", False)
            left = 0
            await until_served(manager, "key")
            assert (await manager.snapshot("key")).consumed_tokens == 3


async def test_a_slot_that_nobody_serves_is_told_and_served_again(face: Face, cluster: Cluster) -> None:
    key, slot = key_of(cluster, 0, face.__name__)
    node = cluster.nodes[0]
    async with managing(face, cluster.url) as manager, managing(face, cluster.url) as fresh:
        assert await manager.try_consume(key)
        ask(node, "CLUSTER DELSLOTS", slot)
        await check_refusal(manager, key, StoreUnavailableError, "(?i)cluster")
        await check_refusal(manager, key, StoreUnavailableError, "(?i)cluster|cover")
        await check_refusal(fresh, key, StoreUnavailableError, "(?i)cluster|cover")
        ask(node, "CLUSTER ADDSLOTS", slot)
        wait_until(lambda: ask(node, "CLUSTER INFO")["cluster_state"] == "ok", "all slots are served")
        await until_served(manager, key)
        await until_served(fresh, key)
        assert (await manager.snapshot(key)).consumed_tokens == 3


async def test_a_node_that_has_lost_its_majority_is_told_and_serves_again(cluster: Cluster) -> None:
    key, _ = key_of(cluster, 0, "lonely")
    mine, other = cluster.nodes
    async with managing(ProxyManager, cluster.url) as manager, managing(AsyncProxyManager, cluster.url) as amanager:
        for one in (manager, amanager):
            assert await one.try_consume(key)
        other.kill()
        try:
            wait_until(lambda: ask(mine, "CLUSTER INFO")["cluster_state"] == "fail", "it is alone")
            for one in (manager, amanager) * 3:
                await check_refusal(one, key, StoreUnavailableError, "(?i)cluster")
        finally:
            other.restart()
        for node in cluster.nodes:
            wait_until(lambda n=node: ask(n, "CLUSTER INFO")["cluster_state"] == "ok", "it is whole", 30)  # type: ignore[misc]
        for one in (manager, amanager):
            await until_served(one, key)
        assert (await manager.snapshot(key)).consumed_tokens == 4


# Sentinel


async def test_a_service_that_sentinel_does_not_know_is_told(face: Face, server_binary: ServerBinary) -> None:
    configuration = "sentinel monitor mymaster 127.0.0.1 1 1\n"
    with RedisServer.start(server_binary, "--sentinel", configuration=configuration) as sentinel:
        url = f"redis+sentinel://:{quote(PASSWORD)}@{sentinel.host}:{sentinel.port}/other"
        async with managing(face, url) as manager:
            await check_refusal(manager, "key", StoreUnavailableError, "No master found for 'other'")


@pytest.mark.parametrize("query", ["", "?sentinel_password=guessed"], ids=["none", "a wrong one"])
async def test_a_password_that_sentinel_refuses_is_told_with_its_name(
    face: Face, server_binary: ServerBinary, query: str
) -> None:
    configuration = f'requirepass "{PASSWORD}"\nsentinel monitor mymaster 127.0.0.1 1 1\n'
    with RedisServer.start(server_binary, "--sentinel", configuration=configuration) as sentinel:
        places = f"127.0.0.1:1,{sentinel.host}:{sentinel.port}"
        async with managing(face, f"redis+sentinel://{places}/mymaster{query}") as manager:
            match = f"Sentinel refused the user name or password.*{sentinel.port}: AuthenticationError"
            await check_refusal(manager, "key", StoreError, match)


async def test_a_master_that_was_made_a_replica_is_left_for_the_new_one(
    face: Face, server_binary: ServerBinary
) -> None:
    """READONLY on a connection that has survived, and then a server that has none of the scripts."""
    with servers.sentinel(server_binary) as setup, deciding_by(By.SCRIPT):
        async with managing(face, setup.url) as manager:
            for _ in range(3):
                assert await manager.try_consume("key")
            swap_roles(setup)
            await until_served(manager, "key")  # Sentinel names the new master a moment before it vouches for it
            assert await manager.try_consume("key")
            assert (await manager.snapshot("key")).consumed_tokens == 5
            assert ask(setup.replica, "EXISTS", "key")


async def test_a_master_that_its_replicas_have_left_is_left_for_the_new_one(
    face: Face, server_binary: ServerBinary
) -> None:
    """NOREPLICAS: Sentinel would take ten seconds to make a replica of it."""
    with servers.sentinel(server_binary) as setup:
        async with managing(face, setup.url) as manager:
            assert await manager.try_consume("key", 3)
            # Not before: a replica may be a second behind at any time.
            ask(setup.master, "CONFIG SET", "min-replicas-max-lag", 1)
            ask(setup.master, "CONFIG SET", "min-replicas-to-write", 1)
            promote(setup)
            wait_until(lambda: refuses(setup.master), "the former master refuses to write")
            await until_served(manager, "key")
            assert ask(setup.master, "ROLE")[0] == "master"
            assert (await manager.snapshot("key")).consumed_tokens == 4


def refuses(server: RedisServer) -> bool:
    try:
        ask(server, "SET", "another", "value")
    except redis.ResponseError as error:
        return "NOREPLICAS" in str(error)
    return False


def swap_roles(setup: SentinelSetup) -> None:
    """Let Sentinel make the replica the master, and the former master follow it."""
    promote(setup)
    ask(setup.master, "REPLICAOF", setup.replica.host, setup.replica.port)


def promote(setup: SentinelSetup) -> None:
    """Let Sentinel make the replica the master."""
    former, new = setup.master, setup.replica
    offset = ask(former, "ROLE")[1]
    wait_until(lambda: ask(new, "ROLE")[-1] >= offset, "the replica has everything")
    ask(new, "SCRIPT FLUSH")
    ask(setup.sentinel, "SENTINEL FAILOVER", setup.service)
    wait_until(lambda: setup.is_master(new) and ask(new, "ROLE")[0] == "master", "the replica is the master")
