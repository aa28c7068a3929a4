"""The adapter of requests over real HTTP, under a limit."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    RateLimitExceeded,
)
from ratelimit.testing import ManualClock
from tests.integrations.api_server import ApiServer

pytest.importorskip("http_sf")
requests = pytest.importorskip("requests")

from ratelimit.integrations.outbound import OutboundLimit, host_of  # noqa: E402
from ratelimit.integrations.requests import RateLimitAdapter  # noqa: E402

NOW = 1_700_000_000 * 10**9
SECOND = 10**9

Open = Callable[..., Any]


@pytest.fixture
def api() -> Generator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def open_session(clock: ManualClock) -> Generator[Open]:
    sessions = []

    def open_session(adapter: Any = None, **settings: Any) -> Any:
        manager = ProxyManager(MemoryStore(), clock=clock)
        settings = {"key": "api", "jitter": lambda: 0, "clock": clock, "manager": manager, **settings}
        session = requests.Session()
        session.mount("http://", RateLimitAdapter(OutboundLimit("1/second burst 2", **settings), adapter))
        sessions.append(session)
        return session

    yield open_session
    for session in sessions:
        session.close()


def test_requests_wait_for_their_turns(open_session: Open, api: ApiServer, clock: ManualClock) -> None:
    session = open_session()
    for number in range(4):
        assert session.get(f"{api.url}/{number}", timeout=20).text == f"/{number}"
    assert clock.slept == [SECOND] * 2


def test_an_answer_is_given_back_as_it_is_and_learned_from(
    open_session: Open, api: ApiServer, clock: ManualClock
) -> None:
    api.answer(429, {"Retry-After": "30"})
    session = open_session()
    refused = session.get(api.url)
    assert (refused.status_code, refused.headers["retry-after"], refused.text) == (429, "30", "/")
    session.get(api.url)
    assert clock.slept == [30 * SECOND]


def test_fields_that_are_sent_twice_are_learned_from(open_session: Open, api: ApiServer, clock: ManualClock) -> None:
    api.answer(200, [("RateLimit", '"a";r=0;t=30'), ("RateLimit", '"b";r=0;t=40')])
    session = open_session()
    session.get(api.url)
    session.get(api.url)
    assert clock.slept == [40 * SECOND]


def test_a_redirect_wants_a_turn_of_its_own(open_session: Open, api: ApiServer, clock: ManualClock) -> None:
    api.answer(302, {"Location": "/there"})
    session = open_session()
    assert session.get(api.url).text == "/there"
    session.get(api.url)
    assert clock.slept == [SECOND]


def test_a_turn_that_is_too_far_off_sends_nothing(open_session: Open, api: ApiServer) -> None:
    session = open_session(max_wait=0.5, key=host_of)
    session.get(api.url)
    session.get(api.url)
    with pytest.raises(RateLimitExceeded) as refusal:
        session.get(api.url)
    assert (refusal.value.key, refusal.value.retry_after) == ("127.0.0.1", 1.0)
    assert len(api.paths) == 2


def test_another_adapter_can_send_the_requests(open_session: Open, api: ApiServer) -> None:
    class Naming(requests.adapters.HTTPAdapter):  # type: ignore[misc,name-defined]  # imported where it is there
        closed = 0

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            request.url += "named"
            return super().send(request, *args, **kwargs)

        def close(self) -> None:
            Naming.closed += 1
            super().close()

    session = open_session(Naming())
    assert session.get(f"{api.url}/").text == "/named"
    session.close()
    assert Naming.closed == 1


@pytest.mark.parametrize(("status", "slept"), [(429, [7 * SECOND]), (503, [])])
def test_answers_that_urllib3_has_repeated_the_request_for_teach_what_is_left_of_them(
    open_session: Open, api: ApiServer, clock: ManualClock, status: int, slept: list[int]
) -> None:
    """The error has the status, and nothing of the fields."""
    for _ in range(3):
        api.answer(status, {"Retry-After": "0"})
    retry = requests.adapters.Retry(2, status_forcelist=[status], backoff_factor=0)
    session = open_session(requests.adapters.HTTPAdapter(max_retries=retry), default_hold=7)
    with pytest.raises(requests.exceptions.RetryError):
        session.get(api.url)
    assert len(api.paths) == 3
    session.get(api.url)
    assert clock.slept == slept


def test_the_last_answer_is_learned_from_where_urllib3_hands_it_out(
    open_session: Open, api: ApiServer, clock: ManualClock
) -> None:
    for wait in ("0", "30"):
        api.answer(429, {"Retry-After": wait})
    retry = requests.adapters.Retry(1, status_forcelist=[429], backoff_factor=0, raise_on_status=False)
    session = open_session(requests.adapters.HTTPAdapter(max_retries=retry))
    assert session.get(api.url).status_code == 429
    session.get(api.url)
    assert clock.slept == [30 * SECOND]


def test_an_answer_that_nobody_gets_is_closed(open_session: Open) -> None:
    closed = []

    class Refusing(requests.adapters.BaseAdapter):  # type: ignore[misc,name-defined]  # the same
        def send(self, request: Any, *_: Any, **__: Any) -> Any:
            response = requests.Response()
            response.status_code = 429
            response.close = lambda: closed.append(request.url)
            return response

        def close(self) -> None: ...

    def interrupt() -> float:
        raise KeyboardInterrupt

    session = open_session(Refusing(), jitter=interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.get("http://api.example.com/")
    assert closed == ["http://api.example.com/"]


def test_a_manager_for_asyncio_is_refused() -> None:
    limit = OutboundLimit("1/second", key="api", manager=AsyncProxyManager(AsyncMemoryStore()))
    with pytest.raises(InvalidArgumentError, match="ProxyManager"):
        RateLimitAdapter(limit)
