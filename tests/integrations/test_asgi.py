from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from ratelimit import (
    AsyncProxyManager,
    InvalidArgumentError,
    InvalidConfigurationError,
    OnError,
    ProxyManager,
    StoreUnavailableError,
)
from ratelimit.integrations.asgi import App, Message, RateLimitMiddleware, Receive, Scope, Send, exempt, http_request
from ratelimit.integrations.http import Answers, AsyncLimiter, HttpDecision, Rule, client_ip, combined, route, user
from ratelimit.testing import ScriptedStore
from tests.integrations.asgi_parts import PEER, Stored, parsed
from tests.integrations.uvicorns import serving
from tests.support.both_faces import for_asyncio


async def hello(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def never(_scope: Scope, _receive: Receive, _send: Send) -> None:
    pytest.fail("the application was called")


def client_of(app: Any, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(PEER, 4711))
    return httpx.AsyncClient(transport=transport, base_url="http://testserver", headers=headers)


def scope_of(kind: str = "http", path: str = "/", **more: Any) -> Scope:
    scope = {"type": kind, "path": path, "headers": [], "client": (PEER, 4711), **more}
    return scope if kind == "websocket" else {"method": "GET", **scope}


async def no_message() -> Message:
    pytest.fail("something was read")


async def sent(app: App, scope: Scope, receive: Receive = no_message) -> list[Message]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, send)
    return messages


@pytest.fixture
def stored() -> Stored:
    return Stored()


def limiting(stored: Stored, app: App, *rules: Any, **settings: Any) -> RateLimitMiddleware:
    return RateLimitMiddleware(app, *rules, manager=stored.amanager, **settings)


