# No "from __future__ import annotations": FastAPI could not resolve what names a limit that a test has made.
"""Decisions that are settled after the work, and rules that ask the response: the fields say what is left."""

import logging
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from functools import partial
from typing import Annotated, Any
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
from django.core.exceptions import PermissionDenied
from django.http import HttpResponse as DjangoResponse
from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from flask import Flask, abort
from starlette.applications import Starlette
from starlette.routing import Route
from werkzeug.test import Client as WerkzeugClient

from ratelimit import InvalidArgumentError, InvalidConfigurationError, OnError
from ratelimit.integrations.asgi import RateLimitMiddleware
from ratelimit.integrations.django import rate_limit
from ratelimit.integrations.fastapi import RateLimit, configure
from ratelimit.integrations.flask import RateLimiter
from ratelimit.integrations.http import HttpDecision, HttpResponse, Rule
from ratelimit.integrations.wsgi import RateLimitMiddleware as WsgiMiddleware
from ratelimit.integrations.wsgi import decision_of
from tests.integrations import django_site
from tests.integrations.asgi_parts import PEER, Stored, parsed
from tests.integrations.django_site import Site, fields
from tests.integrations.requests_of import Limits, request_of
from tests.support.both_faces import settled

# isort: split
from rest_framework.response import Response
from rest_framework.views import APIView

from ratelimit.integrations.rest_framework import RateLimitThrottle


def failed(response: HttpResponse) -> bool:
    """Count failures only."""
    return response.status == 401


FAILURES = Rule("3/hour", name="failures", deduct_when=failed)
KEY = f"failures:{PEER}"


@pytest.fixture
def stored() -> Stored:
    return Stored()


def left(response: Any) -> list[int]:
    """What the header field says is left."""
    return [parameters["r"] for _, parameters in parsed(response, "RateLimit")]


# The rule itself


def test_a_rule_shows_and_compares_what_it_asks_of_the_response() -> None:
    assert "deduct_when=<function failed" in repr(FAILURES)
    assert Rule("3/hour", name="failures", deduct_when=failed) == FAILURES
    assert Rule("3/hour", name="failures") != FAILURES
    with pytest.raises(InvalidConfigurationError, match="deduct_when must be a callable; got 401"):
        Rule("3/hour", deduct_when=401)  # type: ignore[arg-type]  # the point


def test_a_response_has_the_attributes_of_the_frameworks_own() -> None:
    own = DjangoResponse("hello", status=201)
    response = HttpResponse(201, own.headers.get, own)
    assert (response.status, response.status_code, response.header("content-type")) == (
        201,
        201,
        "text/html; charset=utf-8",
    )
    with pytest.raises(AttributeError, match="neither HttpResponse nor HttpResponse has 'colour'"):
        _ = response.colour


@pytest.mark.parametrize("kept", [True, False])
async def test_the_response_is_asked_once(asynchronous: bool, kept: bool) -> None:
    seen: list[int] = []

    def look(response: HttpResponse) -> bool:
        seen.append(response.status)
        return kept

    limits = Limits(Rule("3/hour", name="failures", deduct_when=look), asynchronous=asynchronous)
    request = request_of()
    assert await limits.decide(request)
    for _ in range(2):
        await settled(limits.limiter.deduct(request, lambda: HttpResponse(200, lambda _: None)))
    assert seen == ([200, 200] if kept else [200])
    assert limits.consumed(KEY) == int(kept)


async def test_a_decision_that_is_settled_asks_no_response(asynchronous: bool) -> None:
    limits = Limits(FAILURES, asynchronous=asynchronous)
    request = request_of()
    decision = await limits.decide(request)
    if asynchronous:
        await decision.asettle(2)
    else:
        decision.settle(2)
    await settled(limits.limiter.deduct(request, lambda: HttpResponse(200, lambda _: None)))
    assert limits.consumed(KEY) == 2


async def test_in_asyncio_it_may_be_async() -> None:
    async def later(response: HttpResponse) -> bool:
        return response.status == 401

    limits = Limits(Rule("3/hour", name="failures", deduct_when=later), asynchronous=True)
    request = request_of()
    assert await limits.decide(request)
    await settled(limits.limiter.deduct(request, lambda: HttpResponse(200, lambda _: None)))
    assert limits.consumed(KEY) == 0


async def test_what_another_rule_refuses_is_given_back_once(asynchronous: bool) -> None:
    limits = Limits(FAILURES, Rule("1/hour", name="all"), asynchronous=asynchronous)
    for number in range(3):
        request = request_of()
        assert bool(await limits.decide(request)) is (number == 0)
        await settled(limits.limiter.deduct(request, lambda: HttpResponse(401, lambda _: None)))
    assert limits.consumed(KEY) == 1


