"""Clusters and Sentinel setups that fail over: real servers with replicas, which the tests kill, stop and restart.

Servers are patient, so that a busy machine is not taken for a dead server; ``hasty`` lets them give up after a second,
for as long as a scenario wants a failover.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.servers import SLOTS, RedisServer, ServerBinary, ServerError, wait_until

PATIENT_MILLIS = 20_000
HASTY_MILLIS = 1_000
_REPLICATION = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1", "--repl-backlog-size", "32mb")
_PATIENCE = 40.0
"""Seconds for what takes three or four on an idle machine."""


def ask(server: RedisServer, *command: str | int) -> Any:
    """Send a command to a server, once, and give its reply as text where it is text."""
    with server.client(
        socket_timeout=5, socket_connect_timeout=5, retry=Retry(NoBackoff(), 0), decode_responses=True
    ) as client:
        return client.execute_command(*command)


def answers(server: RedisServer) -> bool:
    try:
        return bool(ask(server, "PING"))
    except (redis.RedisError, OSError):
        return False


def role(server: RedisServer) -> str:
    """``master`` or ``slave``, as the server sees itself."""
    return str(ask(server, "ROLE")[0])


def follows(server: RedisServer, master: RedisServer) -> bool:
    """Return whether a server is a replica in step with this master."""
    kind, *of = ask(server, "ROLE")
    return kind == "slave" and int(of[1]) == master.port and of[2] == "connected"


def settled_by(condition: Any, what: str) -> None:
    """Wait for a condition whose servers may not answer yet."""

    def met() -> bool:
        try:
            return bool(condition())
        except (redis.RedisError, OSError, ServerError):
            return False

    wait_until(met, what, _PATIENCE)


def await_replication(master: RedisServer, *replicas: RedisServer) -> None:
    """Wait until replicas have what their master has by now.

    One that has just joined says that it is connected, but is sent nothing for up to a second: the master waits for a
    sign of it first.
    """
    offset = int(ask(master, "ROLE")[1])
    for replica in replicas:
        settled_by(lambda r=replica: int(ask(r, "ROLE")[-1]) >= offset, f"{replica!r} has caught up with {master!r}")


class Topology(ABC):
    """Servers that watch each other, and replace one that is gone."""

    @contextmanager
    def hasty(self) -> Generator[None]:
        """Let them take one for dead after a second, until all is whole again at the end."""
        self._be(HASTY_MILLIS)
        try:
            yield
        finally:
            self.heal()
            self._be(PATIENT_MILLIS)

    @abstractmethod
    def heal(self) -> None:
        """Bring back what was killed or stopped, and wait until all is whole."""

    @abstractmethod
    def _be(self, millis: int) -> None:
        """Take one for dead after so long."""


@dataclass
class ReplicatedCluster(Topology):
    """Masters that share the slots, each with one replica; every failover swaps the roles of two nodes."""

    nodes: list[RedisServer]
    url: str
    down: set[int] = field(default_factory=set[int])
    """Ports of the nodes that were killed."""

    def alive(self) -> list[RedisServer]:
        return [node for node in self.nodes if node.port not in self.down]

    def slots(self) -> dict[int, list[tuple[int, int]]]:
        """By port: the ranges of slots that a master serves, as the first living node sees it."""
        table: dict[int, list[tuple[int, int]]] = {}
        for line in _nodes_as_text(self.alive()[0]).splitlines():
            _, address, flags, _, _, _, _, _, *parts = line.split()
            if "master" in flags and "fail" not in flags:
                ends = [part.split("-") for part in parts if part[0] != "["]  # that is a slot that moves
                table[int(address.split("@")[0].rsplit(":", 1)[1])] = [(int(one[0]), int(one[-1])) for one in ends]
        return table

    def master_of(self, key: str) -> RedisServer:
        """The node that serves a key, by what the nodes say."""
        slot = int(ask(self.alive()[0], "CLUSTER KEYSLOT", key))
        for port, ranges in self.slots().items():
            if any(first <= slot <= last for first, last in ranges):
                return next(node for node in self.nodes if node.port == port)
        raise ServerError(f"nobody serves slot {slot}")

    def masters(self) -> list[RedisServer]:
        return [node for node in self.alive() if role(node) == "master"]

    def replica_of(self, master: RedisServer) -> RedisServer:
        return next(node for node in self.alive() if node is not master and follows(node, master))

    def kill(self, node: RedisServer) -> None:
        self.down.add(node.port)
        node.kill()

    def is_whole(self) -> bool:
        """Return whether all nodes agree that all slots are served, and each master has a replica in step."""
        masters = self.masters()
        return (
            len(self.alive()) == len(self.nodes)
            and 2 * len(masters) == len(self.nodes)
            and all(_is_ok(node) for node in self.nodes)
            and all(any(follows(node, master) for node in self.nodes if node is not master) for master in masters)
        )

    def heal(self) -> None:
        """Bring back what was killed or stopped, and wait until the cluster is whole."""
        for node in self.nodes:
            if node.port in self.down:
                node.restart()
                self.down.discard(node.port)
            node.resume()
        settled_by(self.is_whole, "the cluster is whole")

    def _be(self, millis: int) -> None:
        for node in self.alive():
            if answers(node):
                ask(node, "CONFIG SET", "cluster-node-timeout", millis)


def _nodes_as_text(node: RedisServer) -> str:
    with node.client(socket_timeout=5) as client:
        client.response_callbacks.pop("CLUSTER NODES", None)
        reply: Any = client.execute_command("CLUSTER NODES")
    return bytes(reply).decode()


def _is_ok(node: RedisServer) -> bool:
    info = ask(node, "CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == SLOTS


@contextmanager
def replicated_cluster(binary: ServerBinary, *extra_args: str, masters: int = 3) -> Generator[ReplicatedCluster]:
    """A cluster in which each master has one replica; without one of its masters it serves the slots of the others."""
    args = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(PATIENT_MILLIS)]
    args += ["--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0"]
    args += ["--cluster-migration-barrier", "5", *_REPLICATION, *extra_args]
    with ExitStack() as stack:
        nodes = [stack.enter_context(RedisServer.start(binary, *args)) for _ in range(2 * masters)]
        for i, node in enumerate(nodes[:masters]):
            ask(node, "CLUSTER ADDSLOTS", *range(SLOTS * i // masters, SLOTS * (i + 1) // masters))
        for i, node in enumerate(nodes):
            ask(node, "CLUSTER SET-CONFIG-EPOCH", i + 1)
            for other in nodes[:i]:
                ask(other, "CLUSTER MEET", node.host, node.port)
        cluster = ReplicatedCluster(nodes, f"redis+cluster://{nodes[0].host}:{nodes[0].port}")
        settled_by(
            lambda: all(int(ask(node, "CLUSTER INFO")["cluster_known_nodes"]) == len(nodes) for node in nodes),
            "the nodes know each other",
        )
        for master, replica in zip(nodes[:masters], nodes[masters:], strict=True):
            id_ = ask(master, "CLUSTER MYID")
            # known by name a moment before it is known as a node that can be followed
            settled_by(lambda r=replica, i=id_: ask(r, "CLUSTER REPLICATE", i), f"{replica!r} follows {master!r}")
        settled_by(cluster.is_whole, "the cluster is whole")
        yield cluster


def begin_to_move(source: RedisServer, target: RedisServer, slot: int) -> None:
    """Announce on both sides that a slot moves; what is there stays where it is."""
    ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", ask(source, "CLUSTER MYID"))
    ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", ask(target, "CLUSTER MYID"))


def move_keys(source: RedisServer, target: RedisServer, *keys: str) -> None:
    ask(source, "MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)


def end_move(source: RedisServer, target: RedisServer, slot: int, others: list[RedisServer] | None = None) -> None:
    """Give the slot away; its new owner has to know first, and others hear of it by and by unless they are told."""
    id_ = ask(target, "CLUSTER MYID")
    for node in (target, source, *(others or [])):
        ask(node, "CLUSTER SETSLOT", slot, "NODE", id_)


def give_all_slots(source: RedisServer, target: RedisServer) -> None:
    """Give the slots of one of two masters to the other, so that the first is no longer in the table of slots."""
    begin, end, *_ = next(row for row in ask(source, "CLUSTER SLOTS") if row[2][1] == source.port)
    slots = range(begin, end + 1)
    for node in (source, target):
        ask(node, "CLUSTER DELSLOTS", *slots)
    ask(target, "CLUSTER ADDSLOTS", *slots)
    settled_by(
        lambda: all(_is_ok(node) and int(ask(node, "CLUSTER INFO")["cluster_size"]) == 1 for node in (source, target)),
        f"{target!r} has all slots",
    )


@dataclass
class SentinelTrio(Topology):
    """A master, two replicas, and three sentinels of which two have to agree."""

    servers: list[RedisServer]
    sentinels: list[RedisServer]
    url: str
    service: str
    down: set[int] = field(default_factory=set[int])

    def alive(self) -> list[RedisServer]:
        return [server for server in self.servers if server.port not in self.down]

    def master(self) -> RedisServer:
        """The server that all sentinels name."""
        ports = {int(self._ask(one, "GET-MASTER-ADDR-BY-NAME")[1]) for one in self.sentinels}
        if len(ports) > 1:
            raise ServerError(f"the sentinels name {len(ports)} masters")
        return next(server for server in self.servers if server.port in ports)

    def _ask(self, sentinel: RedisServer, what: str) -> Any:
        return ask(sentinel, f"SENTINEL {what}", self.service)

    def kill(self, server: RedisServer) -> None:
        self.down.add(server.port)
        server.kill()

    def is_whole(self) -> bool:
        master = self.master()
        return (
            role(master) == "master"
            and all(follows(server, master) for server in self.servers if server is not master)
            and all(self._sees_all(sentinel) for sentinel in self.sentinels)
        )

    def _sees_all(self, sentinel: RedisServer) -> bool:
        master = self._ask(sentinel, "MASTER")
        replicas = self._ask(sentinel, "SLAVES")
        return (
            master["flags"] == "master"
            and int(master["num-other-sentinels"]) == len(self.sentinels) - 1
            and {int(one["port"]) for one in replicas if one["flags"] == "slave" and one["master-link-status"] == "ok"}
            == {server.port for server in self.servers} - {int(master["port"])}
        )

    def hurry(self) -> None:
        """Let the sentinels look at their servers often; a master of old is then made a replica after two seconds."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.ResponseError):  # before Redis 7 nobody can hurry them
                ask(sentinel, "SENTINEL DEBUG", "INFO-PERIOD", 500, "PUBLISH-PERIOD", 500)

    def heal(self) -> None:
        """Bring back what was killed or stopped, let it follow the master, and wait until the sentinels see it so.

        The sentinels themselves take ten seconds to turn a master of old into a replica, unless they are to hurry.
        """
        for server in self.servers:
            if server.port in self.down:
                server.restart()
                self.down.discard(server.port)
            server.resume()
        settled_by(lambda: role(self.master()) == "master", "the sentinels name a master")
        master = self.master()
        for server in self.servers:
            if server is not master and not follows(server, master):
                ask(server, "REPLICAOF", master.host, master.port)
        settled_by(self.is_whole, "the sentinels see a master and its replicas")

    def _be(self, millis: int) -> None:
        for sentinel in self.sentinels:
            ask(sentinel, "SENTINEL SET", self.service, "down-after-milliseconds", millis)


