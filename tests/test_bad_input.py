"""What goes wrong is told clearly, and leaves what is stored alone; what is only odd works."""

from __future__ import annotations

import re
import socket
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest
import redis
from redis.exceptions import RedisClusterException

from ratelimit import (
    NEVER,
    AsyncProxyManager,
    Bandwidth,
    BucketConfiguration,
    CorruptStateError,
    InvalidArgumentError,
    InvalidConfigurationError,
    ProxyManager,
    ReservationOverflowError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    SystemClock,
    TokensInheritance,
    UnsupportedStateError,
)
from tests.support import servers
from tests.support.faces import Manager, closing, settled
from tests.support.servers import RedisServer, ServerBinary, wait_until
from tests.support.topologies import ask, begin_to_move

pytestmark = pytest.mark.redis

LIMITS = BucketConfiguration.parse("10/minute")
KEY = "user:42"
PREFIX = "rl:"
PASSWORD = "open sesame"

ACL_COMMANDS = ("eval", "evalsha", "getrange", "set", "del", "time")
"""All that the library sends to a server, or runs there in a script."""

ACL_COMMANDS_FOR_A_DATABASE = ("select",)
"""What redis-py sends besides where the database is not 0."""

ACL_COMMANDS_FOR_A_CLUSTER = ("cluster|slots", "command", "asking")
"""What is sent besides to a cluster."""

VERBS: dict[str, Callable[[Manager], Any]] = {
    "try_consume": lambda manager: manager.try_consume(KEY),
    "try_consume_and_return_remaining": lambda manager: manager.try_consume_and_return_remaining(KEY),
    "try_consume_as_much_as_possible": lambda manager: manager.bucket(KEY).try_consume_as_much_as_possible(2),
    "consume_ignoring_rate_limits": lambda manager: manager.bucket(KEY).consume_ignoring_rate_limits(1),
    "consume": lambda manager: manager.consume(KEY, max_wait=1),
    "estimate_ability_to_consume": lambda manager: manager.bucket(KEY).estimate_ability_to_consume(1),
    "available_tokens": lambda manager: manager.available_tokens(KEY),
    "add_tokens": lambda manager: manager.bucket(KEY).add_tokens(1),
    "force_add_tokens": lambda manager: manager.bucket(KEY).force_add_tokens(1),
    "give_back": lambda manager: manager.bucket(KEY).give_back(1),
    "hold_back": lambda manager: manager.bucket(KEY).hold_back(1),
    "reset": lambda manager: manager.reset(KEY),
    "replace_configuration": lambda manager: manager.replace_configuration(KEY, "5/s", TokensInheritance.AS_IS),
    "snapshot": lambda manager: manager.snapshot(KEY),
    "verbose": lambda manager: manager.bucket(KEY).verbose.try_consume(),
    "configuration": lambda manager: manager.configuration(KEY),
    "remove": lambda manager: manager.remove(KEY),
}

READING_VERBS = {name: verb for name, verb in VERBS.items() if name != "remove"}

TOKEN_VERBS: dict[str, Callable[[Manager, Any], Any]] = {
    "try_consume": lambda manager, tokens: manager.try_consume(KEY, tokens),
    "try_consume_and_return_remaining": lambda manager, tokens: manager.try_consume_and_return_remaining(KEY, tokens),
    "consume_ignoring_rate_limits": lambda manager, tokens: manager.bucket(KEY).consume_ignoring_rate_limits(tokens),
    "consume": lambda manager, tokens: manager.consume(KEY, tokens),
    "estimate_ability_to_consume": lambda manager, tokens: manager.bucket(KEY).estimate_ability_to_consume(tokens),
    "add_tokens": lambda manager, tokens: manager.bucket(KEY).add_tokens(tokens),
    "force_add_tokens": lambda manager, tokens: manager.bucket(KEY).force_add_tokens(tokens),
    "give_back": lambda manager, tokens: manager.bucket(KEY).give_back(tokens),
    "verbose": lambda manager, tokens: manager.bucket(KEY).verbose.try_consume(tokens),
}

every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)

Face = type[ProxyManager | AsyncProxyManager]


@pytest.fixture(params=[ProxyManager, AsyncProxyManager], ids=["sync", "asyncio"])
def face(request: pytest.FixtureRequest) -> Face:
    chosen: Face = request.param
    return chosen


@pytest.fixture(scope="module")
def stopped_server(server_binary: ServerBinary) -> Generator[RedisServer]:
    with RedisServer.start(server_binary) as server:
        server.stop()
        yield server


@pytest.fixture
def admin(server: RedisServer) -> Generator[redis.Redis]:
    with server.client() as client:
        client.flushall()
        client.script_flush()
        yield client


def contents(client: redis.Redis) -> dict[bytes, Any]:
    """Tell what is stored; times to live run, and are not among it."""
    keys: Any = client.keys()
    return {key: client.dump(key) for key in keys}