# ASGI


async def login(request: Any) -> PlainTextResponse:
    return PlainTextResponse("", status_code=int(request.query_params.get("status", 200)))


def asgi_client(stored: Stored, *rules: Any, endpoint: Any = login) -> TestClient:
    app = RateLimitMiddleware(Starlette(routes=[Route("/", endpoint)]), *rules, manager=stored.amanager)
    return TestClient(app, client=(PEER, 4711))


def test_asgi_counts_failures_only(stored: Stored) -> None:
    client = asgi_client(stored, FAILURES)
    assert [left(client.get(f"/?status={status}")) for status in (200, 401, 200, 401)] == [[3], [2], [2], [1]]
    assert stored.consumed(KEY) == 2
    assert [client.get("/?status=401").status_code for _ in range(2)] == [401, 429]
    assert stored.consumed(KEY) == 3


def test_asgi_looks_at_header_fields(stored: Stored) -> None:
    async def hit(_: Any) -> PlainTextResponse:
        return PlainTextResponse("", headers={"X-Cache": "hit"})

    rule = Rule("3/hour", name="failures", deduct_when=lambda response: response.header("x-cache") != "hit")
    assert left(asgi_client(stored, rule, endpoint=hit).get("/")) == [3]


def test_asgi_keeps_what_ends_without_a_response(stored: Stored) -> None:
    async def broken(_: Any) -> PlainTextResponse:
        raise ZeroDivisionError

    client = asgi_client(stored, FAILURES, endpoint=broken)
    with pytest.raises(ZeroDivisionError):
        client.get("/")
    assert stored.consumed(KEY) == 0  # Starlette answers with 500 before it raises
    app = RateLimitMiddleware(broken_app, FAILURES, manager=stored.amanager)
    with pytest.raises(ZeroDivisionError):
        TestClient(app, client=(PEER, 4711)).get("/")
    assert stored.consumed(KEY) == 1


async def broken_app(*_: Any) -> None:
    raise ZeroDivisionError


def test_asgi_settles_before_the_answer_and_shows_what_is_left(stored: Stored) -> None:
    async def work(request: Request) -> PlainTextResponse:
        decision: HttpDecision = request.state.ratelimit
        await decision.asettle(int(request.query_params["cost"]))
        return PlainTextResponse("")

    client = asgi_client(stored, Rule("100/hour", cost=40, name="tokens"), endpoint=work)
    assert [left(client.get(f"/?cost={cost}")) for cost in (10, 0, 65)] == [[90], [90], [25]]
    assert stored.consumed(f"tokens:{PEER}") == 75


def test_asgi_settles_at_the_end_of_a_stream(stored: Stored) -> None:
    async def stream(request: Request) -> StreamingResponse:
        decision: HttpDecision = request.state.ratelimit

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 5
            await decision.asettle(15)

        return StreamingResponse(chunks())

    client = asgi_client(stored, Rule("100/hour", cost=40, name="tokens"), endpoint=stream)
    response = client.get("/")
    assert (response.content, left(response)) == (b"x" * 15, [60])
    assert stored.consumed(f"tokens:{PEER}") == 15


def test_asgi_gives_an_accepted_websocket_the_status_101(stored: Stored) -> None:
    seen: list[int] = []

    def look(response: HttpResponse) -> bool:
        seen.append(response.status)
        return False

    app = FastAPI()

    @app.websocket("/")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    app.add_middleware(RateLimitMiddleware, Rule("3/hour", name="failures", deduct_when=look), manager=stored.amanager)
    with TestClient(app, client=(PEER, 4711)).websocket_connect("/"):
        pass
    assert seen == [101]
    assert stored.consumed(KEY) == 0


# FastAPI


def test_fastapi_counts_failures_of_a_route(stored: Stored) -> None:
    app = FastAPI()
    configure(app, manager=stored.amanager)

    @app.get("/", dependencies=[Depends(RateLimit(FAILURES))])
    async def index(status: int) -> JSONResponse:
        if status == 403:
            raise HTTPException(403)
        return JSONResponse({}, status)

    client = TestClient(app, client=(PEER, 4711))
    assert [left(client.get(f"/?status={status}")) for status in (200, 401, 403)] == [[3], [2], [2]]
    assert stored.consumed(KEY) == 1


def test_fastapi_needs_the_middleware_for_that(stored: Stored) -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(RateLimit(FAILURES, manager=stored.amanager))])
    async def index() -> None: ...

    with pytest.raises(InvalidArgumentError, match=r"needs the middleware: call configure\(app\)"):
        TestClient(app, client=(PEER, 4711)).get("/")