class TestHttp:
    async def test_ten_requests_are_admitted_and_five_refused(self, stored: Stored) -> None:
        async with client_of(limiting(stored, hello, "10/minute")) as client:
            answers = [await client.get(f"/{number}") for number in range(15)]
        assert [answer.status_code for answer in answers] == [200] * 10 + [429] * 5
        assert parsed(answers[0], "RateLimit-Policy") == [("10/minute", {"q": 10, "w": 60})]
        assert [parsed(answer, "RateLimit")[0][1]["r"] for answer in answers[:10]] == list(range(9, -1, -1))
        refusal = answers[-1]
        assert refusal.headers["Retry-After"] == "6"
        assert refusal.headers["Content-Type"] == "application/problem+json"
        assert parsed(refusal, "RateLimit") == [("10/minute", {"r": 0, "t": 6})]
        assert refusal.json()["violated-policies"] == ["10/minute"]
        assert stored.consumed(f"|10/minute|ip:{PEER}") == 10

    async def test_a_refused_request_never_reaches_the_application_and_is_not_read(self, stored: Stored) -> None:
        middleware = limiting(stored, never, Rule("1/hour", cost=2))
        start, body = await sent(middleware, scope_of(method="POST"))
        assert (start["type"], start["status"]) == ("http.response.start", 429)
        assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
        assert b"retry-after" not in dict(start["headers"])

    @pytest.mark.parametrize("kind", ["lifespan", "something.new"])
    async def test_scopes_of_other_types_pass_untouched(self, stored: Stored, kind: str) -> None:
        seen: list[Any] = []

        async def app(*arguments: Any) -> None:
            seen.extend(arguments)

        async def send(message: Message) -> None: ...

        scope = {"type": kind}
        await limiting(stored, app, "1/hour")(scope, no_message, send)
        assert seen == [scope, no_message, send]
        assert scope == {"type": kind}

    async def test_a_field_that_the_application_has_set_stays_as_it_is(self, stored: Stored) -> None:
        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"RateLimit", b'"own";r=1')]})
            await send({"type": "http.response.body"})

        start, _ = await sent(limiting(stored, app, "2/hour"), scope_of())
        assert start["headers"] == [(b"RateLimit", b'"own";r=1'), (b"ratelimit-policy", b'"2/hour";q=2;w=3600')]

    async def test_without_headers_of_its_own_an_answer_gets_the_fields(self, stored: Stored) -> None:
        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 204})

        (start,) = await sent(limiting(stored, app, "2/hour"), scope_of())
        assert [name for name, _ in start["headers"]] == [b"ratelimit-policy", b"ratelimit"]

    async def test_fields_tell_what_was_decided_further_in(self, stored: Stored) -> None:
        inner = AsyncLimiter(Rule("5/hour", name="inner"), manager=stored.amanager)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert await inner.decide(http_request(scope))
            await hello(scope, receive, send)

        for rules in ([], ["10/hour"]):
            async with client_of(limiting(stored, app, *rules)) as client:
                told = parsed(await client.get("/"), "RateLimit-Policy")
            assert [name for name, _ in told] == [*rules, "inner"]

    async def test_what_is_not_limited_is_told_nothing(self, stored: Stored) -> None:
        for rules in ([], [Rule("1/hour", routes=["/other"])]):
            start, _ = await sent(limiting(stored, hello, *rules), scope_of())
            assert start["headers"] == [(b"content-type", b"text/plain")]

    async def test_bodies_and_extensions_are_not_touched(self, stored: Stored) -> None:
        start: Message = {"type": "http.response.start", "status": 200, "headers": ()}
        rest: list[Message] = [
            {"type": "http.response.body", "body": b"a", "more_body": True},
            {"type": "http.response.pathsend", "path": "/etc/hosts"},
            {"type": "http.response.trailers", "headers": []},
        ]

        async def app(_scope: Scope, receive: Receive, send: Send) -> None:
            assert receive is no_message
            for message in (start, *rest):
                await send(message)

        messages = await sent(limiting(stored, app, "2/hour"), scope_of(extensions={"http.response.pathsend": {}}))
        assert all(message is original for message, original in zip(messages[1:], rest, strict=True))
        assert start["headers"] == ()

    async def test_several_middlewares_pay_and_tell_once(self, stored: Stored) -> None:
        inner = limiting(stored, hello, "10/hour")
        async with client_of(limiting(stored, limiting(stored, inner), "10/hour", "7/minute")) as client:
            answer = await client.get("/")
        assert [name for name, _ in parsed(answer, "RateLimit")] == ["10/hour", "7/minute"]
        assert stored.consumed(f"|10/hour|ip:{PEER}") == 1

    async def test_the_answers_of_the_middleware_furthest_in_count(self, stored: Stored) -> None:
        inner = limiting(stored, hello, "10/hour", answers=Answers(standard=False, x_ratelimit="delta"))
        async with client_of(limiting(stored, inner)) as client:
            answer = await client.get("/")
        assert {name for name in answer.headers if "rate" in name} == {
            *("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")
        }

    async def test_what_is_refused_further_in_has_paid_nothing(self, stored: Stored) -> None:
        inner = limiting(stored, hello, Rule("1/hour", name="inner"))
        async with client_of(limiting(stored, inner, Rule("10/hour", name="outer"))) as client:
            assert [(await client.get("/")).status_code for _ in range(3)] == [200, 429, 429]
        assert stored.consumed(f"outer:{PEER}") == 1

    async def test_the_decision_is_in_the_state_of_the_request_alone(self, stored: Stored) -> None:
        seen: list[dict[str, Any]] = []

        async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
            seen.append(scope["state"])

        lifespan_state = {"database": object()}
        middleware = limiting(stored, app, "10/hour")
        for _ in range(2):  # as servers do: a shallow copy for each request
            await sent(middleware, scope_of(state=lifespan_state.copy()))
        await sent(middleware, scope_of())
        decisions = [state["ratelimit"] for state in seen]
        assert [decision.outcomes[0].probe.remaining_tokens for decision in decisions] == [9, 8, 7]
        assert all(isinstance(decision, HttpDecision) for decision in decisions)
        assert seen[0]["database"] is lifespan_state["database"]
        assert "ratelimit" not in lifespan_state

    async def test_errors_of_the_store_are_as_the_policy_says(self) -> None:
        store = ScriptedStore()
        manager = AsyncProxyManager(for_asyncio(store))
        store.fail(times=2)
        raising = RateLimitMiddleware(never, "1/hour", manager=manager, on_error=OnError.RAISE)
        with pytest.raises(StoreUnavailableError):
            await sent(raising, scope_of())
        denying = RateLimitMiddleware(never, "1/hour", manager=manager)
        assert (await sent(denying, scope_of()))[0]["status"] == 503

    def test_what_cannot_be_is_refused_at_once(self) -> None:
        with pytest.raises(InvalidConfigurationError, match="limit begins"):
            RateLimitMiddleware(hello, "many")
        with ProxyManager.from_url("memory://") as manager, pytest.raises(InvalidArgumentError, match="Async"):
            RateLimitMiddleware(hello, "1/hour", manager=manager)  # type: ignore[arg-type]  # that is it