@contextmanager
def nothing_written(client: redis.Redis) -> Generator[None]:
    """Check that what is stored, and how long it is to live, stays as it is."""

    def stored() -> dict[bytes, tuple[Any, int | None]]:
        return {key: (dump, end_of_life(key)) for key, dump in contents(client).items()}

    def end_of_life(key: bytes) -> int | None:
        """Tell when a key expires, in milliseconds since the epoch."""
        with client.pipeline() as pipeline:
            pipeline.pttl(key)
            pipeline.time()
            ttl, (seconds, microseconds) = pipeline.execute()
        return None if ttl < 0 else seconds * 1000 + microseconds // 1000 + ttl

    before = stored()
    yield
    for key, (dump, end) in stored().items():
        assert before.pop(key) == (dump, end and pytest.approx(end, abs=1000))
    assert not before


async def check_failure(
    manager: Manager,
    kind: type[StoreError | CorruptStateError],
    match: str,
    verb: Callable[[Manager], Any] = VERBS["try_consume"],
) -> Any:
    """Check that a verb fails with just this error, which tells the key as the caller gave it, and the cause."""
    with pytest.raises(kind, match=match) as caught:
        await settled(verb(manager))
    error = caught.value
    assert type(error) is kind
    assert error.key == KEY
    assert repr(KEY) in str(error)
    if isinstance(error, StoreError):
        assert isinstance(error.__cause__, redis.RedisError | RedisClusterException | OSError)
    return error


