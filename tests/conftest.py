from __future__ import annotations

import os
from collections.abc import Generator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from hypothesis import settings

from ratelimit import AsyncProxyManager, ProxyManager
from tests.support import servers
from tests.support.both_faces import Face
from tests.support.decision_paths import Way
from tests.support.workers import Workers, patient

# An example has no deadline: a busy machine is slow, which proves nothing.
settings.register_profile("test", deadline=None)
settings.register_profile("soak", max_examples=int(os.environ.get("RATELIMIT_TEST_EXAMPLES", "20000")), deadline=None)
settings.load_profile("test")


# Tests of processes, frameworks, commands and documents. They are the same on any version of the server.
ANY_SERVER = {
    *("test_benchmarks", "test_connecting", "test_copies", "test_docs", "test_examples", "test_exit", "test_forks"),
    *("test_frozen_time", "test_greenlets", "test_interruptions", "test_lifecycle", "test_packaging", "test_servers"),
    "test_soak",
}
ANY_SERVER_ROOMS = {"cli", "integrations"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here)
        if place.parts[0] in ANY_SERVER_ROOMS or place.stem in ANY_SERVER:
            item.add_marker(pytest.mark.any_server)


# Tests that have a target of their own: `make interop`, which needs Java, and `make test-benchmarks`.
APART = Path("promises", "interop"), Path("test_benchmarks.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests that have a target of their own, unless they are asked for by name."""
    here = Path(__file__).parent
    if collection_path not in [here / place for place in APART]:
        return None
    asked_for = [Path(arg.split("::")[0]).absolute() for arg in config.args]
    return not any(collection_path in (path, *path.parents) for path in asked_for) or None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Run the tests one after another where they share a server that is given: each of them flushes its database."""
    return 1 if servers.URL_VARIABLE in os.environ else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report the servers that one of several processes has used."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["servers"] = dict(servers.used)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the servers of a process that has ended; one that was killed has reported none."""
    servers.used.update(getattr(node, "workeroutput", {}).get("servers", {}))


def pytest_report_header() -> list[str]:
    try:
        binary = servers.find_server() or "none on this machine; Docker is tried where one is needed"
    except servers.NoServerError as error:
        binary = str(error)
    header = [f"redis server: {binary}"]
    if servers.URL_VARIABLE in os.environ:
        header.append(f"shared redis server: as {servers.URL_VARIABLE} says; its database is flushed before each test")
    return header


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for description, times in servers.used.items():
        terminalreporter.write_line(f"redis server: {description}, started or connected to {times} times")


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Generator[None]:
    """Make managers with a timeout of 30 seconds where a test gives none: machines that run tests are busy."""
    with pytest.MonkeyPatch.context() as patch:
        for manager in (ProxyManager, AsyncProxyManager):
            patch.setattr(manager, "__init__", partialmethod(manager.__init__, timeout=30))
        yield


@pytest.fixture(params=[ProxyManager, AsyncProxyManager], ids=["sync", "asyncio"])
def face(request: pytest.FixtureRequest) -> Face:
    """The class of managers of either face."""
    chosen: Face = request.param
    return chosen


@pytest.fixture(scope="session")
def redis_server() -> servers.SharedServer:
    """The server that the tests share."""
    return servers.shared_server()


@pytest.fixture(scope="session")
def server_binary() -> servers.ServerBinary:
    """The program for tests that start, stop and kill servers of their own."""
    binary = servers.find_server()
    if binary is None:
        raise servers.NoServerError(
            "this test starts Redis servers of its own: install one (apt-get install redis-server, brew install redis) "
            f"or name a program in {servers.BINARY_VARIABLE}"
        )
    return binary


@pytest.fixture(scope="session")
def native_swaps(redis_server: servers.SharedServer) -> bool:
    """Whether the server that the tests share has a command that swaps."""
    with redis.Redis.from_url(redis_server.url) as client:
        return servers.swaps_natively(client)


@pytest.fixture(scope="session")
def native_binary() -> servers.ServerBinary:
    """The program of a server that has a command that swaps."""
    binary = servers.find_native_server()
    if binary is None:
        pytest.skip(
            f"the server of the tests does not know SET IFEQ (Valkey 8.1, Redis 8.4), and {servers.NATIVE_VARIABLE} "
            "names no other"
        )
    return binary


@pytest.fixture(scope="module")
def server(server_binary: servers.ServerBinary) -> Generator[servers.RedisServer]:
    """A server of the module's own."""
    with servers.RedisServer.start(server_binary) as server:
        yield server


@pytest.fixture
def admin(server: servers.RedisServer) -> Generator[redis.Redis]:
    """A client of the module's own server, which is empty."""
    with server.client() as client:
        client.flushall()
        client.script_flush()
        yield client


@pytest.fixture(scope="module")
def stopped_server(server_binary: servers.ServerBinary) -> Generator[servers.RedisServer]:
    """A server of the module's own that was stopped, so that nothing listens on its port."""
    with servers.RedisServer.start(server_binary) as server:
        server.stop()
        yield server


@pytest.fixture(scope="module")
def tls_server(
    server_binary: servers.ServerBinary, tmp_path_factory: pytest.TempPathFactory
) -> Generator[servers.TlsServer]:
    """A server with a certificate of a private authority, which asks its clients for a certificate, too."""
    directory = tmp_path_factory.mktemp("tls")
    authority, certificate, for_client = directory / "ca.pem", directory / "server.pem", directory / "client.pem"
    ca = trustme.CA()
    ca.cert_pem.write_to_path(authority)
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    ca.issue_cert("limiter@localhost").private_key_and_cert_chain_pem.write_to_path(for_client)
    args = ["--tls-cert-file", certificate, "--tls-key-file", certificate, "--tls-ca-cert-file", authority]
    with servers.RedisServer.start(server_binary) as probe:
        # The server must know its port when it starts: this one was free a moment ago.
        plain, secure = probe.port, probe.port + 10_000
    try:
        server = servers.RedisServer.start(server_binary, *map(str, args), "--tls-port", str(secure), port=plain)
    except servers.ServerError as error:
        if "tls-" not in str(error):
            raise
        pytest.skip(f"{server_binary} was built without TLS")
    with server:
        yield servers.TlsServer(server, f"{server.host}:{secure}", authority, for_client)


@pytest.fixture
def redis_url(redis_server: servers.SharedServer) -> str:
    """The URL of an empty database."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushdb()
    return redis_server.url


@pytest.fixture(scope="module")
def processes() -> Generator[Workers]:
    """Other processes, which the tests of a module share."""
    workers = Workers()
    yield workers
    workers.close()


@pytest.fixture
def workers(processes: Workers, request: pytest.FixtureRequest) -> Workers:
    """Other processes, whose decisions go the way that the parameter of the fixture says."""
    processes.way = getattr(request, "param", Way())
    return processes


@pytest.fixture
def url(redis_url: str) -> str:
    """The URL of an empty database, with timeouts for many processes at once."""
    return patient(redis_url)


@pytest.fixture
def client(url: str) -> Generator[redis.Redis]:
    """A client of the database that ``url`` names."""
    with redis.Redis.from_url(url) as client:
        yield client
