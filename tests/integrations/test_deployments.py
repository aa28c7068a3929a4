"""Services in processes of their own that share a Redis: two versions of one, and two that have nothing in common."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from tests.integrations import uvicorns

pytestmark = pytest.mark.redis

SERVICE = """
from fastapi import Depends, FastAPI

from ratelimit.integrations.fastapi import RateLimit, configure

application = FastAPI()
configure(application, namespace={namespace!r})


@application.get("/exports", dependencies=[Depends(RateLimit({limits!r}, name={name!r}, version={version!r}))])
async def exports() -> None: ...
"""


class Process:
    """A process of a service."""

    def __init__(self, address: tuple[str, int], log: Path) -> None:
        self._connection = HTTPConnection(*address, timeout=60)
        self._log = log

    def ask(self) -> tuple[int, int, int]:
        """Make a request: its status, the quota that it fell under, and what is left of that."""
        self._connection.request("GET", "/exports")
        response = self._connection.getresponse()
        response.read()
        quota = re.search(r";q=(\d+)", response.headers["RateLimit-Policy"])
        remaining = re.search(r";r=(\d+)", response.headers["RateLimit"])
        assert quota is not None
        assert remaining is not None
        return response.status, int(quota[1]), int(remaining[1])

    def warnings(self) -> list[str]:
        return [line for line in self._log.read_text().splitlines() if "in the code, but" in line]

    def close(self) -> None:
        self._connection.close()


class Fleet(ExitStack):
    """Starts processes, and ends them all."""

    def __init__(self, directory: Path, redis_url: str) -> None:
        super().__init__()
        self._directory = directory
        self._redis_url = redis_url
        self._count = 0

    def start(
        self, limits: str, *, name: str | None = None, version: int | None = None, namespace: str | None = None
    ) -> Process:
        self._count += 1
        directory = self._directory / str(self._count)
        directory.mkdir()
        text = SERVICE.format(limits=limits, name=name, version=version, namespace=namespace)
        address = self.enter_context(uvicorns.program(text, directory, redis_url=self._redis_url))
        process = Process(address, directory / "log")
        self.callback(process.close)
        return process


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Generator[Fleet]:
    with Fleet(tmp_path, redis_url) as fleet:
        yield fleet


def test_limits_change_while_old_and_new_processes_run_side_by_side_and_are_rolled_back(fleet: Fleet) -> None:
    old = fleet.start("10/day", name="exports", version=1)
    assert [old.ask() for _ in range(5)] == [(200, 10, left) for left in (9, 8, 7, 6, 5)]
    new = fleet.start("100/day", name="exports", version=2)
    assert new.ask() == (200, 100, 49), "half full before, and after"
    assert [each.ask() for each in (old, new, old, new)] == [(200, 100, left) for left in (48, 47, 46, 45)]
    (warning,) = old.warnings()
    assert "the limits of 'exports' are 10/day in the code, but 100/day in the store" in warning
    assert new.warnings() == []

    rolled_back = fleet.start("10/day", name="exports", version=3)
    assert [each.ask() for each in (rolled_back, new, rolled_back)] == [(200, 10, left) for left in (3, 2, 1)]
    assert rolled_back.warnings() == []
    assert len(new.warnings()) == 1
    assert rolled_back.ask()[0] == 200
    assert {each.ask()[0] for each in (old, new, rolled_back)} == {429}


def test_without_a_version_the_limits_of_live_buckets_stay(fleet: Fleet) -> None:
    old, new = fleet.start("10/day", name="exports"), fleet.start("100/day", name="exports")
    assert [each.ask() for each in (old, new, old)] == [(200, 10, left) for left in (9, 8, 7)]
    (warning,) = new.warnings()
    assert "raise version=" in warning


def test_services_count_apart_by_namespace_and_together_without(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = fleet.start("2/day"), fleet.start("2/day")
    assert [each.ask()[0] for each in (one, other, one)] == [200, 200, 429]
    shop = fleet.start("2/day", namespace="shop")
    monkeypatch.setenv("RATELIMIT_NAMESPACE", "blog")
    blog = fleet.start("2/day")
    assert [each.ask()[0] for each in (shop, blog) * 3] == [200, 200, 200, 200, 429, 429]