class TestWebSocket:
    async def test_a_refused_handshake_is_answered_where_the_server_can(self, stored: Stored) -> None:
        middleware = limiting(stored, never, Rule("1/hour", cost=2))
        extension: dict[str, Any] = {"websocket.http.response": {}}
        start, body = await sent(middleware, scope_of("websocket", extensions=extension))
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
        assert body["type"] == "websocket.http.response.body"

    @pytest.mark.parametrize("more", [{}, {"extensions": None}, {"extensions": {"tls": {}}}])
    async def test_a_refused_handshake_is_closed_where_it_cannot(self, stored: Stored, more: dict[str, Any]) -> None:
        middleware = limiting(stored, never, Rule("1/hour", cost=2))
        assert await sent(middleware, scope_of("websocket", **more)) == [{"type": "websocket.close", "code": 1008}]

    def test_an_admitted_handshake_tells_and_the_rest_passes(self, stored: Stored) -> None:
        async def echo(websocket: WebSocket) -> None:
            await websocket.accept(subprotocol="chat", headers=[(b"x-own", b"1")])
            await websocket.send_text(await websocket.receive_text())
            await websocket.close()

        app = limiting(stored, Starlette(routes=[WebSocketRoute("/", echo)]), Rule("1/hour", methods=["GET"]))
        client = TestClient(app)
        with client.websocket_connect("/") as websocket:
            headers: Any = websocket.extra_headers
            websocket.send_text("hi")
            assert websocket.receive_text() == "hi"
        assert [name for name, _ in headers] == [b"x-own", b"ratelimit-policy", b"ratelimit"]
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/"):
            pytest.fail("it was admitted")
        assert refused.value.status_code == 429
        assert parsed(refused.value, "RateLimit") == [("1/hour", {"r": 0, "t": 3600})]


class TestRequest:
    @pytest.mark.parametrize(
        ("path", "root_path", "expected"),
        [
            ("/a/b", "", "/a/b"),
            ("/api/a", "/api", "/a"),
            ("/api", "/api", "/"),
            ("/apis", "/api", "/apis"),
            ("/a", "/api", "/a"),  # a server that leaves the root out of the path
            ("/ü", "", "/ü"),
        ],
    )
    def test_the_path_is_that_below_the_root(self, path: str, root_path: str, expected: str) -> None:
        assert http_request(scope_of(path=path, root_path=root_path)).path == expected

    def test_headers_are_looked_up_by_their_lower_case_names(self) -> None:
        headers = [(b"x-key", b"caf\xe9"), (b"other", b""), (b"x-key", b"b")]
        request = http_request(scope_of(headers=headers))
        assert request.header("x-key") == "café, b"
        assert request.header("other") == ""
        assert request.header("x-none") is None

    @pytest.mark.parametrize(
        ("more", "expected"), [({"client": ("::1", 1)}, "::1"), ({"client": None}, None), ({"client": ("", 0)}, None)]
    )
    def test_the_peer_is_the_host_of_the_client(self, more: dict[str, Any], expected: str | None) -> None:
        assert http_request(scope_of(**more)).peer == expected

    def test_a_handshake_is_a_get(self) -> None:
        assert http_request(scope_of("websocket")).method == "GET"
        assert http_request(scope_of(method="PUT")).method == "PUT"

    @pytest.mark.parametrize(
        ("somebody", "expected"),
        [
            (SimpleUser("ada"), "ada"),
            (SimpleNamespace(is_authenticated=True, username="ada"), "ada"),
            (SimpleNamespace(is_authenticated=False, identity="ada"), None),
            (None, None),
        ],
    )
    def test_the_user_is_who_has_logged_in(self, somebody: object, expected: str | None) -> None:
        assert http_request(scope_of(user=somebody)).find_user() == expected
        assert http_request(scope_of()).find_user() is None

    def test_a_user_without_an_identity_is_refused_as_a_key(self) -> None:
        request = http_request(scope_of(user=SimpleNamespace(is_authenticated=True)))
        with pytest.raises(InvalidArgumentError, match="find"):
            user()(request)

    async def test_limits_go_by_the_user_that_the_middleware_outside_has_found(self, stored: Stored) -> None:
        class Backend(AuthenticationBackend):
            async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
                name = conn.headers.get("x-user")
                return (AuthCredentials(), SimpleUser(name)) if name else None

        app = Starlette()
        app.add_middleware(RateLimitMiddleware, Rule("1/hour", key=user()), manager=stored.amanager)
        app.add_middleware(AuthenticationMiddleware, backend=Backend())
        async with client_of(app) as client:
            statuses = [(await client.get("/", headers={"x-user": name})).status_code for name in ("a", "b", "a", "")]
        assert statuses == [404, 404, 429, 400]


