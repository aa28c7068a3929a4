"""gevent and eventlet: sockets, threads and events that are those of greenlets, in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import servers
from tests.support.greenlets import SILENCE
from tests.support.proxies import Proxy

pytestmark = pytest.mark.redis

ROOT = Path(__file__).parents[2]

WORLDS = [
    ("gevent", "all"),
    ("gevent", "but-threads"),
    ("gevent", "late"),
    ("eventlet", "all"),
    ("eventlet", "but-threads"),
]
"""Libraries, and what they have replaced. Nothing of redis-py works where eventlet has come late."""


@pytest.fixture(scope="module")
def urls(
    server: servers.RedisServer, server_binary: servers.ServerBinary, tls_server: servers.TlsServer
) -> Generator[tuple[str, ...]]:
    """Return those of a server, of a silent one, of one with TLS, and of a cluster."""
    tls = f"rediss://{tls_server.address}/0?ssl_ca_certs={tls_server.authority}"
    tls += f"&ssl_certfile={tls_server.client_certificate}&ssl_keyfile={tls_server.client_certificate}"
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server.port))
        stack.enter_context(proxy.black_hole())
        cluster = stack.enter_context(servers.cluster(server_binary))
        yield server.url, f"redis://127.0.0.1:{proxy.port}", tls, cluster.url


@pytest.fixture(scope="module")
def processes(urls: tuple[str, ...]) -> Generator[dict[tuple[str, str], subprocess.Popen[str]]]:
    """Return a process of each world, which run at the same time."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.greenlets"]
    processes = {
        world: subprocess.Popen(
            [*command, *world, *urls], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for world in WORLDS
        if importlib.util.find_spec(world[0])
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=WORLDS, ids="-".join)
def seen(request: pytest.FixtureRequest, processes: dict[tuple[str, str], subprocess.Popen[str]]) -> dict[str, Any]:
    """Return what each scenario has given in the process of a world."""
    if request.param not in processes:
        pytest.skip(f"{request.param[0]} is not installed")
    output, errors = processes[request.param].communicate(timeout=120)
    assert output, errors
    return dict(json.loads(output))


@pytest.mark.parametrize("store", ["one_key", "cluster", "tls"])
def test_a_crowd_gets_the_tokens_that_there_are(seen: dict[str, Any], store: str) -> None:
    assert seen[store] == 10


def test_a_kept_connection_is_used_again_after_a_pause(seen: dict[str, Any]) -> None:
    assert seen["pause"] == 0


def test_a_crowd_shares_few_connections(seen: dict[str, Any]) -> None:
    assert seen["few_connections"] == 150


def test_a_silent_server_costs_each_the_timeout_and_stops_nobody_else(seen: dict[str, Any]) -> None:
    assert "StoreTimeoutError" in seen["silent"]["errors"]  # beside it the circuit, for the last of them
    assert seen["silent"]["longest"] < 4 * SILENCE  # one after the other they would take seven times as long
    assert seen["silent"]["gap"] < SILENCE


def test_waits_for_tokens_pass_at_the_same_time(seen: dict[str, Any]) -> None:
    assert 0.49 < seen["waiting"] < 5  # one after the other they would take 6.5 s


def test_an_interrupted_request_mixes_no_replies_and_loses_no_connection(seen: dict[str, Any]) -> None:
    assert seen["interrupted"] == {"wrong": 0, "free": 2}


def test_what_was_decided_locally_is_charged_beside_the_callers(seen: dict[str, Any]) -> None:
    assert seen["caught_up"] == 20
