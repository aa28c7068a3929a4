# No "from __future__ import annotations": FastAPI could not resolve what names a limit that a test has made.

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from ratelimit import (
    AsyncProxyManager,
    InvalidArgumentError,
    InvalidConfigurationError,
    OnError,
    ProxyManager,
    SlidingWindow,
    StoreUnavailableError,
)
from ratelimit.integrations.asgi import RateLimitMiddleware
from ratelimit.integrations.fastapi import RateLimit, RequestRefused, configure, exempt
from ratelimit.integrations.http import Answers, HttpDecision, Missing, Rule, api_key, header, route, user
from ratelimit.testing import ScriptedStore
from tests.integrations.asgi_parts import PEER, Stored, parsed
from tests.integrations.gunicorns import statuses
from tests.integrations.uvicorns import serving, workers
from tests.support.both_faces import for_asyncio


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def limit(stored: Stored) -> Callable[..., RateLimit]:
    """Makes limits that are kept there."""

    def make(limits: Any, **settings: Any) -> RateLimit:
        return RateLimit(limits, manager=stored.amanager, **settings)

    return make


def client_of(app: FastAPI, **settings: Any) -> TestClient:
    return TestClient(app, client=(PEER, 4711), **settings)


def fields_of(response: Any) -> list[str]:
    return [name for name in response.headers if "rate" in name]


TOLD = ["ratelimit-policy", "ratelimit"]


def test_ten_requests_are_admitted_and_five_refused(limit: Callable[..., RateLimit], stored: Stored) -> None:
    app = FastAPI()
    calls: list[str] = []

    @app.get("/", dependencies=[Depends(limit("10/minute"))])
    async def index() -> dict[str, str]:
        calls.append("index")
        return {"hello": "world"}

    client = client_of(app)
    answers = [client.get("/") for _ in range(15)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429] * 5
    assert [parsed(answer, "RateLimit")[0][1]["r"] for answer in answers[:10]] == list(range(9, -1, -1))
    assert parsed(answers[0], "RateLimit-Policy") == [("10/minute", {"q": 10, "w": 60})]
    refusal = answers[-1]
    assert refusal.headers["Retry-After"] == "6"
    assert refusal.headers["Content-Type"] == "application/problem+json"
    assert refusal.json() == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "violated-policies": ["10/minute"],
    }
    assert parsed(refusal, "RateLimit") == [("10/minute", {"r": 0, "t": 6})]
    assert len(calls) == stored.consumed(f"GET /|10/minute|ip:{PEER}") == 10


def test_the_fields_of_sliding_windows_say_when_the_first_token_is_back(
    limit: Callable[..., RateLimit], stored: Stored
) -> None:
    app = FastAPI()

    @app.get("/one", dependencies=[Depends(limit(SlidingWindow(3, per=60)))])
    @app.get("/two", dependencies=[Depends(limit("2/second sliding; 3/minute sliding"))])
    async def index() -> str:
        return "hello"

    client = client_of(app)
    answers = []
    for _ in range(4):
        answers.append(client.get("/one"))
        stored.clock.advance(10)
    assert [answer.status_code for answer in answers] == [200] * 3 + [429]
    policy = "3/minute sliding"
    assert parsed(answers[0], "RateLimit-Policy") == [(policy, {"q": 3, "w": 60})]
    left = [parsed(answer, "RateLimit") for answer in answers]
    assert left == [
        [(policy, {"r": 2, "t": 60})],
        *[[(policy, {"r": r, "t": t})] for r, t in ((1, 50), (0, 40), (0, 30))],
    ]
    assert answers[3].headers["Retry-After"] == "30"
    assert [client.get("/two").status_code for _ in range(3)] == [200, 200, 429]
    stored.clock.advance(1)
    assert client.get("/two").status_code == 200
    refused = client.get("/two")
    assert parsed(refused, "RateLimit") == [(policy, {"r": 0, "t": 59})]
    assert refused.json()["violated-policies"] == [policy]


def endpoint() -> str:
    return "hello"


