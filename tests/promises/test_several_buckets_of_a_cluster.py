"""Several buckets in one decision in a cluster: keys that share a slot, slots that move, and keys that share none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest

from ratelimit import AsyncProxyManager, Expiration, InvalidArgumentError, StoreTimeoutError, all_of
from ratelimit.core.token_bucket import codec
from tests.support import servers
from tests.support.both_faces import Face, Settled, closing
from tests.support.servers import SLOTS, Cluster, RedisServer, ServerBinary
from tests.support.topologies import ask, begin_to_move, end_move, move_keys, sentinel_trio
from tests.support.workers import patient

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def cluster(server_binary: ServerBinary) -> Generator[Cluster]:
    with servers.cluster(server_binary) as cluster:
        yield cluster


class Buckets:
    def __init__(self, face: Face, tenants: Any) -> None:
        self.tenants = tenants
        settings: Any = {"expiration": Expiration.none(), "timeout": 5}
        self.users: Any = face(tenants.store, "20/day", prefix="user:", **settings)

    def of(self, tenant: str, user: str = "1", **keywords: Any) -> Settled:
        return Settled(all_of(self.users.bucket(f"{tenant}:{user}"), self.tenants.bucket(tenant), **keywords))


@pytest.fixture
async def buckets(face: Face, cluster: Cluster) -> AsyncGenerator[Buckets]:
    settings: Any = {"prefix": "tenant:", "expiration": Expiration.none(), "timeout": 5}
    async with closing(face.from_url(patient(cluster.url), "30/day", **settings)) as manager:
        yield Buckets(face, manager)


def slot_of(cluster: Cluster, key: str) -> int:
    return int(ask(cluster.nodes[0], "CLUSTER KEYSLOT", key))


def nodes_of(cluster: Cluster, key: str) -> tuple[RedisServer, RedisServer]:
    """The node that serves a key, and the other one."""
    first, second = cluster.nodes
    return (first, second) if slot_of(cluster, key) < SLOTS // 2 else (second, first)


def consumed(node: RedisServer, key: str) -> int:
    with node.client() as client:
        data = client.get(key)
    assert isinstance(data, bytes)
    return codec.decode(data).consumed_tokens


async def test_keys_that_share_a_slot_are_charged_together(buckets: Buckets, cluster: Cluster, face: Face) -> None:
    for number in range(6):
        tenant = f"{{shared {face.__name__} {number}}}"
        limit = buckets.of(tenant)
        assert [await limit.try_consume() for _ in range(3)] == [True] * 3
        node, _ = nodes_of(cluster, tenant)
        assert (consumed(node, f"tenant:{tenant}"), consumed(node, f"user:{tenant}:1")) == (3, 3)


async def test_keys_that_share_no_slot_are_refused_before_anything_is_sent(buckets: Buckets, cluster: Cluster) -> None:
    before = [ask(node, "DBSIZE") for node in cluster.nodes]
    for tenant, example in (("acme", "{acme}"), ("a{b", "{acme}")):
        with pytest.raises(InvalidArgumentError) as caught:
            buckets.of(tenant)
        assert str(caught.value) == (
            f"parts must have keys that share a slot of the cluster; got b'user:{tenant}:1', b'tenant:{tenant}'; put "
            f"the same text in braces into each of them, such as {example}, or pass spread=True"
        )
    with pytest.raises(InvalidArgumentError, match=r"such as \{tag\}"):
        all_of(buckets.users.bucket("{tag}:1"), buckets.tenants.bucket("{other}"))
    assert [ask(node, "DBSIZE") for node in cluster.nodes] == before


async def test_keys_that_share_no_slot_may_be_spread(buckets: Buckets, face: Face) -> None:
    name = f"spread {face.__name__}"
    limits = [
        Settled(all_of(buckets.users.bucket(f"{name} {number}"), buckets.tenants.bucket(name), spread=True))
        for number in range(3)
    ]
    answers = [await limit.try_consume() for limit in limits for _ in range(21)]
    assert answers == [True] * 20 + [False] + [True] * 10 + [False] * 32
    probe = await limits[2].try_consume_and_return_remaining()
    assert probe.refused_by == (name,)
    snapshots = [await limit.snapshot() for limit in limits]
    assert [[part.consumed_tokens for part in one] for one in snapshots] == [[20, 30], [10, 30], [0, 30]]


async def test_a_slot_that_moves_is_waited_for(buckets: Buckets, cluster: Cluster, face: Face) -> None:
    tenant = f"{{moving {face.__name__}}}"
    limit, newcomer = buckets.of(tenant), buckets.of(tenant, "2")
    assert await limit.try_consume()
    slot, (source, target) = slot_of(cluster, tenant), nodes_of(cluster, tenant)
    begin_to_move(source, target, slot)
    # Both buckets are still here.
    assert await limit.try_consume()
    move_keys(source, target, f"user:{tenant}:1")
    # One bucket is on each side, and that of the newcomer is nowhere.
    for one in (limit, newcomer):
        with pytest.raises(StoreTimeoutError, match="still redirect") as caught:
            await one.try_consume(timeout=0.3)
        assert not caught.value.in_doubt

    def end() -> None:
        move_keys(source, target, f"tenant:{tenant}")
        end_move(source, target, slot)

    timer = threading.Timer(0.5, end)
    timer.start()
    assert all(await asyncio.gather(limit.try_consume(timeout=20), newcomer.try_consume(timeout=20)))
    timer.join()
    assert consumed(target, f"tenant:{tenant}") == 4
    assert (consumed(target, f"user:{tenant}:1"), consumed(target, f"user:{tenant}:2")) == (3, 1)


async def test_slots_that_move_under_load_cost_no_token(buckets: Buckets, cluster: Cluster, face: Face) -> None:
    tenant = f"{{resharded {face.__name__}}}"
    slot = slot_of(cluster, tenant)
    admitted, stop = [0] * 4, threading.Event()
    big: Any = face(buckets.tenants.store, "1000000/day", prefix="big:", expiration=Expiration.none(), timeout=20)

    async def caller(number: int) -> None:
        limit = Settled(all_of(big.bucket(f"{tenant}:{number}"), big.bucket(tenant)))
        while not stop.is_set():
            admitted[number] += await limit.try_consume()
            await asyncio.sleep(0)

    # A thread that waits for the slot must not stop this loop, which moves it.
    callers = [
        asyncio.create_task(
            caller(number) if face is AsyncProxyManager else asyncio.to_thread(asyncio.run, caller(number))
        )
        for number in range(4)
    ]
    source, target = nodes_of(cluster, tenant)
    for _ in range(4):
        await asyncio.sleep(0.1)
        begin_to_move(source, target, slot)
        await asyncio.sleep(0.02)
        for key in ask(source, "CLUSTER GETKEYSINSLOT", slot, 100):
            await asyncio.to_thread(move_keys, source, target, key)
        await asyncio.to_thread(end_move, source, target, slot)
        source, target = target, source
    await asyncio.sleep(0.1)
    stop.set()
    await asyncio.gather(*callers)
    assert min(admitted) > 5
    assert consumed(source, f"big:{tenant}") == sum(admitted)
    assert [consumed(source, f"big:{tenant}:{number}") for number in range(4)] == admitted


async def test_a_master_that_sentinel_names_serves(face: Face, server_binary: ServerBinary) -> None:
    with sentinel_trio(server_binary) as trio:
        async with closing(face.from_url(trio.url, "3/day", prefix="tenant:", timeout=10)) as manager:
            limit = Buckets(face, manager).of("acme")
            assert [await limit.try_consume() for _ in range(4)] == [True] * 3 + [False]
