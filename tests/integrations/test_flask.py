from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import http_sf
import pytest
import redis

pytest.importorskip("flask")

from flask import Blueprint, Flask, Response, abort, request, session, stream_with_context
from flask.testing import FlaskClient
from flask.views import MethodView, View
from werkzeug.exceptions import NotFound, TooManyRequests
from werkzeug.middleware.proxy_fix import ProxyFix

from ratelimit import AsyncProxyManager, InvalidArgumentError, InvalidConfigurationError, OnError, ProxyManager
from ratelimit.integrations.flask import RateLimiter, RequestRefused
from ratelimit.integrations.http import Answers, HttpDecision, Missing, Rule, client_ip, combined, header, route, user
from ratelimit.integrations.wsgi import RateLimitMiddleware
from ratelimit.testing import ScriptedStore
from tests.integrations.gunicorns import gunicorn, statuses
from tests.integrations.requests_of import Limits
from tests.support.workers import patient


class Limited:
    """An application with the extension, its client, and what is stored."""

    def __init__(self, *rules: Any, static_folder: Path | None = None, **settings: Any) -> None:
        self.stored = Limits()
        settings.setdefault("manager", self.stored.manager)
        self.app = Flask(__name__, static_folder=static_folder)
        self.app.testing = True
        self.app.secret_key = "secret"
        self.limiter = RateLimiter(*rules, app=self.app, **settings)
        self.client: FlaskClient = self.app.test_client()

    def consumed(self, name: str, key: str = "127.0.0.1", place: str = "") -> int:
        """Tokens of the limit of this name, or of the one at this place that has no name but its limits."""
        return self.stored.consumed(f"{place}|{name}|ip:{key}" if "/" in name else f"{name}:{key}")

    def statuses(self, *paths: str) -> list[int]:
        return [self.client.get(path).status_code for path in paths]


def parsed(response: Any, name: str) -> Any:
    """A field as RFC 9651 has it."""
    (value,) = response.headers.getlist(name)
    return http_sf.parse(value.encode(), tltype="list")


def hello() -> str:
    return "hello"