@pytest.mark.parametrize("configured", [True, False])
def test_fastapi_shows_what_is_left_after_a_settlement(stored: Stored, configured: bool) -> None:
    app = FastAPI()
    if configured:
        configure(app, manager=stored.amanager)
    requests = RateLimit("10/hour", name="requests", manager=stored.amanager)
    tokens = RateLimit("100/hour", name="tokens", cost=40, manager=stored.amanager)

    @app.get("/", dependencies=[Depends(requests)])
    async def index(decision: Annotated[HttpDecision, Depends(tokens)], cost: int) -> dict[str, int]:
        await decision.asettle(cost)
        return {}

    client = TestClient(app, client=(PEER, 4711))
    assert [left(client.get(f"/?cost={cost}")) for cost in (10, 0, 65)] == [[9, 90], [8, 90], [7, 25]]
    assert (stored.consumed(f"tokens:{PEER}"), stored.consumed(f"requests:{PEER}")) == (75, 3)


# WSGI


def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    query = environ.get("QUERY_STRING", "")
    if query.startswith("cost="):
        decision_of(environ).settle(int(query.removeprefix("cost=")))
        query = ""
    start_response(f"{query.removeprefix('status=') or 200} Whatever", [("X-Cache", "hit"), ("X-Cache", "miss")])
    return [b""]


def wsgi_client(stored: Limits, *rules: Any) -> Callable[[str], Any]:
    client = WerkzeugClient(WsgiMiddleware(wsgi_app, *rules, manager=stored.manager))  # type: ignore[arg-type]
    return lambda query: client.get(f"/?{query}", environ_base={"REMOTE_ADDR": PEER})


def test_wsgi_counts_failures_only(stored: Stored) -> None:
    get = wsgi_client(stored, FAILURES)
    assert [get(f"status={status}").headers["RateLimit"].split(";")[1] for status in (200, 401, 200, 401)] == [
        *("r=3", "r=2", "r=2", "r=1")
    ]
    assert stored.consumed(KEY) == 2


def test_wsgi_looks_at_header_fields(stored: Stored) -> None:
    seen: list[Any] = []

    def look(response: HttpResponse) -> bool:
        seen.append(response.header("x-cache"))
        return True

    rule = Rule("3/hour", deduct_when=look)
    wsgi_client(stored, rule)("")
    assert seen == ["hit, miss"]


def test_wsgi_settles_before_the_answer_and_shows_what_is_left(stored: Stored) -> None:
    get = wsgi_client(stored, Rule("100/hour", cost=40, name="tokens"))
    assert [get(f"cost={cost}").headers["RateLimit"].split(";")[1] for cost in (10, 0, 65)] == ["r=90", "r=90", "r=25"]
    assert stored.consumed(f"tokens:{PEER}") == 75


# Flask


@pytest.fixture
def flask(stored: Stored) -> Any:
    app = Flask(__name__)
    manager: Any = stored.manager
    limiter = RateLimiter(Rule("100/hour", name="all", cost=40, routes=["/work"]), app=app, manager=manager)

    @app.get("/<int:status>")
    @limiter.limit(FAILURES)
    def login(status: int) -> Any:
        if status == 500:
            raise ZeroDivisionError
        return abort(status) if status > 400 else ("", status)

    @app.get("/work")
    def work() -> str:
        limiter.decision.settle(10)
        return ""

    client = app.test_client()
    return lambda path: client.get(path, environ_base={"REMOTE_ADDR": PEER})


def test_flask_counts_failures_only(flask: Any, stored: Stored) -> None:
    shown = [flask(f"/{status}").headers["RateLimit"].split(";")[1] for status in (200, 401, 404, 500, 401)]
    assert shown == ["r=3", "r=2", "r=2", "r=2", "r=1"]
    assert stored.consumed(KEY) == 2


def test_flask_settles_before_the_answer_and_shows_what_is_left(flask: Any, stored: Stored) -> None:
    assert flask("/work").headers["RateLimit"].split(";")[1] == "r=90"
    assert stored.consumed(f"all:{PEER}") == 10


# Django


@pytest.fixture
def _django() -> Generator[None]:
    with django_site.overridden():
        yield


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def site(request: pytest.FixtureRequest, _django: None) -> Callable[..., Site]:
    """A site over one of the faces."""
    return partial(Site, asynchronous=request.param)