def templates_before_and_after(make: Callable[[Any], Any]) -> list[tuple[str | None, str | None]]:
    """What the middleware, and the endpoint, find of each request."""
    found: list[tuple[str | None, str | None]] = []

    async def endpoint(request: Request) -> Response:
        found[-1] = (found[-1][0], http_request(request.scope).find_route())
        return PlainTextResponse("")

    class Looking:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                found.append((http_request(scope).find_route(), None))
            await self.app(scope, receive, send)

    app = make(endpoint)
    app.add_middleware(Looking)
    client = TestClient(app)
    for path in ("/users/7", "/t/acme/items/1/x", "/t/acme/none", "/files/a/b", "/nothing", "/hosted"):
        client.get(path, headers={"host": "api.example.org"} if path == "/hosted" else {})
    client.delete("/users/7")
    return found


def test_routes_are_known_by_their_templates_before_and_after_routing() -> None:
    def make(endpoint: Any) -> Starlette:
        inner = Starlette(routes=[Mount("/items/{number:int}", routes=[Route("/{rest:path}", endpoint)])])
        return Starlette(
            routes=[
                Route("/users/{id:int}", endpoint),
                Mount("/t/{tenant}", inner, middleware=[Middleware(lambda app: app)]),
                Mount("/files", StaticFiles(directory="/", check_dir=False)),
                Host("{name}.example.org", Router([Route("/hosted", endpoint)])),
            ]
        )

    assert templates_before_and_after(make) == [
        ("/users/{id}", "/users/{id}"),
        ("/t/{tenant}/items/{number}/{rest}",) * 2,
        (None, None),
        ("/files/{path}", None),
        (None, None),
        ("/hosted", "/hosted"),
        ("/users/{id}", None),  # of another method
    ]


async def test_the_template_is_the_same_behind_a_root_path(stored: Stored) -> None:
    async def endpoint(request: Request) -> Response:
        return JSONResponse([str(outcome.key) for outcome in request.state.ratelimit.outcomes])

    app = Starlette(routes=[Mount("/v1", routes=[Route("/users/{id}", endpoint)])])
    app.add_middleware(
        RateLimitMiddleware,
        Rule("9/hour", name="outer", key=combined(client_ip(), route()), routes=["/v1/users/{id}"]),
        manager=stored.amanager,
    )
    transport = httpx.ASGITransport(app, client=(PEER, 1), root_path="/proxied")
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        assert (await client.get("/proxied/v1/users/7")).json() == [f"{PEER}|/v1/users/{{id}}"]


async def test_an_application_of_no_framework_has_no_routes() -> None:
    assert http_request(scope_of()).find_route() is None


@pytest.mark.redis
def test_it_works_in_several_event_loops(redis_url: str) -> None:
    manager = AsyncProxyManager.from_url(redis_url)
    middleware = RateLimitMiddleware(hello, "3/hour", manager=manager)

    async def statuses() -> list[int]:
        try:
            async with client_of(middleware) as client:
                return [(await client.get("/")).status_code for _ in range(2)]
        finally:
            await manager.store.aclose()

    assert [asyncio.run(statuses()) for _ in range(2)] == [[200, 200], [200, 429]]


