"""What the soak makes of what it has seen, and that each of its steps begins."""

from __future__ import annotations

import random
import socket
import time
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Any

import pytest

from ratelimit import ProxyManager, StoreError
from tests.promises.soak.__main__ import Run, judge, storm
from tests.promises.soak.faults import FaultyProxy
from tests.promises.soak.fuzz import TARGETS, _seeds
from tests.promises.soak.load import DELAYED, LEDGER, RATE, limits_of
from tests.promises.soak.verdict import growth, ledger, panels
from tests.support.servers import RedisServer, ServerBinary, ServerError

NOISE = random.Random(5)


@pytest.mark.parametrize(
    ("values", "grows"),
    [
        ([50.0] * 100, False),
        ([50 + NOISE.uniform(-10, 10) for _ in range(100)], False),
        ([50.0] * 99 + [5_000], False),
        ([*range(25), *[50] * 75], False),
        ([50 + at for at in range(100)], True),
        ([50 + at + NOISE.uniform(-10, 10) for at in range(100)], True),
        ([50.0] * 5, True),
    ],
    ids=["flat", "noise", "a peak at the end", "a warm-up", "a leak", "a leak with noise", "too few samples"],
)
def test_growth_is_told_from_noise_and_from_warming_up(values: list[float], grows: bool) -> None:
    assert bool(growth("memory", list(enumerate(values)), slack=8)) is grows


@pytest.mark.parametrize(("stored", "in_doubt", "right"), [(9, 0, False), (10, 0, True), (11, 0, False), (11, 1, True)])
def test_a_ledger_holds_what_was_acknowledged(stored: int, in_doubt: int, right: bool) -> None:
    assert (ledger("ledger", 10, stored, in_doubt) == []) is right


def test_the_chart_is_svg() -> None:
    root = ET.fromstring(panels({"memory <MB>": {"a & b": [(0, 1.0), (5, 2.0)]}, "nothing": {}}, [(1, 0.5)]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.redis
def test_books_are_compared_with_what_is_stored(server: RedisServer) -> None:
    with ProxyManager.from_url(server.url, limits_of) as manager:
        for key in (LEDGER, DELAYED):
            manager.remove(key)
            assert manager.try_consume(key, 5)
    begin = time.time()
    for taken, wrong in ((5, ()), (6, (LEDGER, DELAYED)), (10**6, (LEDGER, DELAYED, RATE))):
        run = Run(books={"threads": Counter({LEDGER: taken, DELAYED: taken, RATE: taken})})
        judge(run, server, begin)
        found = {reason.partition(":")[0] for reason in run.reasons}
        assert found == set(wrong)


@pytest.mark.redis
def test_the_proxy_has_the_faults_that_it_is_told_to_have(server: RedisServer) -> None:
    with FaultyProxy(server.port, random.Random(1)) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}?socket_timeout=0.5"
        with ProxyManager.from_url(url, "1000000/s") as manager:
            assert manager.try_consume("user:42")
            proxy.losses = 1.0
            with pytest.raises(StoreError):
                manager.try_consume("user:42")
            proxy.calm()
            proxy.delay = 0.001
            assert manager.try_consume("user:42")
            proxy.silent.set()
            with pytest.raises(StoreError):
                manager.try_consume("user:42")
            proxy.calm()
            proxy.reset()
            assert any(_succeeds(manager) for _ in range(5))
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", proxy.port), 1):
        pass


@pytest.mark.redis
def test_a_storm_that_ends_in_a_crash_leaves_a_server_that_answers(server_binary: ServerBinary) -> None:
    class Chance(random.Random):
        def choice(self, seq: Any) -> Any:
            return "crash"

    with RedisServer.start(server_binary) as server, FaultyProxy(server.port, random.Random(1)) as proxy:
        faults = storm(Chance(), proxy, server, Run())
        next(faults)
        with pytest.raises(ServerError, match="is stopped"):
            assert server.pid
        faults.close()
        with server.client() as client:
            assert client.ping()


def _succeeds(manager: ProxyManager) -> bool:
    try:
        return manager.try_consume("user:42")
    except StoreError:
        return False


@pytest.mark.parametrize("target", TARGETS)
def test_a_fuzzer_begins_with_examples(target: str) -> None:
    assert len(list(_seeds(target))) >= 3