def view_of(site: Site) -> Any:
    """A view that answers with the status that it is asked for."""

    def view(request: Any) -> DjangoResponse:
        status = int(request.GET.get("status", 200))
        if status == 403:
            raise PermissionDenied
        return DjangoResponse("", status=status)

    async def aview(request: Any) -> DjangoResponse:
        return view(request)

    return aview if site.asynchronous else view


def shown_left(response: Any) -> list[int]:
    return [parameters["r"] for _, parameters in fields(response)["RateLimit"]]


def test_django_counts_failures_only(site: Callable[..., Site]) -> None:
    with site(RULES=[FAILURES]) as at, at.showing(index=view_of(at)):
        statuses = (200, 401, 403, 404, 401)
        assert [shown_left(at.get(f"/?status={status}")) for status in statuses] == [[3], [2], [2], [2], [1]]
        assert at.get("/unknown").status_code == 404
        assert at.consumed("failures:127.0.0.1") == 2


def test_django_lets_the_middleware_look_at_answers_to_exceptions(site: Callable[..., Site]) -> None:
    for middleware, charged in ((True, 1), (False, 2)):
        with site(middleware=middleware) as at, at.showing(index=rate_limit(FAILURES)(view_of(at))):
            for status in (200, 401, 403):
                at.get(f"/?status={status}")
            assert at.consumed("failures:127.0.0.1") == charged


def test_django_lets_a_view_look_for_its_own_rules_only(site: Callable[..., Site]) -> None:
    def not_found(response: HttpResponse) -> bool:
        return response.status == 404

    own = Rule("9/hour", name="own", deduct_when=not_found)
    with site(RULES=[FAILURES]) as at, at.showing(index=rate_limit(own)(view_of(at))):
        at.get("/?status=404")
        assert (at.consumed("own:127.0.0.1"), at.consumed("failures:127.0.0.1")) == (1, 0)


def test_django_settles_before_the_answer_and_shows_what_is_left(site: Callable[..., Site]) -> None:
    def work(request: Any) -> DjangoResponse:
        request.ratelimit.settle(10)
        return DjangoResponse("")

    async def awork(request: Any) -> DjangoResponse:
        await request.ratelimit.asettle(10)
        return DjangoResponse("")

    with site(RULES=[Rule("100/hour", name="tokens", cost=40)]) as at:
        with at.showing(index=awork if at.asynchronous else work):
            assert shown_left(at.get()) == [90]
        assert at.consumed("tokens:127.0.0.1") == 10


# REST framework


class Failures(RateLimitThrottle):
    limits = "3/hour"
    name = "failures"
    deduct_when = staticmethod(failed)


class Tokens(RateLimitThrottle):
    limits = "100/hour"
    name = "tokens"
    cost = 40


class Login(APIView):
    authentication_classes = ()
    throttle_classes = (Failures,)

    def get(self, request: Any) -> Response:
        return Response(status=int(request.query_params["status"]))


class Work(APIView):
    authentication_classes = ()
    throttle_classes = (Tokens,)

    def get(self, request: Any) -> Response:
        request._request.ratelimit.settle(10)
        return Response()


@pytest.mark.usefixtures("_django")
def test_rest_framework_counts_failures_only_behind_the_middleware() -> None:
    with Site(asynchronous=False) as at, at.showing(index=Login.as_view()):
        assert [shown_left(at.get(f"/?status={status}")) for status in (200, 401, 200)] == [[3], [2], [2]]
        assert at.consumed("failures:ip:127.0.0.1") == 1


@pytest.mark.usefixtures("_django")
@pytest.mark.parametrize("middleware", [True, False])
def test_rest_framework_settles_and_shows_what_is_left(middleware: bool) -> None:
    with Site(asynchronous=False, middleware=middleware) as at, at.showing(index=Work.as_view()):
        assert shown_left(at.get()) == [90]
        assert at.consumed("tokens:ip:127.0.0.1") == 10


# Where the store fails


@pytest.mark.parametrize("on_error", [OnError.DENY, OnError.RAISE], ids=lambda policy: policy.kind)
def test_the_client_gets_its_answer_where_nothing_can_be_given_back(
    stored: Stored, on_error: OnError, caplog: pytest.LogCaptureFixture
) -> None:
    def corrupt(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stored.memory.put(KEY, b"something else")
        start_response("200 OK", [])
        return [b""]

    client = WerkzeugClient(WsgiMiddleware(corrupt, FAILURES, manager=stored.manager, on_error=on_error))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "ratelimit"):
        response = client.get("/", environ_base={"REMOTE_ADDR": PEER})
    assert (response.status_code, left(response)) == (200, [2])
    assert ("could not be settled" in caplog.text) is (on_error == OnError.RAISE)