# URLs


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("", "redis://host:port/db"),
        ("localhost:6379", "redis://host:port/db"),
        ("redis//localhost", "redis must be followed by ://"),
        ("redis:/localhost", "redis must be followed by ://"),
        ("http://localhost", "the scheme must be one of memory, redis, .*; got 'http'$"),
        ("redis+sentinels://localhost/service", r"got 'redis\+sentinels'; did you mean redis\+sentinel://"),
        ("rediss+sentinal://localhost/service", r"did you mean rediss\+sentinel://"),
        ("valkey+cluster://localhost", r"did you mean redis\+cluster://"),
        ("sentinel://localhost", r"did you mean redis\+sentinel://"),
        ("redis+socket:///redis.sock", "did you mean unix://"),
        ("memory://localhost", "memory:// must stand alone"),
        ("redis://localhost:port", "the port must be a number from 1 to 65535; got text, which is hidden"),
        ("redis://ali:sesame@localhost:port", "the port must be a number from 1 to 65535; got 'port'"),
        ("redis://localhost:65536", "the port must be a number from 1 to 65535; got '65536'"),
        ("redis://localhost:0", "the port must be a number from 1 to 65535; got '0'"),
        ("redis://[::1", "the host must be a name or an address, one of IPv6 in brackets"),
        ("redis://::1:6379", "the host must be a name or an address, one of IPv6 in brackets"),
        ("redis://local host", "the host must be a name or an address"),
        (f"redis://{'a.' * 127}a", "the host must be a name of at most 253 characters"),
        ("redis+cluster://localhost:65536", "the port must be a number from 1 to 65535; got '65536'"),
        ("redis+sentinel://localhost,[::1/service", "the host must be a name or an address, one of IPv6 in brackets"),
        ("redis://localhost/one", "the database must be a number of 0 or more; got 'one'"),
        ("redis://localhost/-1", "the database must be a number of 0 or more; got '-1'"),
        ("redis://localhost?db=-1", "the database must be a number of 0 or more; got -1"),
        ("redis://localhost?db=one", "'db'"),
        ("redis://localhost?socket_timeout=soon", "'socket_timeout'"),
        ("redis://localhost?socket_timeout=-1", "socket_timeout"),
        ("redis://localhost?socket_connect_timeout=nan", "socket_connect_timeout"),
        ("redis://localhost?timeout=-1", "timeout"),
        ("redis://localhost?max_connections=-1", "max_connections"),
        ("redis://localhost?protocol=4", "protocol"),
        ("redis://localhost?nonsense=1", "nonsense"),
        ("redis://localhost?retry=3", "retry"),
        ("redis://localhost/0/1", "database"),
        ("redis://localhost?redis_connect_func=1", "redis_connect_func"),
        ("redis://localhost?encoding=nonsense", "encoding"),
        ("rediss://localhost?ssl_cert_reqs=maybe", "maybe"),
        ("unix://", "path"),
        ("redis+cluster://", "host"),
        ("redis+cluster://localhost/1", "database"),
        ("redis+cluster://localhost?dynamic_startup_nodes=perhaps", "dynamic_startup_nodes must be yes or no"),
        ("redis://localhost?dynamic_startup_nodes=no", "dynamic_startup_nodes"),
        ("redis+sentinel://localhost", "service"),
        ("redis+sentinel:///service", "hosts"),
        ("redis+sentinel://localhost:port/service", "the port must be"),
        (None, "str"),
        (b"redis://localhost", "str"),
    ],
)
def test_a_wrong_url_is_refused_at_once(face: Face, url: Any, wrong: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=wrong) as caught:
        face.from_url(url, LIMITS)
    assert caught.value.field == "url"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame@localhost:port",
        "redis://:sesame",
        "redis://:sesame/0",
        "redis://ali:1/sesame[@localhost",
        "redis://:[sesame@localhost",
        "redis+sentinel://ali:sesame/service",
        "redis//:sesame@localhost",
        "redis:/:1://sesame@localhost",
        "unix://ali:open#sesame@/redis.sock",
        "http://:sesame@localhost",
        "redis://:sesame@localhost/one",
        "redis://ali:sesame@localhost?nonsense=1",
        "redis://:open/sesame@localhost/0",
        "redis://:open#sesame@localhost/0",
        "redis://:1/sesame@localhost/0",
        "redis://:open@/sesame@localhost/0",
        "redis://:open@?sesame=1@localhost/0",
        "redis://localhost?password=sesame&nonsense=1",
        "redis+cluster://:sesame@localhost/1",
        "redis+sentinel://:sesame@localhost",
        "redis+sentinel://:open,sesame@localhost:port/service",
        "redis+sentinel://localhost/service?sentinel_password=sesame&nonsense=1",
    ],
)
def test_an_error_about_a_url_tells_no_password(face: Face, url: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        face.from_url(url, LIMITS)
    assert "sesame" not in "".join(traceback.format_exception(caught.value))
    assert "sesame" not in repr(caught.value)


# Servers


@every_verb
async def test_without_a_server_every_verb_says_so(
    face: Face, stopped_server: RedisServer, verb: Callable[[Manager], Any]
) -> None:
    async with closing(face.from_url(stopped_server.url, LIMITS, prefix=PREFIX)) as manager:
        error = await check_failure(manager, StoreUnavailableError, "(?i)connect", verb)
        assert not error.in_doubt


async def test_without_a_socket_the_error_says_so(face: Face) -> None:
    async with closing(face.from_url("unix:///nowhere/redis.sock", LIMITS)) as manager:
        await check_failure(manager, StoreUnavailableError, "/nowhere/redis.sock")


async def test_without_a_cluster_the_error_says_so(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(f"redis+cluster://{server.host}:{server.port}", LIMITS)) as manager:
        await check_failure(manager, StoreUnavailableError, "(?i)cluster")


async def test_without_sentinels_the_error_says_so(face: Face, stopped_server: RedisServer) -> None:
    place = f"{stopped_server.host}:{stopped_server.port}"
    url = f"redis+sentinel://:sesame@{place}/service?sentinel_password=sesame"
    async with closing(face.from_url(url, LIMITS)) as manager:
        error = await check_failure(manager, StoreUnavailableError, "No master found for 'service'")
        assert not error.in_doubt
        assert "sesame" not in str(error)


async def test_silent_sentinels_are_not_asked_over_and_over(face: Face) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        silent.setblocking(False)
        port = silent.getsockname()[1]
        url = f"redis+sentinel://127.0.0.1:{port}/service?socket_timeout=0.05"
        async with closing(face.from_url(url, LIMITS)) as manager:
            await check_failure(manager, StoreUnavailableError, "No master found for 'service'")
        asked = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
    assert 1 <= asked <= 2


async def test_a_server_that_comes_back_is_used_again(face: Face, server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server:
        async with closing(face.from_url(server.url, LIMITS)) as manager:
            assert await settled(manager.try_consume(KEY, 10))
            server.stop()
            await check_failure(manager, StoreUnavailableError, "(?i)connect")
            server.restart()
            assert await settled(manager.try_consume(KEY, 10))


async def test_a_silent_server_is_a_timeout(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    async with closing(face.from_url(f"{server.url}?socket_timeout=0.3", LIMITS)) as manager:
        server.pause()
        try:
            error = await check_failure(manager, StoreTimeoutError, "(?i)time")
        finally:
            server.resume()
        assert not error.in_doubt
        assert not admin.exists(KEY)
        assert await settled(manager.try_consume(KEY))


async def test_a_server_that_falls_silent_leaves_doubt(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    async with closing(face.from_url(f"{server.url}?socket_timeout=0.3", LIMITS)) as manager:
        assert await settled(manager.try_consume(KEY))
        server.pause()
        try:
            error = await check_failure(manager, StoreTimeoutError, "may have been carried out")
        finally:
            server.resume()
        assert error.in_doubt
        assert await settled(manager.try_consume(KEY))
        assert 2 <= (await settled(manager.snapshot(KEY))).consumed_tokens <= 3
        assert admin.pttl(KEY) > 0


async def test_a_server_that_loads_its_data_is_unavailable(face: Face, server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary, "--rdbcompression", "no") as master,
        RedisServer.start(server_binary, "--key-load-delay", "30000") as loading,  # microseconds for each key
        master.client() as writer,
        loading.client() as reader,
    ):
        writer.config_set("repl-diskless-sync-delay", 0)
        # while it loads, a server looks after its clients every two megabytes
        writer.mset({f"key {i}": bytes(200_000) for i in range(100)})
        async with closing(face.from_url(f"{loading.url}?socket_timeout=10", LIMITS, timeout=10)) as manager:
            assert await settled(manager.try_consume(KEY))
            reader.replicaof(master.host, master.port)
            wait_until(lambda: reader.info("persistence")["loading"] == 1, "it loads what the master has sent")
            # that it is a replica by now is what some look at first when asked to write
            error = await check_failure(manager, StoreUnavailableError, "(?i)loading|read-only")
            assert not error.in_doubt
            await check_failure(manager, StoreUnavailableError, "(?i)loading", VERBS["configuration"])
            wait_until(lambda: reader.info("persistence")["loading"] == 0, "it has loaded")
            reader.replicaof("NO", "ONE")
            assert await settled(manager.try_consume(KEY))


def await_replication(master: RedisServer) -> None:
    with master.client() as client:
        client.set("the last write", "of this connection, which WAIT waits for")
        assert client.wait(1, 5000) == 1


async def test_a_read_only_replica_is_unavailable_for_writing(face: Face, server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary) as master,
        servers.replica(master) as replica,
        replica.client() as reader,
    ):
        async with (
            closing(face.from_url(master.url, LIMITS)) as manager,
            closing(face.from_url(replica.url, LIMITS)) as misled,
        ):
            with nothing_written(reader):
                await check_failure(misled, StoreUnavailableError, "(?i)read.only replica")
            assert await settled(manager.try_consume(KEY))
            await_replication(master)
            with nothing_written(reader):
                assert await settled(misled.available_tokens(KEY)) == 9
                await check_failure(misled, StoreUnavailableError, "(?i)read.only replica")
                await check_failure(misled, StoreUnavailableError, "(?i)read.only replica", VERBS["remove"])
            reader.replicaof("NO", "ONE")
            assert await settled(misled.try_consume(KEY))


Trouble = Callable[[redis.Redis], AbstractContextManager[None]]


@contextmanager
def setting(client: redis.Redis, name: str, value: int) -> Generator[None]:
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, 0)


def out_of_memory(client: redis.Redis) -> AbstractContextManager[None]:
    return setting(client, "maxmemory", 1)


def out_of_replicas(client: redis.Redis) -> AbstractContextManager[None]:
    return setting(client, "min-replicas-to-write", 1)


@pytest.mark.parametrize("trouble", [out_of_memory, out_of_replicas])
async def test_a_server_that_refuses_to_write_is_unavailable(
    face: Face, server: RedisServer, admin: redis.Redis, trouble: Trouble
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for _ in ("a missing bucket", "a bucket in use"):
            with nothing_written(admin), trouble(admin):
                error = await check_failure(manager, StoreUnavailableError, "(?i)memory|too few replicas")
                assert not error.in_doubt
            assert await settled(manager.try_consume(KEY))


# Permissions


def allow(admin: redis.Redis, *commands: str) -> None:
    allowed = [f"+{command}" for command in commands]
    rules = ["reset", "on", f">{PASSWORD}", f"~{PREFIX}*", "resetchannels", "-@all", *allowed]
    admin.execute_command("ACL SETUSER", "limiter", *rules)


def limited_url(server: RedisServer, password: str = PASSWORD, database: int = 0) -> str:
    return f"redis://limiter:{quote(password)}@{server.host}:{server.port}/{database}"


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_user_with_the_least_permissions_can_do_everything(
    face: Face, server: RedisServer, admin: redis.Redis, protocol: int
) -> None:
    allow(admin, *ACL_COMMANDS)
    url = f"{limited_url(server)}?protocol={protocol}"
    async with closing(face.from_url(url, LIMITS, prefix=PREFIX)) as manager:
        for _ in ("a missing bucket", "a bucket in use"):
            for verb in VERBS.values():
                await settled(verb(manager))


@pytest.mark.parametrize("missing", ACL_COMMANDS)
async def test_without_any_of_the_least_permissions_the_error_says_so(
    face: Face, server: RedisServer, admin: redis.Redis, missing: str
) -> None:
    allow(admin, *(command for command in ACL_COMMANDS if command != missing))
    refused = 0
    async with (
        closing(face.from_url(limited_url(server), LIMITS, prefix=PREFIX)) as manager,
        closing(face.from_url(server.url, LIMITS, prefix=PREFIX)) as other,
    ):
        for verb in (*("try_consume",) * 6, "configuration", "remove"):
            await settled(VERBS["try_consume"](other))  # a bucket that others change brings out all commands
            stored = contents(admin)
            try:
                await settled(VERBS[verb](manager))
            except StoreError as error:
                assert re.search("permission|can't run this command", str(error))
                assert contents(admin) == stored
                refused += 1
        assert refused > 0
        allow(admin, *ACL_COMMANDS)
        admin.delete(PREFIX + KEY)
        assert await settled(manager.try_consume(KEY))


async def test_a_user_who_may_not_ask_the_time_fails_before_anything_is_written(
    face: Face, server: RedisServer, admin: redis.Redis
) -> None:
    allow(admin, *(command for command in ACL_COMMANDS if command != "time"))
    async with closing(face.from_url(limited_url(server), LIMITS, prefix=PREFIX)) as manager:
        with nothing_written(admin):
            await check_failure(manager, StoreError, "clock=SystemClock.*(permission|can't run this command)")
        allow(admin, *ACL_COMMANDS)
        assert await settled(manager.try_consume(KEY))


async def test_with_a_clock_of_ones_own_the_time_need_not_be_asked(
    face: Face, server: RedisServer, admin: redis.Redis
) -> None:
    allow(admin, *(command for command in ACL_COMMANDS if command != "time"))
    async with closing(face.from_url(limited_url(server), LIMITS, prefix=PREFIX, clock=SystemClock())) as manager:
        assert await settled(manager.try_consume(KEY))
        assert await settled(manager.available_tokens(KEY)) == 9
    allow(admin, *ACL_COMMANDS)


async def test_another_database_takes_another_permission(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    allow(admin, *ACL_COMMANDS)
    async with closing(face.from_url(limited_url(server, database=1), LIMITS, prefix=PREFIX)) as manager:
        await check_failure(manager, StoreError, "permissions.*'select'")
        allow(admin, *ACL_COMMANDS, *ACL_COMMANDS_FOR_A_DATABASE)
        assert await settled(manager.try_consume(KEY))


@pytest.fixture(scope="module")
def cluster(server_binary: ServerBinary) -> Generator[servers.Cluster]:
    with servers.cluster(server_binary) as cluster:
        for node in cluster.nodes:
            with node.client() as admin:
                allow(admin, *ACL_COMMANDS, *ACL_COMMANDS_FOR_A_CLUSTER)
        yield cluster


async def test_a_cluster_takes_other_permissions(face: Face, cluster: servers.Cluster) -> None:
    url = limited_url(cluster.nodes[0]).replace("redis://", "redis+cluster://")
    async with closing(face.from_url(url, LIMITS, prefix=PREFIX)) as manager:
        for key in map(str, range(20)):
            assert await settled(manager.try_consume(key))
            assert await settled(manager.available_tokens(key)) == 9
            await settled(manager.remove(key))


async def test_without_permission_to_follow_a_slot_that_moves_the_error_says_so(
    face: Face, cluster: servers.Cluster
) -> None:
    slot = int(ask(cluster.nodes[0], "CLUSTER KEYSLOT", PREFIX + KEY))
    source, target = cluster.nodes if slot < servers.SLOTS // 2 else reversed(cluster.nodes)
    with target.client() as admin:
        begin_to_move(source, target, slot)
        try:
            url = limited_url(source).replace("redis://", "redis+cluster://")
            async with closing(face.from_url(url, LIMITS, prefix=PREFIX)) as manager:
                allow(admin, *ACL_COMMANDS, *(one for one in ACL_COMMANDS_FOR_A_CLUSTER if one != "asking"))
                await check_failure(manager, StoreError, "permissions.*'asking'")
                allow(admin, *ACL_COMMANDS, *ACL_COMMANDS_FOR_A_CLUSTER)
                assert await settled(manager.try_consume(KEY))
                await settled(manager.remove(KEY))
        finally:
            allow(admin, *ACL_COMMANDS, *ACL_COMMANDS_FOR_A_CLUSTER)
            for node in cluster.nodes:
                ask(node, "CLUSTER SETSLOT", slot, "STABLE")


async def test_a_cluster_refuses_a_wrong_password(face: Face, cluster: servers.Cluster) -> None:
    url = limited_url(cluster.nodes[0], "Open Wheat").replace("redis://", "redis+cluster://")
    async with closing(face.from_url(url, LIMITS, prefix=PREFIX)) as manager:
        error = await check_failure(manager, StoreError, "(?i)password")
        assert not error.in_doubt
        assert "Wheat" not in "".join(traceback.format_exception(error))


async def test_keys_of_others_are_out_of_reach(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    allow(admin, *ACL_COMMANDS)
    async with closing(face.from_url(limited_url(server), LIMITS)) as manager:
        with nothing_written(admin):
            await check_failure(manager, StoreError, "permission")


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_wrong_password_is_refused_and_not_told(
    face: Face, server: RedisServer, admin: redis.Redis, protocol: int
) -> None:
    allow(admin, *ACL_COMMANDS)
    url = f"{limited_url(server, 'Open Wheat')}?protocol={protocol}"
    async with closing(face.from_url(url, LIMITS, prefix=PREFIX)) as manager:
        with nothing_written(admin):
            error = await check_failure(manager, StoreError, "(?i)password")
        assert not error.in_doubt
        assert "Wheat" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_missing_password_is_asked_for(face: Face, server_binary: ServerBinary, protocol: int) -> None:
    with RedisServer.start(server_binary, "--requirepass", PASSWORD) as server:
        async with closing(face.from_url(f"{server.url}?protocol={protocol}", LIMITS)) as manager:
            error = await check_failure(manager, StoreError, "(?i)authenticat|password")
            assert not error.in_doubt


async def test_a_password_that_the_server_has_not_asked_for_is_refused(face: Face, server: RedisServer) -> None:
    url = f"redis://:{quote(PASSWORD)}@{server.host}:{server.port}?protocol=2"
    async with closing(face.from_url(url, LIMITS)) as manager:
        error = await check_failure(manager, StoreError, "password")
        assert PASSWORD not in "".join(traceback.format_exception(error))


# What is stored already


def a_list(admin: redis.Redis) -> None:
    admin.rpush(KEY, "first", "second")


def a_hash(admin: redis.Redis) -> None:
    admin.hset(KEY, "field", "value")


def a_set(admin: redis.Redis) -> None:
    admin.sadd(KEY, "member")


def a_sorted_set(admin: redis.Redis) -> None:
    admin.zadd(KEY, {"member": 1})


def a_stream(admin: redis.Redis) -> None:
    admin.xadd(KEY, {"field": "value"})


@pytest.mark.parametrize("store", [a_list, a_hash, a_set, a_sorted_set, a_stream])
async def test_a_value_of_another_type_is_left_alone(
    face: Face, server: RedisServer, admin: redis.Redis, store: Callable[[redis.Redis], None]
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for _ in ("a missing bucket", "a bucket that was in use"):
            store(admin)
            admin.expire(KEY, 1000)
            with nothing_written(admin):
                for verb in READING_VERBS.values():
                    error = await check_failure(manager, StoreError, "another type", verb)
                    assert not error.in_doubt
            await settled(manager.remove(KEY))
            assert await settled(manager.try_consume(KEY))
            admin.delete(KEY)


SOUND = bytes.fromhex(
    "00000001 00000001 00000001 00000001 000000000000000a 000000000000000a 000000003b9aca00 000000000000000a"
    "00 8000000000000000 00 00 00000003 00000001 00000003 17979cfe4510b280 0000000000000008 0000000000000000"
    "00000001 0000000000000004"
)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\n",
        b"OK",
        b"12345",
        b'{"tokens": 5, "timestamp": 1700000000}',
        b"\x80\x05\x95pickled",
        bytes(107),
        b"\xff" * 107,
        SOUND[:-1],
        SOUND[:50],
        SOUND.replace(b"\0\0\0\3\0\0\0\1\0\0\0\3", b"\0\0\0\2\0\0\0\1\0\0\0\3"),
        SOUND.replace(b"\0\0\0\3\0\0\0\1\0\0\0\3", b"\0\0\0\3\0\0\0\1\x7f\xff\xff\xff"),
        SOUND[:8] + b"\x7f\xff\xff\xff" + SOUND[12:],
        b"x" * 2**20,
    ],
    ids=lambda state: f"{state[:20]!r}, {len(state)} bytes",
)
async def test_foreign_bytes_are_left_alone(face: Face, server: RedisServer, admin: redis.Redis, state: bytes) -> None:
    admin.set(KEY, state, ex=1000)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with nothing_written(admin):
            for verb in READING_VERBS.values():
                if not state and verb is VERBS["configuration"]:
                    assert await settled(verb(manager)) is None  # an empty value is no bucket
                    continue
                with pytest.raises(CorruptStateError, match="cannot be read as a bucket") as caught:
                    await settled(verb(manager))
                assert caught.value.key == KEY
                assert caught.value.state in (state, state[:16_385])
                assert len(str(caught.value)) < 300
        await settled(manager.remove(KEY))
        assert await settled(manager.try_consume(KEY))


@pytest.mark.parametrize("verb", [VERBS["configuration"], VERBS["try_consume"]], ids=["configuration", "try_consume"])
async def test_a_state_of_a_newer_format_is_left_alone(
    face: Face, server: RedisServer, admin: redis.Redis, verb: Callable[[Manager], Any]
) -> None:
    admin.set(KEY, b"\0\0\0\3" + SOUND[4:], ex=1000)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with nothing_written(admin):
            error = await check_failure(manager, UnsupportedStateError, "format 3", verb)
        assert error.format == 3
        admin.set(KEY, SOUND)
        assert await settled(manager.try_consume(KEY))


async def test_a_state_with_a_period_of_0_is_left_alone(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    state = SOUND.replace(bytes.fromhex("3b9aca00"), bytes(4))
    admin.set(KEY, state, ex=1000)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with nothing_written(admin):
            error = await check_failure(manager, CorruptStateError, "limits are out of range")
            assert error.state == state


async def test_a_bucket_that_is_spoilt_in_use_is_left_alone(
    face: Face, server: RedisServer, admin: redis.Redis
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        assert await settled(manager.try_consume(KEY))
        admin.set(KEY, "spoilt", ex=1000)
        with nothing_written(admin):
            for _ in range(2):
                with pytest.raises(CorruptStateError) as caught:
                    await settled(manager.try_consume(KEY))
                assert (caught.value.key, caught.value.state) == (KEY, b"spoilt")


# Tokens


@pytest.mark.parametrize(
    "tokens", [0, -1, 2**63, -(2**63), 1.0, 0.5, float("nan"), True, False, "1", b"1", None, Decimal(1), [1]], ids=repr
)
async def test_a_number_of_tokens_is_an_int_of_1_or_more(
    face: Face, server: RedisServer, admin: redis.Redis, tokens: Any
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for verb in TOKEN_VERBS.values():
            with pytest.raises(InvalidArgumentError, match="tokens must be an int from 1") as caught:
                await settled(verb(manager, tokens))
            assert repr(tokens) in str(caught.value)
        assert not admin.exists(KEY)
        assert await settled(manager.try_consume(KEY))


@pytest.mark.parametrize("limit", [0, -1, 2**63, 1.0, True, "1"], ids=repr)
async def test_a_limit_for_as_much_as_possible_is_an_int_of_1_or_more(
    face: Face, server: RedisServer, admin: redis.Redis, limit: Any
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with pytest.raises(InvalidArgumentError, match="limit must be an int from 1"):
            await settled(manager.bucket(KEY).try_consume_as_much_as_possible(limit))
        assert not admin.exists(KEY)
        assert await settled(manager.bucket(KEY).try_consume_as_much_as_possible()) == 10


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("-inf"), True, "1", timedelta(0)], ids=repr)
async def test_a_timeout_is_a_duration_above_0(
    face: Face, server: RedisServer, admin: redis.Redis, timeout: Any
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with pytest.raises(InvalidArgumentError, match="timeout must be"):
            await settled(manager.consume(KEY, timeout=timeout))
        assert not admin.exists(KEY)


@pytest.mark.parametrize("tokens", [11, 2**63 - 1])
async def test_more_tokens_than_the_capacity_are_refused_for_ever(
    face: Face, server: RedisServer, admin: redis.Redis, tokens: int
) -> None:
    assert not admin.exists(KEY)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        assert not await settled(manager.try_consume(KEY, tokens))
        probe = await settled(manager.try_consume_and_return_remaining(KEY, tokens))
        assert (probe.consumed, probe.remaining_tokens) == (False, 10)
        assert (probe.nanos_to_wait_for_refill, probe.retry_after) == (NEVER, None)
        estimate = await settled(manager.bucket(KEY).estimate_ability_to_consume(tokens))
        assert (estimate.can_be_consumed, estimate.nanos_to_wait_for_refill) == (False, NEVER)
        assert not await settled(manager.consume(KEY, tokens, max_wait=1))
        assert await settled(manager.try_consume(KEY, 10))


async def test_a_debt_beyond_64_bits_is_refused(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        assert await settled(manager.try_consume(KEY))
        with nothing_written(admin):
            with pytest.raises(ReservationOverflowError):
                await settled(manager.consume(KEY, 2**63 - 1))
            with pytest.raises(ReservationOverflowError):
                await settled(manager.bucket(KEY).consume_ignoring_rate_limits(2**63 - 1))
        assert await settled(manager.try_consume(KEY, 9))


# Limits


@pytest.mark.parametrize(
    "limits",
    [
        "",
        "100",
        "0/minute",
        "-1/minute",
        "1.5/minute",
        "100/fortnight",
        "100/0 minutes",
        "9223372036854775808/minute",
        "2/ns",
        "10/second; 1,000/hour",
        "1/s id a; 1/min id a",
        "10/second burst 0",
        "10/second\0",
        "1" * 2**20,
        10,
        1.5,
        [],
        ["10/second", 5],
        (100, 60),
        b"10/second",
    ],
    ids=lambda limits: repr(limits)[:40],
)
async def test_limits_that_cannot_be_are_refused(
    face: Face, server: RedisServer, admin: redis.Redis, limits: Any
) -> None:
    with pytest.raises(InvalidConfigurationError):
        face.from_url(server.url, limits)
    async with (
        closing(face.from_url(server.url, LIMITS)) as manager,
        closing(face.from_url(server.url, lambda _: limits)) as careless,
    ):
        with pytest.raises(InvalidConfigurationError):
            manager.bucket(KEY, limits)
        with pytest.raises(InvalidConfigurationError):
            await settled(careless.try_consume(KEY))
        with pytest.raises(InvalidConfigurationError):
            await settled(manager.replace_configuration(KEY, limits, TokensInheritance.AS_IS))
        assert not admin.exists(KEY)
        assert await settled(manager.try_consume(KEY))


async def test_a_bucket_without_limits_is_refused(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(server.url)) as manager:
        with pytest.raises(InvalidConfigurationError, match="configuration"):
            await settled(manager.try_consume(KEY))


@pytest.mark.parametrize(
    "bandwidth",
    [
        Bandwidth.greedy(1, 1e-9),
        Bandwidth.greedy(2**63 - 1, timedelta.max),
        Bandwidth.greedy(1, timedelta.max),
        Bandwidth.greedy(2**63 - 1, timedelta.max, refill_tokens=1),
        Bandwidth.intervally(1, timedelta.max),
        Bandwidth.intervally(2**63 - 1, timedelta.max, refill_tokens=1),
        Bandwidth.greedy(1, 60, initial_tokens=2**63 - 1),
        Bandwidth.greedy(1, 60, id="\0\n" * 300),
    ],
    ids=lambda bandwidth: repr(bandwidth)[:60],
)
async def test_limits_that_are_only_odd_work(
    face: Face, server: RedisServer, admin: redis.Redis, bandwidth: Bandwidth
) -> None:
    async with closing(face.from_url(server.url, BucketConfiguration(bandwidth))) as manager:
        assert await settled(manager.try_consume(KEY))
        assert await settled(manager.configuration(KEY)) == BucketConfiguration(bandwidth)
        assert (await settled(manager.snapshot(KEY))).consumed_tokens == 1
        assert admin.pttl(KEY) > 0
        rest = bandwidth.initial_tokens - 1
        if rest:
            assert await settled(manager.try_consume(KEY, rest))
            assert not await settled(manager.try_consume(KEY, bandwidth.capacity))
            assert (await settled(manager.snapshot(KEY))).consumed_tokens == rest + 1


@pytest.mark.usefixtures("admin")
async def test_sixty_four_limits_in_a_bucket_work(face: Face, server: RedisServer) -> None:
    limits = BucketConfiguration(*(Bandwidth.greedy(i, 60, id=str(i)) for i in range(1, 65)))
    async with closing(face.from_url(server.url, limits)) as manager:
        assert await settled(manager.try_consume(KEY))
        assert not await settled(manager.try_consume(KEY))
        assert await settled(manager.configuration(KEY)) == limits


# Keys


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "\n",
        "\r\n$3\r\nGET",
        "\0",
        "a\0b",
        "{}",
        "{user}:42",
        "naïve 🪣",
        "x" * 2**20,
        b"",
        b"\xff\xfe",
        b"\0" * 100,
        bytes(range(256)),
    ],
    ids=lambda key: repr(key[:20]),
)
async def test_keys_that_are_only_odd_work(
    face: Face, server: RedisServer, admin: redis.Redis, key: str | bytes
) -> None:
    stored_key = key.encode() if isinstance(key, str) else key
    for prefix in (b"", b"rl:", b"\xff\0\n"):
        async with closing(face.from_url(server.url, LIMITS, prefix=prefix)) as manager:
            assert await settled(manager.try_consume(key, 9))
            assert await settled(manager.try_consume(key))
            assert not await settled(manager.try_consume(key))
            assert await settled(manager.configuration(key)) == LIMITS
            assert admin.keys() == [prefix + stored_key]
            await settled(manager.remove(key))
            assert admin.dbsize() == 0


@pytest.mark.parametrize("key", [None, 42, 4.2, True, ("user", 42), bytearray(b"user"), object()], ids=repr)
async def test_a_key_is_text_or_bytes(face: Face, server: RedisServer, admin: redis.Redis, key: Any) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for verb in (manager.try_consume, manager.remove, manager.configuration, manager.bucket):
            with pytest.raises(InvalidArgumentError, match="key must be a str or bytes"):
                await settled(verb(key))
        assert admin.dbsize() == 0


async def test_a_key_without_utf_8_form_is_refused(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with pytest.raises(InvalidArgumentError, match="UTF-8"):
            await settled(manager.try_consume("\ud800"))


@pytest.mark.parametrize("key", ["x" * 2**20, b"\0" * 2**20, "\n" * 2**20], ids=["text", "bytes", "line ends"])
async def test_an_error_about_a_huge_key_is_short(face: Face, stopped_server: RedisServer, key: str | bytes) -> None:
    async with closing(face.from_url(stopped_server.url, LIMITS)) as manager:
        for verb in (manager.try_consume, manager.configuration):
            with pytest.raises(StoreUnavailableError) as caught:
                await settled(verb(key))
            assert caught.value.key == key
            assert len(str(caught.value)) < 1000
            assert "\n" not in str(caught.value)
