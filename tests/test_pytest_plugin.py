"""The fixtures that come with the library, as the tests of a service use them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ratelimit import RateLimitExceeded
from ratelimit.integrations.functions import limited
from ratelimit.integrations.http import AsyncLimiter, HttpRequest, Limiter, Rule
from ratelimit.policy.switch import ENABLED_VARIABLE
from ratelimit.pytest_plugin import Decisions
from ratelimit.testing import ManualClock

NOWHERE = "redis://localhost:1/0"


@pytest.fixture(autouse=True)
def _without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATELIMIT_URL", NOWHERE)


def request() -> HttpRequest:
    return HttpRequest("GET", "/", "192.0.2.1", lambda _: None)


limiter = Limiter(Rule("2/minute", name="api"))
alimiter = AsyncLimiter(Rule("2/minute", name="api"), manager=NOWHERE)


@limited("1/minute", name="send")
def send() -> None: ...


@pytest.mark.usefixtures("ratelimit_disabled")
def test_limits_are_off() -> None:
    assert all(limiter.decide(request()) for _ in range(5))
    send()
    send()


@pytest.mark.parametrize("time", [1, 2])
def test_limits_are_on_with_full_buckets_and_a_clock_to_move(
    ratelimit_clock: ManualClock, monkeypatch: pytest.MonkeyPatch, time: int
) -> None:
    monkeypatch.setenv(ENABLED_VARIABLE, "false")
    assert [bool(limiter.decide(request())) for _ in range(3)] == [True, True, False], time
    ratelimit_clock.advance(30)
    assert [bool(limiter.decide(request())) for _ in range(2)] == [True, False]
    send()
    with pytest.raises(RateLimitExceeded):
        send()


@pytest.mark.usefixtures("ratelimit_clock")
async def test_sync_and_async_code_share_the_buckets() -> None:
    assert limiter.decide(request())
    assert await alimiter.decide(request())
    assert not await alimiter.decide(request())
    assert not limiter.decide(request())


@pytest.mark.usefixtures("ratelimit_clock")
def test_decisions_are_recorded(ratelimit_decisions: Decisions) -> None:
    for _ in range(3):
        limiter.decide(request())
    send()
    ratelimit_decisions.assert_admitted("api", key="192.0.2.1", times=2)
    ratelimit_decisions.assert_refused("api")
    ratelimit_decisions.assert_admitted("send", times=1)
    ratelimit_decisions.assert_refused("send", times=0)
    assert ratelimit_decisions.count() == 4
    with pytest.raises(pytest.fail.Exception, match=r"the limit 'send' should have refused at least once"):
        ratelimit_decisions.assert_refused("send")
    with pytest.raises(pytest.fail.Exception, match="should have admitted the key 'x' 2 times, and has 0"):
        ratelimit_decisions.assert_admitted(key="x", times=2)


def test_pytest_finds_them_where_the_library_is_installed(tmp_path: Path) -> None:
    (tmp_path / "test_service.py").write_text(
        "def test(ratelimit_clock, ratelimit_decisions, ratelimit_disabled):\n    assert ratelimit_clock.slept == []\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


CONFTEST = """
import pytest


@pytest.fixture(autouse=True)
def _without_limits(ratelimit_disabled):
    pass
"""

TESTS = """
import pytest

from ratelimit import RateLimitExceeded
from ratelimit.integrations.functions import limited


@limited("1/minute", name="mail")
def send():
    return "sent"


def test_others():
    assert [send(), send()] == ["sent", "sent"]


def test_limits(ratelimit_clock):
    send()
    with pytest.raises(RateLimitExceeded):
        send()


def test_others_after_it():
    assert [send(), send()] == ["sent", "sent"]
"""


def test_a_test_about_limits_may_switch_them_on(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_service.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
