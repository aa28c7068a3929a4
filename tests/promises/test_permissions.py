"""What the limiter may do on a server: the permissions that it needs, and passwords."""

from __future__ import annotations

import re
import traceback
from collections.abc import Generator
from urllib.parse import quote

import pytest
import redis

from ratelimit import StoreError, SystemClock
from tests.support import servers
from tests.support.both_faces import Face, closing, settled
from tests.support.permissions import (
    ACL_COMMANDS,
    ACL_COMMANDS_FOR_A_CLUSTER,
    ACL_COMMANDS_FOR_A_DATABASE,
    PASSWORD,
    allow,
    limited_url,
)
from tests.support.servers import RedisServer, ServerBinary
from tests.support.topologies import ask, begin_to_move
from tests.support.verbs import KEY, LIMITS, PREFIX, VERBS, check_failure, contents, nothing_written

pytestmark = pytest.mark.redis


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


async def test_without_permission_for_the_time_nothing_is_written(
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