@contextmanager
def sentinel_trio(binary: ServerBinary, *extra_args: str, service: str = "mymaster") -> Generator[SentinelTrio]:
    """A master, two replicas and three sentinels.

    :param extra_args: options of the servers, not of the sentinels.
    """
    args = [*_REPLICATION, *extra_args]
    with ExitStack() as stack:
        master = stack.enter_context(RedisServer.start(binary, *args))
        following = ("--replicaof", master.host, str(master.port))
        replicas = [stack.enter_context(RedisServer.start(binary, *args, *following)) for _ in range(2)]
        configuration = (
            f"sentinel monitor {service} {master.host} {master.port} 2\n"
            f"sentinel down-after-milliseconds {service} {PATIENT_MILLIS}\n"
            f"sentinel failover-timeout {service} 3000\n"
            f"sentinel parallel-syncs {service} 2\n"
        )
        sentinels = [
            stack.enter_context(RedisServer.start(binary, "--sentinel", configuration=configuration)) for _ in range(3)
        ]
        places = ",".join(f"{one.host}:{one.port}" for one in sentinels)
        trio = SentinelTrio([master, *replicas], sentinels, f"redis+sentinel://{places}/{service}", service)
        settled_by(trio.is_whole, "the sentinels see a master and its replicas")
        yield trio
