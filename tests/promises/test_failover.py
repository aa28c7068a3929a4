"""Clusters and Sentinel setups that fail over under load: what callers were told is what is stored.

Threads and tasks take tokens of all nodes, each call is booked, and at the end the books are compared with the store:
no more was taken than callers know of (``stored <= acknowledged + in doubt``), and nothing that was acknowledged is
missing (``stored >= acknowledged``) but what Redis itself loses where a server is replaced by one that had not heard of
the last writes. That can only be what was acknowledged just before, and only of that server's keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from tests.support.audited_load import LONGEST_CALL, Load
from tests.support.servers import RedisServer, ServerBinary
from tests.support.topologies import (
    ReplicatedCluster,
    SentinelTrio,
    ask,
    await_replication,
    begin_to_move,
    end_move,
    move_keys,
    replicated_cluster,
    role,
    sentinel_trio,
    settled_by,
)

pytestmark = pytest.mark.redis

LAG = 2.0
"""Seconds before a failure in which a replica may have fallen behind, on a busy machine."""

LONGEST_OUTAGE = 30.0
"""Seconds until a failed node's keys are served again. Servers take each other for dead after one, and agree then."""

LONGEST_GAP_OF_OTHERS = 15.0
"""Seconds without an answer for keys of the other nodes: nothing happens to them, so it is at most a slow call."""

DEADLINE = 0.5
"""Seconds for a decision, as services have it, where a server hangs: less than it takes to find that out."""

LIMIT = 300


@pytest.fixture(scope="module")
def cluster(server_binary: ServerBinary) -> Generator[ReplicatedCluster]:
    with replicated_cluster(server_binary) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def trio(server_binary: ServerBinary) -> Generator[SentinelTrio]:
    with sentinel_trio(server_binary) as trio:
        trio.hurry()
        yield trio


class Lossy(NamedTuple):
    """Keys of which Redis may have lost what was acknowledged between two times."""

    keys: list[str]
    since: float
    until: float


NOTHING_LOST = Lossy([], 0, 0)


def check_ledger(load: Load, lossy: Lossy = NOTHING_LOST) -> None:
    """Compare what callers were told with what is stored, key by key; to be called when the load has ended."""
    print(load.summary(), "lost:", lost(load, load.stored()))
    for key, stored in load.stored().items():
        acknowledged, in_doubt = load.acknowledged(key), load.in_doubt(key)
        losable = load.acknowledged(key, since=lossy.since, until=lossy.until) if key in lossy.keys else 0
        assert acknowledged - losable <= stored <= acknowledged + in_doubt, (key, load.summary())
    assert load.slowest < LONGEST_CALL


def lost(load: Load, stored: Mapping[str, int]) -> int:
    """How many tokens are missing in the store, at least."""
    return sum(max(0, load.acknowledged(key) - count) for key, count in stored.items())


names: Iterator[int] = iter(range(10**9))


def keys_by_node(cluster: ReplicatedCluster, count: int = 3) -> list[list[str]]:
    """New keys of each master, in the order of their slots, each key in a slot of its own."""
    firsts = sorted(first for ranges in cluster.slots().values() for first, _ in ranges)
    groups: dict[int, list[str]] = {first: [] for first in firsts}
    while any(len(group) < count for group in groups.values()):
        key = f"user:{next(names)}"
        slot = int(ask(cluster.nodes[0], "CLUSTER KEYSLOT", key))
        group = groups[max(first for first in firsts if first <= slot)]
        if len(group) < count:
            group.append(key)
    return list(groups.values())


# Cluster


def test_moving_slots_under_load_costs_no_token_and_no_error(cluster: ReplicatedCluster) -> None:
    groups = keys_by_node(cluster)
    moving = groups[0]
    source, target = (cluster.master_of(group[0]) for group in groups[:2])
    others = [master for master in cluster.masters() if master not in (source, target)]
    with Load(cluster.url, groups) as load:
        load.await_progress()
        for _ in range(3):
            for here, there in ((source, target), (target, source)):
                for key in moving:
                    slot = int(ask(here, "CLUSTER KEYSLOT", key))
                    begin_to_move(here, there, slot)
                    load.await_progress([key], 3)  # the key is still here
                    move_keys(here, there, key)
                    load.await_progress([key], 3)  # those who ask here are sent there, for this one request
                    end_move(here, there, slot, others)
                load.await_progress(moving, 3)
    assert not load.errors()
    check_ledger(load)


def test_a_failover_by_command_costs_no_token_and_admits_none_too_many(cluster: ReplicatedCluster) -> None:
    groups, scarce_groups = keys_by_node(cluster), keys_by_node(cluster, 1)
    with Load(cluster.url, groups) as load, Load(cluster.url, scarce_groups, f"{LIMIT}/day") as scarce:
        for group in groups:
            load.await_progress()
            with failing_over(cluster, group[0]):
                load.await_progress()
        scarce.await_rejections()
    check_ledger(load)
    check_ledger(scarce)
    check_limit(scarce)