class TestUvicorn:
    async def test_a_stream_is_not_held_up(self, stored: Stored) -> None:
        first_has_come = asyncio.Event()

        async def pieces() -> AsyncGenerator[bytes]:
            yield b"first"
            await first_has_come.wait()
            yield b"second"

        async def stream(_: Request) -> Response:
            return StreamingResponse(pieces())

        app = Starlette(routes=[Route("/", stream)])
        app.add_middleware(RateLimitMiddleware, "10/hour", manager=stored.amanager)
        async with serving(app) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            async with client.stream("GET", "/") as answer:
                received = answer.aiter_raw()
                assert await anext(received) == b"first"
                first_has_come.set()
                assert [piece async for piece in received] == [b"second"]
            assert parsed(answer, "RateLimit") == [("10/hour", {"r": 9, "t": 360})]

    async def test_a_connection_goes_on_after_a_refusal_whose_body_was_not_read(self, stored: Stored) -> None:
        app = limiting(stored, hello, Rule("1/hour", methods=["POST"], cost=2))
        body = b"x" * 300_000
        async with serving(app) as (host, port):
            reader, writer = await asyncio.open_connection(host, port)
            head = f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body[:1000])
            refusal = await reader.readuntil(b"\r\n\r\n")
            assert refusal.startswith(b"HTTP/1.1 429 ")
            (length,) = [line for line in refusal.split(b"\r\n") if line.startswith(b"content-length: ")]
            await reader.readexactly(int(length.partition(b": ")[2]))
            writer.write(body[1000:] + f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()

    async def test_requests_of_one_connection_pay_each(self, stored: Stored) -> None:
        app = limiting(stored, hello, "2/hour")
        async with serving(app) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            assert [(await client.get("/")).status_code for _ in range(3)] == [200, 200, 429]
        assert stored.consumed("|2/hour|ip:127.0.0.1") == 2

    async def test_a_websocket_is_refused_with_a_429(self, stored: Stored) -> None:
        async def echo(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_text(await websocket.receive_text())

        app = Starlette(routes=[WebSocketRoute("/", echo)])
        app.add_middleware(RateLimitMiddleware, "1/hour", manager=stored.amanager)
        async with serving(app) as (host, port):
            async with connect(f"ws://{host}:{port}/") as websocket:
                await websocket.send("hi")
                assert await websocket.recv() == "hi"
                assert websocket.response
                assert parsed(websocket.response, "RateLimit") == [("1/hour", {"r": 0, "t": 3600})]
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://{host}:{port}/")
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["Retry-After"] == "3600"
        assert b"quota-exceeded" in refused.value.response.body


class TestExempt:
    @pytest.mark.parametrize("around", [False, True])
    async def test_endpoints_of_starlette_are_not_limited(self, stored: Stored, around: bool) -> None:
        @exempt
        async def health(_: Request) -> Response:
            return PlainTextResponse("well")

        @exempt
        class Status(HTTPEndpoint):
            def get(self, _: Request) -> Response:
                return PlainTextResponse("well")

        async def index(_: Request) -> Response:
            return PlainTextResponse("hello")

        inner = Mount("/inner", routes=[Route("/health", health)])
        routes = [Route("/health", health), Route("/status", Status), Route("/", index), inner]
        middleware = Middleware(RateLimitMiddleware, "1/hour", manager=stored.amanager)
        app: App = Starlette(routes=routes, middleware=[] if around else [middleware])
        if around:
            app = limiting(stored, app, "1/hour")
        async with client_of(app) as client:
            for path in ("/health", "/status", "/inner/health"):
                for _ in range(2):
                    response = await client.get(path)
                    assert response.status_code == 200
                    assert "RateLimit" not in response.headers
            assert len(stored.memory) == 0
            assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]
            assert [(await client.get(path)).status_code for path in ("/health", "/nowhere")] == [200, 429]

    def test_what_is_not_an_endpoint_is_refused(self) -> None:
        wrong: Any = "health"
        with pytest.raises(InvalidArgumentError, match="exempt must be given an endpoint; got 'health'"):
            exempt(wrong)