def on_route(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    app.get("/")(endpoint)
    app.get("/v1/x", dependencies=[Depends(limit())])(endpoint)


def on_router(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    router = APIRouter(prefix="/v1", dependencies=[Depends(limit())])
    router.get("/x")(endpoint)
    app.include_router(router)


def on_application(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    app.router.dependencies.append(Depends(limit()))
    router = APIRouter(prefix="/v1")
    router.get("/x")(endpoint)
    app.include_router(router)


def on_inclusion(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    inner, outer = APIRouter(), APIRouter(prefix="/v1")
    inner.get("/x")(endpoint)
    outer.include_router(inner, dependencies=[Depends(limit())])
    app.include_router(outer)


def on_router_and_route(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    one = limit()
    router = APIRouter(prefix="/v1", dependencies=[Depends(one)])
    router.get("/x", dependencies=[Depends(one, use_cache=False)])(endpoint)
    app.include_router(router)


def on_router_and_twin_on_route(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    router = APIRouter(prefix="/v1", dependencies=[Depends(limit())])
    router.get("/x", dependencies=[Depends(limit())])(endpoint)
    app.include_router(router)


def on_route_below_middleware(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    on_route(app, limit)
    app.add_middleware(RateLimitMiddleware)


def as_sub_dependency_and_on_route(app: FastAPI, limit: Callable[[], RateLimit]) -> None:
    async def service(_: Annotated[HttpDecision, Depends(limit())]) -> str:
        return "service"

    @app.get("/v1/x", dependencies=[Depends(limit())])
    def called(service: Annotated[str, Depends(service)]) -> str:
        return service


EVERYWHERE = [
    on_route,
    on_router,
    on_application,
    on_inclusion,
    on_router_and_route,
    on_router_and_twin_on_route,
    on_route_below_middleware,
    as_sub_dependency_and_on_route,
]


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("put", EVERYWHERE, ids=lambda put: put.__name__)
def test_wherever_a_limit_is_it_is_paid_and_told_once(
    limit: Callable[..., RateLimit], stored: Stored, put: Callable[..., None], configured: bool
) -> None:
    app = FastAPI()
    put(app, lambda: limit("2/hour"))
    if configured:
        configure(app)
    client = client_of(app)
    answers = [client.get("/v1/x") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [parsed(answer, "RateLimit") for answer in answers] == [
        [("2/hour", {"r": 1, "t": 1800})],
        [("2/hour", {"r": 0, "t": 1800})],
        [("2/hour", {"r": 0, "t": 1800})],
    ]
    assert all(len(answer.headers.get_list("RateLimit-Policy")) == 1 for answer in answers)
    assert stored.consumed(f"GET /v1/x|2/hour|ip:{PEER}") == 2
    assert ("429" in app.openapi()["paths"]["/v1/x"]["get"]["responses"]) is configured


class TestFields:
    """Which answers have them."""

    @pytest.fixture
    def app(self, limit: Callable[..., RateLimit]) -> FastAPI:
        app = FastAPI(dependencies=[Depends(limit("10/hour"))])
        configure(app)

        @app.get("/value")
        async def value() -> int:
            return 1

        @app.get("/sync")
        def sync() -> int:
            return 1

        @app.get("/response")
        async def response() -> JSONResponse:
            return JSONResponse([])

        @app.get("/stream")
        async def stream() -> StreamingResponse:
            async def pieces() -> AsyncGenerator[bytes]:
                yield b"piece"

            return StreamingResponse(pieces())

        @app.get("/error")
        async def error() -> None:
            raise HTTPException(418)

        @app.get("/invalid")
        async def invalid(number: int) -> int:
            return number

        return app

    @pytest.mark.parametrize("path", ["/value", "/sync", "/response", "/stream", "/error", "/invalid"])
    def test_all_answers_have_them(self, app: FastAPI, path: str) -> None:
        answer = client_of(app).get(path)
        assert fields_of(answer) == TOLD
        assert parsed(answer, "RateLimit") == [("10/hour", {"r": 9, "t": 360})]

    def test_without_configuration_those_that_fastapi_makes_have_them(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI(dependencies=[Depends(limit("10/hour"))])
        app.get("/value")(endpoint)
        app.get("/response")(lambda: JSONResponse([]))
        client = client_of(app)
        assert [fields_of(client.get(path)) for path in ("/value", "/response")] == [TOLD, []]

    def test_the_classes_of_fastapi_are_as_ever(self) -> None:
        for method in (FastAPI.build_middleware_stack, FastAPI.openapi, FastAPI.__init__):
            assert method.__module__.split(".")[0] in ("fastapi", "starlette")

    def test_answers_of_unlimited_routes_have_none(self, stored: Stored) -> None:
        app = FastAPI()
        app.add_middleware(RateLimitMiddleware, Rule("1/hour", routes=["/limited"]), manager=stored.amanager)
        app.get("/limited", dependencies=[Depends(RateLimit("1/day", manager=stored.amanager))])(endpoint)
        assert fields_of(client_of(app).get("/docs")) == []

    @pytest.mark.parametrize("further_in", [False, True])
    def test_with_the_answers_that_a_limit_has(self, limit: Callable[..., RateLimit], further_in: bool) -> None:
        app, older = FastAPI(), Answers(standard=False, x_ratelimit="delta")
        app.get("/", dependencies=[Depends(limit("9/hour", answers=older if further_in else None))])(endpoint)
        app.add_middleware(RateLimitMiddleware, answers=Answers(x_ratelimit="epoch") if further_in else older)
        answer = client_of(app).get("/")
        assert fields_of(answer) == ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"]

    def test_all_the_limits_of_a_request(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI(dependencies=[Depends(limit("10/hour"))])
        app.get("/", dependencies=[Depends(limit("5/minute"))])(endpoint)
        assert [name for name, _ in parsed(client_of(app).get("/"), "RateLimit")] == ["10/hour", "5/minute"]


def test_what_a_later_limit_refuses_has_paid_nothing(limit: Callable[..., RateLimit], stored: Stored) -> None:
    app = FastAPI(dependencies=[Depends(limit("10/hour"))])
    app.get("/", dependencies=[Depends(limit("1/hour"))])(endpoint)
    client = client_of(app)
    assert [client.get("/").status_code for _ in range(3)] == [200, 429, 429]
    assert stored.consumed(f"GET /|10/hour|ip:{PEER}") == 1


class TestRefusals:
    """Which handler answers a request that is refused."""

    @pytest.fixture
    def app(self, limit: Callable[..., RateLimit]) -> FastAPI:
        app = FastAPI()
        app.get("/", dependencies=[Depends(limit("1/hour", cost=2, name="dear"))])(endpoint)
        return app

    @pytest.mark.parametrize("caught", [429, StarletteHTTPException, HTTPException, RequestRefused])
    def test_a_handler_of_the_application(self, app: FastAPI, caught: Any) -> None:
        @app.exception_handler(caught)
        async def own(_: Request, error: HTTPException) -> PlainTextResponse:
            return PlainTextResponse(f"own: {error.detail}", error.status_code, error.headers)

        answer = client_of(app).get("/")
        assert (answer.status_code, answer.text) == (429, "own: Too Many Requests")
        assert fields_of(answer) == TOLD

    def test_a_handler_that_goes_on_to_the_one_of_fastapi(self, app: FastAPI) -> None:
        @app.exception_handler(StarletteHTTPException)
        async def logged(request: Request, error: StarletteHTTPException) -> Any:
            return await http_exception_handler(request, error)

        answer = client_of(app).get("/")
        assert (answer.status_code, answer.json()) == (429, {"detail": "Too Many Requests"})
        assert answer.headers["Content-Type"] == "application/json"

    def test_a_handler_is_told_of_the_decision(self, app: FastAPI) -> None:
        @app.exception_handler(RequestRefused)
        async def own(_: Request, error: RequestRefused) -> JSONResponse:
            assert error.decision.refused
            return JSONResponse(error.decision.refused.violated_policies, 429)

        assert client_of(app).get("/").json() == ["dear"]

    def test_other_errors_are_answered_as_ever(self, app: FastAPI) -> None:
        client = client_of(app)
        assert client.get("/").headers["Content-Type"] == "application/problem+json"
        assert client.get("/none").json() == {"detail": "Not Found"}

    def test_a_mounted_application_answers_its_own(self, limit: Callable[..., RateLimit]) -> None:
        app, inner = FastAPI(), FastAPI()
        inner.get("/", dependencies=[Depends(limit("1/hour", cost=2))])(endpoint)
        app.mount("/inner", inner)

        @app.exception_handler(429)
        async def unasked(*_: object) -> None:
            pytest.fail("the handler of another application")

        assert client_of(app).get("/inner/").headers["Content-Type"] == "application/problem+json"

    def test_a_request_without_its_key_is_in_error(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI()
        key = api_key(secret="x" * 16)
        app.get("/", dependencies=[Depends(limit("9/hour", key=key))])(endpoint)
        app.get("/free", dependencies=[Depends(limit("9/hour", key=key, missing=Missing.UNLIMITED))])(endpoint)
        client = client_of(app)
        assert client.get("/").json()["detail"] == "The request has no api-key, by which it would be limited."
        assert client.get("/free").status_code == 200

    def test_where_the_store_fails_it_is_as_the_policy_says(self) -> None:
        app, store = FastAPI(), ScriptedStore()
        manager = AsyncProxyManager(for_asyncio(store))
        raising = RateLimit("9/hour", manager=manager, on_error=OnError.RAISE)
        app.get("/raise", dependencies=[Depends(raising)])(endpoint)
        app.get("/deny", dependencies=[Depends(RateLimit("9/hour", manager=manager))])(endpoint)
        store.fail(times=2)
        client = client_of(app)
        with pytest.raises(StoreUnavailableError):
            client.get("/raise")
        answer = client.get("/deny")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["type"].endswith("#temporary-reduced-capacity")

    def test_answers_may_be_made_otherwise(self, limit: Callable[..., RateLimit]) -> None:
        class Plain(Answers):
            content_type = "text/plain"

            def body(self, problem: dict[str, Any]) -> bytes:
                return problem["title"].encode()  # type: ignore[no-any-return]  # a str

        app = FastAPI()
        app.get("/", dependencies=[Depends(limit("1/hour", cost=2, answers=Plain()))])(endpoint)
        answer = client_of(app).get("/")
        assert answer.headers["Content-Type"] == "text/plain"
        assert answer.text == "Request cannot be satisfied as assigned quota has been exceeded"


class TestWebSocket:
    @pytest.fixture
    def app(self, limit: Callable[..., RateLimit]) -> FastAPI:
        app = FastAPI()
        configure(app)

        @app.websocket("/{room}", dependencies=[Depends(limit("1/hour", key=route()))])
        async def greet(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_text("hello")
            await websocket.close()

        return app

    def test_a_handshake_is_admitted_or_refused(self, app: FastAPI, stored: Stored) -> None:
        client = client_of(app)
        with client.websocket_connect("/a") as websocket:
            assert websocket.receive_text() == "hello"
            headers: Any = websocket.extra_headers
        assert [name.decode() for name, _ in headers] == TOLD
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/b"):
            pytest.fail("it was admitted")
        assert refused.value.status_code == 429
        assert refused.value.json()["violated-policies"] == ["1/hour"]
        assert parsed(refused.value, "RateLimit") == [("1/hour", {"r": 0, "t": 3600})]
        assert stored.consumed(r"WEBSOCKET /\(room\)|1/hour|route|:/\(room\)") == 1

    def test_a_server_that_cannot_send_the_answer_closes(self, app: FastAPI) -> None:
        async def poorer(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "extensions": {}}, receive, send)

        client = TestClient(poorer)
        with client.websocket_connect("/a") as websocket:
            assert websocket.receive_text() == "hello"
        with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/a"):
            pytest.fail("it was admitted")
        assert type(refused.value) is WebSocketDisconnect
        assert refused.value.code == 1008


class TestOpenApi:
    @pytest.fixture
    def app(self, limit: Callable[..., RateLimit]) -> FastAPI:
        app, router = FastAPI(), APIRouter(prefix="/v1", dependencies=[Depends(limit("9/hour"))])
        app.get("/free")(endpoint)
        app.get("/own", dependencies=[Depends(limit("9/hour"))], responses={429: {"description": "mine"}})(endpoint)
        app.get("/posted", dependencies=[Depends(limit("9/hour", methods=["POST"]))])(endpoint)
        app.post("/posted", dependencies=[Depends(limit("9/hour", methods=["POST"]))])(endpoint)
        app.get("/hidden", dependencies=[Depends(limit("9/hour"))], include_in_schema=False)(endpoint)
        router.get("/items/{number}")(endpoint)
        app.include_router(router, prefix="/api")
        configure(app)
        return app

    def documented(self, app: FastAPI) -> set[tuple[str, str]]:
        paths = app.openapi()["paths"]
        return {(method, path) for path, item in paths.items() for method in item if "429" in item[method]["responses"]}

    def test_every_operation_that_is_limited_has_a_429(self, app: FastAPI) -> None:
        assert self.documented(app) == {("get", "/own"), ("post", "/posted"), ("get", "/api/v1/items/{number}")}
        document = client_of(app).get("/openapi.json").json()
        told = document["paths"]["/api/v1/items/{number}"]["get"]["responses"]["429"]
        assert list(told["headers"]) == ["Retry-After", "RateLimit-Policy", "RateLimit"]
        reference = told["content"]["application/problem+json"]["schema"]["$ref"]
        properties = document["components"]["schemas"][reference.removeprefix("#/components/schemas/")]["properties"]
        assert set(properties) == {"type", "title", "status", "violated-policies"}
        assert document["paths"]["/own"]["get"]["responses"]["429"] == {"description": "mine"}

    def test_also_those_that_rules_are_about(self, app: FastAPI) -> None:
        rule = Rule("5/hour", routes=["/api/v1/items/{id}", "/free"])
        app.add_middleware(RateLimitMiddleware, rule, answers=Answers(x_ratelimit="epoch"))
        assert ("get", "/free") in self.documented(app)
        told = app.openapi()["paths"]["/free"]["get"]["responses"]["429"]["headers"]
        assert list(told)[-3:] == ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"]

    def test_the_document_is_that_of_the_routes_there_are(self, app: FastAPI, limit: Callable[..., RateLimit]) -> None:
        first = app.openapi()
        assert app.openapi() == first
        app.get("/late", dependencies=[Depends(limit("9/hour"))])(endpoint)
        app.openapi_schema = None
        assert ("get", "/late") in self.documented(app)

    def test_a_generator_of_the_application_may_build_on_it(self, app: FastAPI) -> None:
        generate = app.openapi
        app.openapi = lambda: generate() | {"x-own": True}  # type: ignore[method-assign]  # as FastAPI has it
        assert app.openapi()["x-own"]
        assert ("get", "/own") in self.documented(app)


class TestDependency:
    def test_its_value_is_the_decision(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI()

        @app.get("/")
        async def remaining(decision: Annotated[HttpDecision, Depends(limit("5/hour"))]) -> int:
            return decision.outcomes[0].probe.remaining_tokens

        assert client_of(app).get("/").json() == 4

    def test_it_can_be_overridden_in_tests(self, limit: Callable[..., RateLimit]) -> None:
        app, dear = FastAPI(), limit("1/hour", cost=2)
        app.get("/", dependencies=[Depends(dear)])(endpoint)
        app.dependency_overrides[dear] = lambda: None
        assert client_of(app).get("/").status_code == 200
        app.dependency_overrides.clear()
        assert client_of(app).get("/").status_code == 429

    def test_keys_see_what_earlier_dependencies_have_found(self, limit: Callable[..., RateLimit]) -> None:
        async def authenticated(request: Request) -> None:
            request.state.user = request.headers["x-user"]

        limited = limit("1/hour", key=user(lambda request: request.state.user))
        app = FastAPI(dependencies=[Depends(authenticated), Depends(limited)])
        app.get("/")(endpoint)
        client = client_of(app)
        statuses = [client.get("/", headers={"x-user": name}).status_code for name in ("a", "b", "a")]
        assert statuses == [200, 200, 429]

    def test_keys_see_the_request_as_fastapi_has_it(self, limit: Callable[..., RateLimit], stored: Stored) -> None:
        app = FastAPI()
        key = limit("9/hour", name="own", key=lambda request: f"{request.client.host} {request.headers['X-Tenant']}")
        app.get("/", dependencies=[Depends(key)])(endpoint)
        assert client_of(app).get("/", headers={"x-tenant": "acme"}).status_code == 200
        assert stored.consumed(f"own:{PEER} acme") == 1

    def test_the_body_and_the_parameters_are_as_without_it(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI()

        @app.post("/{number}", dependencies=[Depends(limit("9/hour"))])
        async def echo(number: int, items: list[str], flag: bool = False) -> list[Any]:
            return [number, items, flag]

        assert client_of(app).post("/3?flag=1", json=["a"]).json() == [3, ["a"], True]
        assert [p["name"] for p in app.openapi()["paths"]["/{number}"]["post"]["parameters"]] == ["number", "flag"]

    @pytest.mark.parametrize("mounted", [False, True])
    def test_the_route_is_the_template_with_its_prefixes(self, stored: Stored, mounted: bool) -> None:
        templates: list[str | None] = []

        def seen(request: Any) -> bool:
            templates.append(request.find_route())
            return True

        app = FastAPI()
        inner, outer = APIRouter(prefix="/items"), APIRouter(prefix="/v{version}")
        looking = RateLimit("9/hour", when=seen, manager=stored.amanager)
        inner.get("/{number}", dependencies=[Depends(looking)])(endpoint)
        outer.include_router(inner)
        app.include_router(outer)
        if mounted:
            parent = FastAPI()
            parent.mount("/t/{tenant}", app)
        else:
            parent = app
        parent.add_middleware(RateLimitMiddleware, Rule("99/hour", when=seen), manager=stored.amanager)
        assert client_of(parent).get("/t/acme/v1/items/7" if mounted else "/v1/items/7").status_code == 200
        expected = "/v{version}/items/{number}"
        assert templates == [f"/t/{{tenant}}{expected}" if mounted else expected] * 2

    def test_a_rule_may_be_shared_with_middleware(self, limit: Callable[..., RateLimit], stored: Stored) -> None:
        rule = Rule("9/hour", name="shared", key=header("x-tenant"))
        app = FastAPI(dependencies=[Depends(limit(rule))])
        app.get("/")(endpoint)
        app.add_middleware(RateLimitMiddleware, rule, manager=stored.amanager)
        assert client_of(app).get("/", headers={"x-tenant": "acme"}).status_code == 200
        assert stored.consumed("shared:acme") == 1

    def test_what_cannot_be_is_refused_at_once(self) -> None:
        with pytest.raises(InvalidConfigurationError, match="name"):
            RateLimit("1/hour", name="")
        with pytest.raises(InvalidArgumentError, match=r"settings already; 'cost'"):
            RateLimit(Rule("1/hour"), cost=2)
        with ProxyManager.from_url("memory://") as manager, pytest.raises(InvalidArgumentError, match="Async"):
            RateLimit("1/hour", manager=manager)  # type: ignore[arg-type]  # that is it

    def test_it_prints_as_its_rule(self) -> None:
        assert repr(RateLimit("1/hour", manager="memory://")) == ("RateLimit(Rule('1/hour', key=client_ip()))")


class TestPlaces:
    """What counts together."""

    def test_each_route_counts_apart(self, limit: Callable[..., RateLimit]) -> None:
        one = limit("1/minute")
        app = FastAPI()
        app.get("/one", dependencies=[Depends(one)])(endpoint)
        app.get("/two", dependencies=[Depends(limit("1/minute"))])(endpoint)
        app.get("/three", dependencies=[Depends(one)])(endpoint)
        app.post("/one", dependencies=[Depends(one)])(endpoint)
        client = client_of(app)
        asked = [("GET", "/one"), ("GET", "/two"), ("GET", "/three"), ("POST", "/one"), ("GET", "/one")]
        assert [client.request(*each).status_code for each in asked] == [200, 200, 200, 200, 429]

    def test_with_a_name_routes_count_together(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI(dependencies=[Depends(limit("1/minute", name="all"))])
        app.get("/one")(endpoint)
        app.get("/two")(endpoint)
        client = client_of(app)
        assert [client.get(path).status_code for path in ("/one", "/two")] == [200, 429]


class TestConfigure:
    def test_limits_take_from_it_what_they_do_not_say(self, stored: Stored) -> None:
        app = FastAPI()
        heard: list[Any] = []
        configure(
            app,
            manager=stored.amanager,
            key=header("x-tenant"),
            answers=Answers(standard=False, x_ratelimit="delta"),
            on_refused=lambda request, decision: heard.append((request.path, decision.retry_after)),
            namespace="shop",
        )
        app.get("/", dependencies=[Depends(RateLimit("1/minute", name="x"))])(endpoint)
        app.get("/own", dependencies=[Depends(RateLimit("1/minute", name="y", key=route(), answers=Answers()))])(
            endpoint
        )
        client = client_of(app)
        answers = [client.get(path, headers={"x-tenant": "acme"}) for path in ("/", "/", "/own")]
        assert [answer.status_code for answer in answers] == [200, 429, 200]
        assert fields_of(answers[0])[0] == "x-ratelimit-limit"
        assert fields_of(answers[2]) == TOLD
        assert heard == [("/", 60)]
        assert stored.consumed("shop||x:acme") == stored.consumed("shop||y:/own") == 1

    def test_it_may_have_rules_for_all_requests(self, stored: Stored) -> None:
        app = FastAPI()
        configure(app, "1/minute", Rule("9/minute", key=route(), missing=Missing.UNLIMITED), manager=stored.amanager)
        app.get("/")(endpoint)
        client = client_of(app)
        assert [client.get(path).status_code for path in ("/none", "/")] == [404, 429]
        assert stored.consumed(f"|1/minute|ip:{PEER}") == 1

    def test_it_switches_all_limits_off(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI(dependencies=[Depends(limit("1/minute"))])
        configure(app, "1/minute", enabled=False)
        app.get("/")(endpoint)
        client = client_of(app)
        assert [client.get("/").status_code for _ in range(3)] == [200] * 3

    def test_an_endpoint_may_be_exempt_from_all(self, limit: Callable[..., RateLimit], stored: Stored) -> None:
        app = FastAPI(dependencies=[Depends(limit("1/minute"))])
        configure(app, "1/minute", manager=stored.amanager)

        @app.get("/health")
        @exempt
        async def health() -> str:
            return "well"

        app.get("/")(endpoint)
        client = client_of(app)
        assert [client.get(path).status_code for path in ("/health", "/health", "/", "/", "/health")] == [
            *(200, 200, 200, 429, 200)
        ]
        assert fields_of(client.get("/health")) == []

    def test_a_bound_method_may_be_exempt(self, limit: Callable[..., RateLimit]) -> None:
        class Pages:
            async def health(self, name: str) -> str:
                return name

        app = FastAPI(dependencies=[Depends(limit("1/minute"))])
        app.get("/health/{name}")(exempt(Pages().health))
        client = client_of(app)
        assert [client.get("/health/db").json() for _ in range(2)] == ["db", "db"]

    def test_rules_of_one_name_with_other_limits_are_an_error(self, limit: Callable[..., RateLimit]) -> None:
        app = FastAPI()
        configure(app)
        app.get("/one", dependencies=[Depends(limit("1/minute", name="x"))])(endpoint)
        app.get("/two", dependencies=[Depends(limit("2/minute", name="x"))])(endpoint)
        with pytest.raises(InvalidConfigurationError, match="'x' has '1/minute' and '2/minute'"), client_of(app):
            pytest.fail("the application has started")

    def test_it_is_done_once_and_checked_at_once(self) -> None:
        app = FastAPI()
        configure(app)
        with pytest.raises(InvalidArgumentError, match="configured already"):
            configure(app)
        with pytest.raises(InvalidConfigurationError, match="namespace"):
            configure(FastAPI(), namespace="a b")
        with pytest.raises(InvalidArgumentError, match="endpoint"):
            exempt("health")  # type: ignore[type-var]  # that is it

    def test_equal_limits_are_overridden_by_each_other(self) -> None:
        app = FastAPI()
        app.get("/", dependencies=[Depends(RateLimit("1/day", name="once", cost=1))])(endpoint)
        app.dependency_overrides[RateLimit("1/day", name="once")] = lambda: None
        client = client_of(app)
        assert [client.get("/").status_code for _ in range(3)] == [200] * 3
        assert RateLimit("1/day") != RateLimit("1/day", manager="memory://")


async def test_requests_at_once_are_admitted_as_the_limit_says(limit: Callable[..., RateLimit]) -> None:
    app = FastAPI()
    app.get("/", dependencies=[Depends(limit("10/hour"))])(endpoint)
    async with serving(app) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        answers = await asyncio.gather(*(client.get("/") for _ in range(30)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 20


SERVED = """
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse

from ratelimit.integrations.asgi import RateLimitMiddleware
from ratelimit.integrations.fastapi import RateLimit
from tests.support.both_faces import for_asyncio

app = FastAPI(dependencies=[Depends(RateLimit("40/hour"))])
app.add_middleware(RateLimitMiddleware, "20/hour")


@app.get("/")
def index():
    return PlainTextResponse("hello")
"""


@pytest.mark.redis
def test_worker_processes_admit_together_what_the_limit_says(redis_url: str, tmp_path: Path) -> None:
    with workers(SERVED, tmp_path, redis_url=redis_url) as address:
        assert statuses(address, "/", 60) == {200: 20, 429: 40}
    with ProxyManager.from_url(redis_url, "1/s") as witness:
        assert witness.snapshot("ratelimit:|20/hour|ip:127.0.0.1").consumed_tokens == 20
        assert witness.snapshot("ratelimit:GET /|40/hour|ip:127.0.0.1").consumed_tokens == 20
