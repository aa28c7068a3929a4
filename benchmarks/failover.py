"""What Redis loses when another server takes over: ``python -m benchmarks.failover [--rounds N] [part of a name]``.

A cluster of three masters with a replica each, and a master with two replicas under three sentinels, are started on
this machine, and fail over under load. A token is lost where its caller was told that it was taken, and the servers do
not know of it afterwards: it can be taken again. Shown are medians and the worst of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from tests.support.audited_load import Load
from tests.support.servers import find_server
from tests.support.topologies import (
    ReplicatedCluster,
    SentinelTrio,
    ask,
    await_replication,
    replicated_cluster,
    role,
    sentinel_trio,
    settled_by,
)

_RUN_UP: Final = 1.5  # seconds of load before the failover; the last one gives the rate


class Outcome(NamedTuple):
    """The outcome of one failover.

    :param rate: tokens that were acknowledged in the second before it.
    :param gap: seconds without any success of keys that it concerns.
    """

    rate: float
    lost: int
    in_doubt: int
    refused: int
    gap: float


Failure = Callable[[], None]
"""Brings a failover about, and returns when it is over and the former master, if it lives, has learnt of it."""


def _measured(url: str, keys: Sequence[str], others: Sequence[str], fail: Failure) -> Outcome:
    """The outcome for some keys, under a load on others as well."""
    with Load(url, [keys, others] if others else [keys]) as load:
        load.await_progress()
        time.sleep(_RUN_UP)
        before = time.monotonic()
        fail()
        load.await_progress()
    stored = load.stored()
    lost = sum(max(0, load.acknowledged(key) - stored[key]) for key in keys)
    rate = sum(load.acknowledged(key, since=before - 1, until=before) for key in keys)
    errors = load.errors()
    in_doubt = sum(map(load.in_doubt, load.keys))
    return Outcome(rate, lost, in_doubt, errors.total() - in_doubt, max(load.longest_gap(f, keys) for f in load.faces))


# Cluster


def _keys(cluster: ReplicatedCluster, name: str) -> tuple[list[str], list[str]]:
    """New keys of one master, and of the others."""
    mine: list[str] = []
    others: list[str] = []
    first = cluster.master_of(name)
    for number in range(60):
        key = f"{name} {number}"
        (mine if cluster.master_of(key) is first else others).append(key)
    return mine[:3], others[:3]


def _in_cluster(cluster: ReplicatedCluster, how: str) -> Outcome:
    keys, others = _keys(cluster, f"{how} {time.monotonic_ns()}")
    master = cluster.master_of(keys[0])
    replica = cluster.replica_of(master)

    def fail() -> None:
        match how:
            case "kill -9":
                cluster.kill(master)
            case "kill -STOP, -CONT after failover":
                master.pause()
                cluster.down.add(master.port)
            case _:
                ask(replica, "CLUSTER FAILOVER", *how.split()[2:])
        settled_by(lambda: cluster.master_of(keys[0]) is replica, "the replica takes over")
        if how != "kill -9":
            cluster.down.discard(master.port)
            master.resume()
            settled_by(lambda: role(master) == "slave", "the former master follows it")

    settled_by(cluster.is_whole, "the cluster is whole")
    await_replication(master, replica)
    with cluster.hasty():
        return _measured(cluster.url, keys, others, fail)


# Sentinel


def _with_sentinel(trio: SentinelTrio, how: str) -> Outcome:
    master = trio.master()
    keys = [f"{how} {time.monotonic_ns()} {number}" for number in range(3)]

    def fail() -> None:
        match how:
            case "kill -9":
                trio.kill(master)
            case "kill -STOP, -CONT after failover":
                master.pause()
            case _:
                ask(trio.sentinels[0], "SENTINEL FAILOVER", trio.service)
        settled_by(lambda: trio.master() is not master and role(trio.master()) == "master", "there is a new master")
        if how != "kill -9":
            master.resume()
            settled_by(lambda: role(master) == "slave", "the former master follows it")

    settled_by(trio.is_whole, "all is well")
    await_replication(master, *(server for server in trio.servers if server is not master))
    with trio.hasty():
        return _measured(trio.url, keys, [], fail)


# Settings


_SETTINGS: Final = {
    "none": (),
    "min-replicas-to-write 1, max-lag 1": ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "1"),
}
_HANGS: Final = "kill -STOP, -CONT after failover"
_CLUSTER: Final = ("CLUSTER FAILOVER", "CLUSTER FAILOVER TAKEOVER", "CLUSTER FAILOVER FORCE", "kill -9", _HANGS)
_CLUSTER_OF_TWO: Final = ("CLUSTER FAILOVER", "CLUSTER FAILOVER TAKEOVER", "CLUSTER FAILOVER FORCE")
"""Failovers after which the new master has a replica: with these settings it does not write without one."""
_SENTINEL: Final = ("kill -9", _HANGS, "SENTINEL FAILOVER")


@contextmanager
def _topologies(settings: Sequence[str]) -> Generator[list[tuple[str, Sequence[str], Callable[[str], Outcome]]]]:
    binary = find_server()
    if binary is None:
        raise SystemExit("there is no redis-server on PATH")
    with ExitStack() as stack:
        cluster = stack.enter_context(replicated_cluster(binary, *settings))
        trio = stack.enter_context(sentinel_trio(binary, *settings))
        yield [
            ("Cluster", _CLUSTER_OF_TWO if settings else _CLUSTER, lambda how: _in_cluster(cluster, how)),
            ("Sentinel", _SENTINEL, lambda how: _with_sentinel(trio, how)),
        ]


def _row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", default="", help="of what is in the first two columns; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _row("failover", "settings", "tokens/s before", "lost", "seconds' worth", "in doubt", "refused", "longest gap")
    _row("---", "---", "--:", "--:", "--:", "--:", "--:", "--:")
    for name, settings in _SETTINGS.items():
        with _topologies(settings) as topologies:
            for topology, ways, measure in topologies:
                for how in ways:
                    title = f"{topology}: {how}"
                    if options.part not in f"{title} {name}":
                        continue
                    columns = list(zip(*(measure(how) for _ in range(options.rounds)), strict=True))
                    rates, losses, doubts, refusals, gaps = columns
                    worth = [lost / rate if rate else 0.0 for lost, rate in zip(losses, rates, strict=True)]
                    _row(
                        title,
                        name,
                        f"{statistics.median(rates):.0f}",
                        f"{statistics.median(losses):.0f} ({max(losses)})",
                        f"{statistics.median(worth):.2f} ({max(worth):.2f})",
                        f"{statistics.median(doubts):.0f}",
                        f"{statistics.median(refusals):.0f}",
                        f"{statistics.median(gaps):.1f} s ({max(gaps):.1f} s)",
                    )


if __name__ == "__main__":
    main()