class TestRulesOfTheApplication:
    def test_limit_all_requests(self) -> None:
        limited = Limited("10/minute")
        limited.app.add_url_rule("/<name>", view_func=lambda name: name)
        answers = [limited.client.get(f"/{number}") for number in range(15)]
        assert [answer.status_code for answer in answers] == [200] * 10 + [429] * 5
        assert [parsed(answer, "RateLimit") for answer in answers[:10]] == [
            [("10/minute", {"r": left, "t": 6})] for left in range(9, -1, -1)
        ]
        assert "Retry-After" not in answers[9].headers
        refused = answers[14]
        assert parsed(refused, "RateLimit-Policy") == [("10/minute", {"q": 10, "w": 60})]
        assert refused.headers.getlist("Retry-After") == ["6"]
        assert refused.content_type == "application/problem+json"
        assert json.loads(refused.data)["violated-policies"] == ["10/minute"]
        assert limited.consumed("10/minute") == 10

    def test_limit_those_that_find_nothing(self) -> None:
        limited = Limited("2/minute")
        answers = [limited.client.get("/nothing") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [404, 404, 429]
        assert parsed(answers[0], "RateLimit") == [("2/minute", {"r": 1, "t": 30})]

    def test_do_not_limit_static_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "static"
        folder.mkdir()
        (folder / "style.css").write_text("p {}")
        limited = Limited("1/minute", static_folder=folder)
        part = Blueprint("part", __name__, static_folder=folder, url_prefix="/part")
        limited.limiter.limit("1/hour")(part)
        limited.app.register_blueprint(part)
        answers = [
            limited.client.get(path, buffered=True) for path in ["/static/style.css", "/part/static/style.css"] * 2
        ]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert "RateLimit" not in answers[0].headers
        assert (limited.consumed("1/minute"), limited.consumed("1/hour")) == (0, 0)

    def test_limit_views_that_are_only_called_static(self) -> None:
        limited = Limited("1/minute")
        part = Blueprint("part", __name__)
        part.add_url_rule("/static", endpoint="static", view_func=hello)
        limited.app.register_blueprint(part)
        assert limited.statuses("/static", "/static") == [200, 429]

    def test_may_be_about_routes_and_methods(self) -> None:
        limited = Limited(Rule("1/minute", methods=["POST"], routes=["/users/{id}"]))
        limited.app.add_url_rule("/users/<int:id>", view_func=lambda **_: "user", methods=["GET", "POST"])
        answers = [limited.client.open("/users/7", method=method) for method in ("GET", "POST", "GET", "POST")]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert limited.client.post("/", environ_overrides={"PATH_INFO": "//users/8"}).status_code == 429

    def test_may_be_none(self) -> None:
        limited = Limited()
        limited.app.add_url_rule("/", view_func=hello)
        assert "RateLimit" not in limited.client.get("/").headers

    def test_of_one_name_have_the_same_limits(self) -> None:
        with pytest.raises(InvalidConfigurationError, match="'api'"):
            RateLimiter(Rule("1/s", name="api"), Rule("2/s", name="api"))


class TestLimit:
    def test_on_a_view(self) -> None:
        limited = Limited()

        @limited.app.get("/search")
        @limited.limiter.limit("2/minute", name="search", cost=lambda request: int(request.native.args["cost"]))
        def search() -> str:
            """Search."""
            return "found"

        limited.app.add_url_rule("/", view_func=hello)
        assert limited.statuses("/search?cost=2", "/search?cost=1", "/") == [200, 429, 200]
        assert (search.__name__, search.__doc__) == ("search", "Search.")
        assert limited.consumed("search") == 2

    def test_on_an_async_view(self) -> None:
        pytest.importorskip("asgiref")
        limited = Limited()

        @limited.app.get("/")
        @limited.limiter.limit("1/minute")
        async def index() -> str:
            return str(limited.limiter.decision.outcomes[0].probe.remaining_tokens)

        assert limited.client.get("/").text == "0"
        assert limited.client.get("/").status_code == 429

    def test_on_a_view_that_is_a_class(self) -> None:
        limited = Limited()

        class Items(MethodView):
            decorators = [limited.limiter.limit("2/minute", name="items")]  # noqa: RUF012

            def get(self) -> str:
                return "items"

            @limited.limiter.limit("1/minute", name="changes")
            def post(self) -> str:
                return "made"

        class Page(View):
            decorators = [limited.limiter.limit("1/minute", name="page")]  # noqa: RUF012

            def dispatch_request(self) -> str:
                return "page"

        limited.app.add_url_rule("/items", view_func=Items.as_view("items"))
        limited.app.add_url_rule("/page", view_func=Page.as_view("page"))
        answers = [limited.client.open("/items", method=method) for method in ("POST", "POST", "GET", "GET")]
        assert [answer.status_code for answer in answers] == [200, 429, 200, 429]
        assert limited.statuses("/page", "/page") == [200, 429]

    def test_below_other_decorators(self) -> None:
        limited = Limited()
        limit = limited.limiter.limit

        @limited.app.get("/")
        @limit("5/minute")
        @limit("2/minute")
        def index() -> str:
            return "hello"

        assert limited.statuses("/", "/", "/") == [200, 200, 429]
        assert [limited.consumed(limits, place="index") for limits in ("5/minute", "2/minute")] == [2, 2]

    def test_on_a_blueprint(self) -> None:
        limited = Limited()
        outer, inner = Blueprint("outer", __name__, url_prefix="/outer"), Blueprint("inner", __name__)
        limited.limiter.limit("3/minute", name="outer")(outer)
        assert limited.limiter.limit("1/minute", name="inner")(inner) is inner
        outer.add_url_rule("/", view_func=hello)
        inner.add_url_rule("/inner", view_func=hello)
        outer.register_blueprint(inner)
        limited.app.register_blueprint(outer)
        limited.app.add_url_rule("/", view_func=hello)
        assert limited.statuses("/outer/inner", "/outer/inner", "/outer/", "/outer/", "/outer/", "/") == [
            *(200, 429, 200, 200, 429, 200)
        ]

    def test_of_several_views_counts_for_each_unless_it_has_a_name(self) -> None:
        limited = Limited()
        limit, apart = limited.limiter.limit, combined(client_ip(), route())
        limited.app.add_url_rule("/a", "a", limit("1/minute")(hello))
        limited.app.add_url_rule("/b", "b", limit("1/minute")(hello))
        limited.app.add_url_rule("/c", "c", limit("1/minute", name="c")(hello))
        limited.app.add_url_rule("/c2", "c2", limit("1/minute", name="c")(hello))
        limited.app.add_url_rule("/d/<x>", "d", limit("1/minute", name="apart", key=apart)(lambda x: x))
        limited.app.add_url_rule("/e", "e", limit("1/minute", name="apart", key=apart)(hello))
        assert limited.statuses("/a", "/b", "/a", "/c", "/c2") == [200, 200, 429, 200, 429]
        assert limited.statuses("/d/1", "/d/2", "/e") == [200, 429, 200]
        assert limited.consumed("apart", "127.0.0.1|/d/<x>") == 1
        assert limited.consumed("1/minute", place="a") == limited.consumed("1/minute", place="b") == 1

    def test_of_one_name_with_other_limits_is_refused(self) -> None:
        limiter = RateLimiter(Rule("1/minute", name="all"))
        limiter.limit("1/minute", name="all")
        with pytest.raises(InvalidConfigurationError, match="'all' has '1/minute' and '2/minute'"):
            limiter.limit("2/minute", name="all")

    def test_takes_the_key_of_the_extension_unless_it_has_its_own(self) -> None:
        limited = Limited("9/minute", key=header("x-tenant"))
        limited.app.add_url_rule("/a", "a", limited.limiter.limit("8/minute", name="a")(hello))
        limited.app.add_url_rule("/b", "b", limited.limiter.limit("7/minute", name="b", key=client_ip())(hello))
        for path in ("/a", "/b"):
            assert limited.client.get(path, headers={"x-tenant": "acme"}).status_code == 200
        assert limited.stored.consumed("|9/minute|header\\:x-tenant:acme") == 2
        assert (limited.consumed("a", "acme"), limited.consumed("b")) == (1, 1)

    def test_by_user(self) -> None:
        limited = Limited()
        key = user(lambda _: session.get("user"))

        @limited.app.get("/")
        @limited.limiter.limit("1/minute", key=key, missing=Missing.UNLIMITED)
        def index() -> str:
            return "hello"

        answers = limited.statuses("/", "/")
        for name in ("alice", "bob"):
            with limited.client.session_transaction() as signed_in:
                signed_in["user"] = name
            answers += limited.statuses("/", "/")
        assert answers == [200, 200, 200, 429, 200, 429]

    def test_is_no_decorator_of_classes_and_other_things(self) -> None:
        limiter = RateLimiter()
        for decorate in (limiter.limit("1/s"), limiter.exempt):
            with pytest.raises(InvalidArgumentError, match="decorators"):
                decorate(MethodView)
            with pytest.raises(InvalidArgumentError, match="'index'"):
                decorate("index")

    def test_takes_settings_for_limits_and_not_for_a_rule(self) -> None:
        limiter = RateLimiter()
        with pytest.raises(InvalidArgumentError, match="'name, cost' goes there"):
            limiter.limit(Rule("1/s"), name="api", cost=2)
        with pytest.raises(InvalidConfigurationError):
            limiter.limit("1/s", cost=0)


class TestExempt:
    def test_views_have_only_their_own_limits(self) -> None:
        limited = Limited("1/minute")
        part = Blueprint("part", __name__, url_prefix="/part")
        limited.limiter.limit("1/hour")(part)
        limited.app.add_url_rule("/health", "health", limited.limiter.exempt(hello))
        part.add_url_rule("/own", "own", limited.limiter.limit("3/minute")(limited.limiter.exempt(lambda: "own")))
        part.add_url_rule("/same", "same", limited.limiter.exempt(limited.limiter.limit("3/minute")(lambda: "own")))
        limited.app.register_blueprint(part)
        assert limited.statuses("/health", "/health", "/part/own", "/part/same", "/part/own", "/part/own") == [200] * 6
        assert limited.statuses("/part/own", "/part/same") == [429, 200]
        assert (limited.consumed("1/minute"), limited.consumed("1/hour")) == (0, 0)

    def test_a_bound_method_may_be_a_view(self) -> None:
        class Pages:
            def health(self) -> str:
                return "well"

        limited = Limited("1/minute")
        limited.app.add_url_rule("/health", view_func=limited.limiter.exempt(Pages().health))
        assert limited.statuses("/health", "/health", "/nowhere", "/nowhere") == [200, 200, 404, 429]

    def test_blueprints_are_so_with_those_that_are_nested_in_them(self) -> None:
        limited = Limited("1/minute")
        outer, inner = Blueprint("outer", __name__, url_prefix="/outer"), Blueprint("inner", __name__)
        limited.limiter.exempt(outer)
        limited.limiter.limit("1/minute")(inner)
        inner.add_url_rule("/inner", "view", lambda: "inner")
        outer.register_blueprint(inner)
        limited.app.register_blueprint(outer)
        limited.app.add_url_rule("/", "index", lambda: "index")
        assert limited.statuses("/outer/inner", "/outer/inner", "/", "/") == [200, 200, 200, 429]

    def test_views_are_so_for_the_extension_that_says_it(self) -> None:
        limited = Limited("1/minute")
        exempt, view = RateLimiter().exempt, limited.limiter.exempt(lambda: "both")
        limited.app.add_url_rule("/one", "one", exempt(lambda: "other"))
        limited.app.add_url_rule("/both", "both", exempt(view))
        assert limited.statuses("/both", "/both", "/one", "/one") == [200, 200, 200, 429]

    def test_a_dot_in_the_name_of_a_view_makes_no_blueprint(self) -> None:
        limited = Limited("1/minute")
        limited.app.add_url_rule("/", "not.static", lambda: "index")
        assert limited.statuses("/", "/") == [200, 429]


RULE = Rule("5/minute", name="api")


class TestCharging:
    @pytest.mark.parametrize("application", [(), (RULE,)], ids=["", "application"])
    @pytest.mark.parametrize("middleware", [(), (RULE, "7/minute")], ids=["", "middleware"])
    @pytest.mark.parametrize(
        "places", [["view"], ["blueprint"], ["blueprint", "view"], ["view", "same name"]], ids="+".join
    )
    def test_is_done_once_wherever_a_rule_stands(self, application: Any, middleware: Any, places: list[str]) -> None:
        limited = Limited(*application)
        blueprint, view = Blueprint("part", __name__), hello
        if "blueprint" in places:
            limited.limiter.limit(RULE)(blueprint)
        if "view" in places:
            view = limited.limiter.limit(RULE)(view)
        if "same name" in places:
            view = limited.limiter.limit("5/minute", name="api")(view)
        blueprint.add_url_rule("/", view_func=view)
        limited.app.register_blueprint(blueprint)
        manager: Any = limited.stored.manager
        limited.app.wsgi_app = RateLimitMiddleware(  # type: ignore[method-assign]
            limited.app.wsgi_app, *middleware, manager=manager
        )
        answer = limited.client.get("/")
        assert dict(parsed(answer, "RateLimit"))["api"] == {"r": 4, "t": 12}
        assert manager.bucket("api:127.0.0.1", "5/minute").available_tokens() == 4
        assert limited.consumed("7/minute") == (1 if middleware else 0)
        assert limited.statuses("/", "/", "/", "/", "/") == [200, 200, 200, 200, 429]

    def test_is_undone_where_a_later_rule_refuses(self) -> None:
        limited = Limited("9/minute")
        blueprint = Blueprint("part", __name__)
        limited.limiter.limit("8/minute")(blueprint)
        blueprint.add_url_rule("/", view_func=limited.limiter.limit("1/minute")(hello))
        limited.app.register_blueprint(blueprint)
        manager: Any = limited.stored.manager
        limited.app.wsgi_app = RateLimitMiddleware(  # type: ignore[method-assign]
            limited.app.wsgi_app, "7/minute", manager=manager
        )
        assert limited.statuses("/", "/", "/") == [200, 429, 429]
        places = [(9, ""), (8, "blueprint part"), (7, ""), (1, "part.hello")]
        assert [limited.consumed(f"{tokens}/minute", place=place) for tokens, place in places] == [1, 1, 1, 1]

    def test_is_done_for_each_request_that_follows_a_redirection(self) -> None:
        limited = Limited("5/minute")
        limited.app.add_url_rule("/slash/", view_func=hello)
        assert limited.client.get("/slash", follow_redirects=True).status_code == 200
        assert limited.consumed("5/minute") == 2


class TestAnswers:
    @pytest.mark.parametrize("handled", [429, TooManyRequests, RequestRefused])
    def test_may_be_given_by_an_error_handler(self, handled: Any) -> None:
        limited = Limited("1/minute")
        limited.app.add_url_rule("/", view_func=hello)

        @limited.app.errorhandler(handled)
        def refused(error: RequestRefused) -> tuple[str, int]:
            assert error.decision == limited.limiter.decision
            return f"again in {error.decision.retry_after} s", 429

        limited.client.get("/")
        answer = limited.client.get("/")
        assert (answer.status_code, answer.text) == (429, "again in 60 s")
        assert parsed(answer, "RateLimit") == [("1/minute", {"r": 0, "t": 60})]
        assert answer.headers.getlist("Retry-After") == ["60"]
        assert answer.headers.getlist("Content-Type") == ["text/html; charset=utf-8"]

    def test_may_be_given_by_the_error_handler_of_a_blueprint(self) -> None:
        limited = Limited("1/minute")
        part = Blueprint("part", __name__)
        part.add_url_rule("/", view_func=hello)
        part.register_error_handler(429, lambda error: error.get_response())
        limited.app.register_blueprint(part)
        limited.client.get("/")
        assert limited.client.get("/").content_type == "application/problem+json"

    def test_of_a_request_without_a_key_and_of_a_store_that_fails_have_statuses_of_their_own(self) -> None:
        store = ScriptedStore()
        store.fail(times=10)
        limited = Limited(
            Rule("1/minute", routes=["/store"]),
            Rule("1/minute", key=header("x-tenant"), routes=["/key"]),
            manager=ProxyManager(store),
            on_error=OnError.DENY,
        )
        for status in (400, 503):
            limited.app.register_error_handler(status, lambda error: (f"handled {error.code}", error.code))
        answers = [limited.client.get(path) for path in ("/store", "/key")]
        assert [(answer.status_code, answer.text) for answer in answers] == [(503, "handled 503"), (400, "handled 400")]
        assert answers[0].headers["Retry-After"]

    def test_may_be_replaced(self) -> None:
        class Teapot(Answers):
            def problem(self, decision: HttpDecision) -> dict[str, Any]:
                return {"status": 499}

        limited = Limited(Rule("1/minute", cost=2), answers=Teapot(x_ratelimit="delta"))
        answer = limited.client.get("/")
        assert (answer.status_code, answer.text) == (499, '{"status": 499}')
        assert answer.headers.getlist("X-RateLimit-Limit") == ["1"]

    def test_to_head_have_no_body(self) -> None:
        limited = Limited(Rule("1/minute", cost=2))
        with_body, without = limited.client.get("/"), limited.client.head("/")
        assert (without.status_code, without.data) == (429, b"")
        assert without.headers["Content-Length"] == str(len(with_body.data))

    @pytest.mark.parametrize(
        ("path", "status"), [("/response", 201), ("/abort", 404), ("/fail", 500), ("/stream", 200)]
    )
    def test_of_all_kinds_tell_of_limits(self, path: str, status: int) -> None:
        limited = Limited("5/minute")
        limited.app.config["PROPAGATE_EXCEPTIONS"] = False
        limited.app.add_url_rule("/response", "response", lambda: Response("made", 201))
        limited.app.add_url_rule("/abort", "abort", lambda: abort(404))
        limited.app.add_url_rule("/fail", "fail", lambda: str(1 / 0))
        limited.app.add_url_rule("/stream", "stream", lambda: Response(stream_with_context(iter(["a", "b"]))))
        answer = limited.client.get(path)
        assert answer.status_code == status
        assert parsed(answer, "RateLimit") == [("5/minute", {"r": 4, "t": 12})]

    def test_keep_the_fields_that_a_view_has_set(self) -> None:
        limited = Limited("5/minute")
        limited.app.add_url_rule("/", view_func=lambda: ("hello", {"ratelimit": '"mine";r=1'}))
        answer = limited.client.get("/")
        assert parsed(answer, "RateLimit") == [("mine", {"r": 1})]
        assert parsed(answer, "RateLimit-Policy") == [("5/minute", {"q": 5, "w": 60})]

    def test_are_raised_where_the_application_wants_all_errors(self) -> None:
        limited = Limited(Rule("1/minute", cost=2))
        limited.app.config["TRAP_HTTP_EXCEPTIONS"] = True
        with pytest.raises(RequestRefused, match="429 Too Many Requests") as caught:
            limited.client.get("/")
        assert isinstance(caught.value, TooManyRequests)
        assert not isinstance(caught.value, NotFound)


class TestInitApp:
    def test_serves_several_applications(self) -> None:
        limiter = RateLimiter("2/minute")
        view = limiter.limit("1/minute")(hello)
        first, second = Limits(), Limits()
        answers: list[int] = []
        for stored in (first, second):
            manager: Any = stored.manager
            app = Flask(__name__)
            limiter.init_app(app, manager=manager)
            app.add_url_rule("/", view_func=view)
            answers += [app.test_client().get("/").status_code for _ in range(2)]
        assert answers == [200, 429, 200, 429]
        assert [stored.consumed("hello|1/minute|ip:127.0.0.1") for stored in (first, second)] == [1, 1]

    @pytest.mark.redis
    def test_finds_the_store_in_the_configuration(self, redis_url: str, client: redis.Redis) -> None:
        app = Flask(__name__)
        app.config["RATELIMIT_URL"] = patient(redis_url)
        RateLimiter("2/minute").init_app(app)
        assert [app.test_client().get("/").status_code for _ in range(3)] == [404, 404, 429]
        assert client.keys() == [b"ratelimit:|2/minute|ip:127.0.0.1"]

    @pytest.mark.redis
    def test_prefers_a_manager_to_the_configuration(self, client: redis.Redis) -> None:
        limited = Limited("2/minute")
        limited.app.config["RATELIMIT_URL"] = "redis://localhost:1/0"
        assert limited.statuses("/") == [404]

    def test_of_an_application_that_has_the_extension_is_refused(self) -> None:
        limited = Limited()
        for limiter in (limited.limiter, RateLimiter()):
            with pytest.raises(RuntimeError, match="has a RateLimiter already"):
                limiter.init_app(limited.app)

    def test_takes_no_manager_of_asyncio(self) -> None:
        manager: Any = AsyncProxyManager.from_url("memory://")
        with pytest.raises(InvalidArgumentError, match="must be a ProxyManager or a URL; got an AsyncProxyManager"):
            RateLimiter(manager=manager)
        with pytest.raises(InvalidArgumentError, match="must be a ProxyManager or a URL; got an AsyncProxyManager"):
            RateLimiter().init_app(Flask(__name__), manager=manager)

    def test_that_was_forgotten_is_no_licence(self) -> None:
        limiter = RateLimiter()
        forgotten, other = Flask(__name__), Limited().app
        for app in (forgotten, other):
            app.testing = True
            app.add_url_rule("/", view_func=limiter.limit("1/minute")(hello))
            with pytest.raises(RuntimeError, match="does not know the application"):
                app.test_client().get("/")

    def test_may_leave_the_limits_off_for_a_time(self) -> None:
        limited = Limited("1/minute")
        limited.app.add_url_rule("/", view_func=limited.limiter.limit(Rule("1/minute", cost=2, name="view"))(hello))
        limited.app.config["RATELIMIT_ENABLED"] = False
        answer = limited.client.get("/")
        assert (answer.status_code, "RateLimit" in answer.headers) == (200, False)
        limited.app.config["RATELIMIT_ENABLED"] = True
        assert limited.statuses("/") == [429]


def test_the_decision_is_at_hand() -> None:
    limited = Limited("2/minute")

    @limited.app.get("/")
    def index() -> str:
        (outcome,) = limited.limiter.decision.outcomes
        return f"{outcome.key!r} {outcome.limits[0].remaining} {request.url_rule}"

    assert limited.client.get("/").text == "'127.0.0.1' 1 /"
    with limited.app.test_request_context("/"):
        assert limited.limiter.decision.outcomes == ()


def test_a_proxy_that_is_trusted_tells_who_the_client_is() -> None:
    limited = Limited("1/minute")
    limited.app.wsgi_app = ProxyFix(limited.app.wsgi_app)  # type: ignore[method-assign]
    for client, status in [("192.0.2.1", 404), ("192.0.2.2", 404), ("10.0.0.1, 192.0.2.1", 429)]:
        assert limited.client.get("/", headers={"X-Forwarded-For": client}).status_code == status


PROGRAM = """
import os

from flask import Flask

from ratelimit import ProxyManager
from ratelimit.integrations.flask import RateLimiter
from ratelimit.integrations.http import Rule

manager = ProxyManager.from_url(os.environ["RATELIMIT_URL"], "50/day", timeout=60)
assert manager.try_consume("opens a connection before the fork")
application = Flask(__name__)
limiter = RateLimiter(Rule("500/day", name="all"), app=application, manager=manager)


@application.get("/")
@limiter.limit("50/day", name="index")
def index():
    return "hello"
"""


@pytest.mark.redis
def test_processes_admit_together_what_the_limit_says(redis_url: str, tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    with gunicorn(PROGRAM, tmp_path, redis_url=patient(redis_url)) as address:
        assert statuses(address, "/", 120) == {200: 50, 429: 70}
    with ProxyManager.from_url(redis_url, "50/day") as manager:
        assert manager.available_tokens("index:127.0.0.1") == 0
        assert manager.available_tokens("all:127.0.0.1") == 450