@contextmanager
def failing_over(cluster: ReplicatedCluster, key: str, *how: str) -> Generator[None]:
    """Let the replica take over; at the end the former master follows it."""
    master = cluster.master_of(key)
    replica = cluster.replica_of(master)
    await_replication(master, replica)
    ask(replica, "CLUSTER FAILOVER", *how)
    yield
    settled_by(lambda: cluster.master_of(key) is replica and role(master) == "slave", "the replica takes over")
    settled_by(cluster.is_whole, "the cluster is whole")


def check_limit(scarce: Load, lossy: Lossy = NOTHING_LOST) -> None:
    """Check that no more was admitted than the limit and what Redis has lost; all buckets are empty by now."""
    refilled = 1 + int(scarce.lasted * LIMIT / 86_400)
    for key, stored in scarce.stored().items():
        acknowledged = scarce.acknowledged(key)
        losses = max(0, acknowledged - stored) if key in lossy.keys else 0
        assert acknowledged + scarce.in_doubt(key) >= LIMIT
        assert acknowledged <= LIMIT + refilled + losses
        assert stored <= LIMIT + refilled


def kill(cluster: ReplicatedCluster, node: RedisServer) -> None:
    cluster.kill(node)


def stop(cluster: ReplicatedCluster, node: RedisServer) -> None:
    node.pause()
    cluster.down.add(node.port)


@pytest.mark.parametrize("end", [kill, stop])
def test_a_master_that_dies_or_hangs_is_replaced_and_only_its_keys_wait(
    cluster: ReplicatedCluster, end: Callable[[ReplicatedCluster, RedisServer], None]
) -> None:
    groups, scarce_groups = keys_by_node(cluster), keys_by_node(cluster, 1)
    failing, scarce_failing = groups[1], scarce_groups[1]
    master = cluster.master_of(failing[0])
    with (
        cluster.hasty(),
        Load(cluster.url, groups, deadline=DEADLINE) as load,
        Load(cluster.url, scarce_groups, f"{LIMIT}/day") as scarce,
    ):
        load.await_progress()
        await_replication(master, cluster.replica_of(master))
        before = time.monotonic()
        end(cluster, master)
        ended = time.monotonic()
        load.await_progress()
        if end is stop:
            cluster.down.discard(master.port)
            master.resume()
            settled_by(lambda: role(master) == "slave", "the master of old follows the new one")
        load.await_progress()
        scarce.await_rejections()
    check_ledger(load, Lossy(failing, before - LAG, ended))
    lossy = Lossy(scarce_failing, before - LAG, ended)
    check_ledger(scarce, lossy)
    check_limit(scarce, lossy)
    for face in ("sync", "asyncio"):
        gaps = {group[0]: load.longest_gap(face, group) for group in groups}
        print(face, {key: f"{gap:.2f} s" for key, gap in gaps.items()}, "failing:", failing[0])
        assert gaps.pop(failing[0]) < LONGEST_OUTAGE
        assert all(gap < LONGEST_GAP_OF_OTHERS for gap in gaps.values())


@pytest.mark.parametrize("how", ["TAKEOVER", "FORCE"])
def test_a_forced_failover_costs_only_what_was_taken_meanwhile(cluster: ReplicatedCluster, how: str) -> None:
    groups = keys_by_node(cluster)
    with cluster.hasty(), Load(cluster.url, groups) as load:
        load.await_progress()
        before = time.monotonic()
        with failing_over(cluster, groups[2][0], how):
            load.await_progress()
        after = time.monotonic()
        load.await_progress()
    check_ledger(load, Lossy(groups[2], before - LAG, after))


# Sentinel


def end_with_sentinel(trio: SentinelTrio, how: str) -> None:
    master = trio.master()
    match how:
        case "killed":
            trio.kill(master)
        case "stopped":
            master.pause()
        case _:
            ask(trio.sentinels[0], "SENTINEL FAILOVER", trio.service)


@pytest.mark.parametrize("how", ["killed", "stopped", "by command"])
def test_sentinel_replaces_a_master_and_clients_follow(trio: SentinelTrio, how: str) -> None:
    """By command, the former master goes on to serve whoever is connected, until it is made a replica: all of it lost.

    After that, and where it is dead, nothing is.
    """
    keys = [f"user:{next(names)}" for _ in range(6)]
    groups = [keys[:3], keys[3:]]
    master = trio.master()
    replicas = [server for server in trio.servers if server is not master]
    with trio.hasty(), Load(trio.url, groups, deadline=DEADLINE) as load:
        load.await_progress()
        await_replication(master, *replicas)
        before = time.monotonic()
        end_with_sentinel(trio, how)
        settled_by(lambda: trio.master() is not master and role(trio.master()) == "master", "another one is the master")
        if how == "by command":
            settled_by(lambda: role(master) == "slave", "the former master follows the new one")
        ended = time.monotonic()
        load.await_progress()
        if how == "stopped":
            trio.heal()
            load.await_progress()
    check_ledger(load, Lossy(keys, before - LAG, ended))
    for face in ("sync", "asyncio"):
        print(face, f"{load.longest_gap(face, keys):.2f} s")
        assert load.longest_gap(face, keys) < LONGEST_OUTAGE
