"""The throttles of REST framework, over real views of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import Http404
from django.test import override_settings
from django.utils.decorators import method_decorator

from ratelimit import ProxyManager
from ratelimit.integrations.http import Rule, client_ip, header
from ratelimit.testing import ScriptedStore
from tests.integrations import django_site  # configures Django, without which nothing of REST framework can be imported
from tests.integrations.django_site import Site, fields
from tests.integrations.gunicorns import gunicorn, statuses
from tests.support.workers import patient

# isort: split
from rest_framework.authentication import BaseAuthentication
from rest_framework.decorators import api_view, throttle_classes
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView

from ratelimit.integrations.django import rate_limit
from ratelimit.integrations.rest_framework import (
    AnonRateLimit,
    RateLimitThrottle,
    ScopedRateLimit,
    UserRateLimit,
    exception_handler,
)

DAY = 86_400


@pytest.fixture(scope="module", autouse=True)
def _settings() -> Generator[None]:
    with django_site.overridden():
        yield


@pytest.fixture(params=[False, True], ids=["wsgi", "asgi"])
def site(request: pytest.FixtureRequest) -> Callable[..., Site]:
    """A site by one of the servers' interfaces; views of REST framework are sync behind either."""
    return partial(Site, asynchronous=request.param, middleware=False)


class Tokens(BaseAuthentication):
    """Knows the user whose number is the token."""

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        token = request.headers.get("X-Token")
        return None if token is None else (django_site.Users().get_user(int(token)), None)


def hello(_: Request) -> Response:
    return Response("hello")


def unknown(_: Request) -> Response:
    raise Http404


def api(*throttles: type[BaseThrottle], show: Callable[[Request], Response] = hello, **attributes: Any) -> Any:
    """A view with some throttles."""

    class Api(APIView):
        authentication_classes = (Tokens,)
        throttle_classes = throttles

        def get(self, request: Request) -> Response:
            return show(request)

    for name, value in attributes.items():
        setattr(Api, name, value)
    return Api.as_view()


def rates(**of_scopes: Any) -> dict[str, Any]:
    """The setting of REST framework."""
    return {"REST_FRAMEWORK": {"DEFAULT_THROTTLE_RATES": of_scopes}}


class First(RateLimitThrottle):
    limits = "3/day"
    name = "first"


class Second(RateLimitThrottle):
    limits = "1/day"
    name = "second"


class TestRates:
    @pytest.mark.parametrize("rate", ["2/day", "2/d", "2/m", "2/min", "2/hour", "2/s", "1/hour burst 2", "2/h, 9/d"])
    def test_are_written_in_either_way(self, site: Callable[..., Site], rate: str) -> None:
        with site(more=rates(anon=rate)) as at, at.showing(index=api(AnonRateLimit)):
            assert at.statuses(3) == [200, 200, 429]
            assert at.consumed("anon:127.0.0.1") == 2

    @pytest.mark.parametrize("several", [["2/m", "9/d"], ("2/m", "9/d")])
    def test_and_limits_may_be_lists(self, site: Callable[..., Site], several: Any) -> None:
        class Listed(RateLimitThrottle):
            limits = several
            name = "listed"

        with site(more=rates(anon=several)) as at, at.showing(index=api(AnonRateLimit), other=api(Listed)):
            assert at.statuses(3) == at.statuses(3, "/other") == [200, 200, 429]
            assert (at.consumed("anon:127.0.0.1"), at.consumed("listed:ip:127.0.0.1")) == (2, 2)

    def test_of_none_are_no_limits(self, site: Callable[..., Site]) -> None:
        with site(more=rates(anon=None)) as at, at.showing(index=api(AnonRateLimit)):
            assert at.statuses(3) == [200, 200, 200]

    def test_count_at_once_when_they_are_overridden(self, site: Callable[..., Site]) -> None:
        with site(more=rates(anon="2/day")) as at, at.showing(index=api(AnonRateLimit)):
            assert at.get().status_code == 200
            with override_settings(**rates(anon=None)):
                assert at.statuses(3) == [200, 200, 200]
            assert at.statuses(2) == [200, 429]

    @pytest.mark.parametrize(
        ("throttle", "of_scopes", "complaint"),
        [
            (AnonRateLimit, {}, "DEFAULT_THROTTLE_RATES has no rate for the scope 'anon' of AnonRateLimit"),
            (AnonRateLimit, {"anon": "2/fortnight"}, "AnonRateLimit is not valid: unknown unit of time"),
            (RateLimitThrottle, {}, "RateLimitThrottle needs limits, or a scope"),
        ],
    )
    def test_that_cannot_be_are_an_error(self, throttle: Any, of_scopes: dict[str, str], complaint: str) -> None:
        with Site(asynchronous=False, more=rates(**of_scopes)) as at, at.showing(index=api(throttle)):
            error = at.get().exc_info[1]
        assert isinstance(error, ImproperlyConfigured)
        assert complaint in str(error)


class TestThrottles:
    def test_limit_who_has_not_logged_in_by_address(self, site: Callable[..., Site]) -> None:
        with site(more=rates(anon="1/day")) as at, at.showing(index=api(AnonRateLimit)):
            assert at.statuses(2) == [200, 429]
            assert at.statuses(2, headers={"X-Token": "7"}) == [200, 200]

    def test_limit_users_and_the_addresses_of_others(self, site: Callable[..., Site]) -> None:
        with site(more=rates(user="1/day")) as at, at.showing(index=api(UserRateLimit)):
            assert at.statuses(2) == [200, 429]
            assert at.statuses(2, headers={"X-Token": "7"}) == [200, 429]
            assert at.statuses(2, headers={"X-Token": "8"}) == [200, 429]
            assert [at.consumed(f"user:{key}") for key in ("ip:127.0.0.1", "user:7", "user:8")] == [1, 1, 1]

    def test_limit_views_of_a_scope_together(self, site: Callable[..., Site]) -> None:
        views = {path: api(ScopedRateLimit, throttle_scope="uploads") for path in ("a", "b")}
        with site(more=rates(uploads="1/day", other="1/day")) as at:
            other = api(ScopedRateLimit, throttle_scope="other")
            with at.showing(**views, c=other, d=api(ScopedRateLimit)):
                assert [at.get(f"/{path}").status_code for path in "abcdd"] == [200, 429, 200, 200, 200]
        assert at.consumed("uploads:ip:127.0.0.1") == 1

    def test_limit_functions(self, site: Callable[..., Site]) -> None:
        @api_view(["GET"])
        @throttle_classes([Second])
        def one(request: Request) -> Response:
            return hello(request)

        with site() as at, at.showing(index=one):
            assert at.statuses(2) == [200, 429]

    def test_have_the_settings_of_a_rule(self, site: Callable[..., Site]) -> None:
        class Tenants(RateLimitThrottle):
            limits = staticmethod(lambda tenant: "4/day" if tenant == "acme" else "2/day")
            key = header("X-Tenant")
            cost = 2
            exempt = staticmethod(lambda request: request.header("x-internal") is not None)

        with site() as at, at.showing(index=api(Tenants)):
            assert at.statuses(3, headers={"X-Tenant": "acme"}) == [200, 200, 429]
            assert at.statuses(2, headers={"X-Tenant": "other"}) == [200, 429]
            assert at.statuses(2, headers={"X-Tenant": "other", "X-Internal": "1"}) == [200, 200]

    def test_replace_the_limits_of_live_buckets_by_a_higher_version(self, site: Callable[..., Site]) -> None:
        class Old(RateLimitThrottle):
            scope = "searches"
            version = 1

        class New(Old):
            version = 2

        with site() as at, at.showing(old=api(Old), new=api(New)):
            with override_settings(**rates(searches="2/day")):
                assert at.statuses(1, "/old") == [200]
            with override_settings(**rates(searches="4/day")):
                assert at.statuses(3, "/new") == [200, 200, 429]

    def test_let_every_request_through_where_they_are_switched_off(self, site: Callable[..., Site]) -> None:
        class Off(First):
            enabled = False

        with site() as at, at.showing(index=api(Off)):
            assert at.statuses(4) == [200] * 4
            assert len(at.memory) == 0

    def test_let_no_client_choose_its_bucket_by_a_header(self, site: Callable[..., Site]) -> None:
        headers = [{"X-Forwarded-For": f"203.0.113.{number}"} for number in range(3)]
        views = {"anon": api(AnonRateLimit), "user": api(UserRateLimit)}
        with site(more=rates(anon="1/day", user="1/day")) as at, at.showing(**views):
            for path in views:
                assert [at.get(f"/{path}", headers=one).status_code for one in headers] == [200, 429, 429]

    def test_tell_clients_apart_behind_proxies(self, site: Callable[..., Site]) -> None:
        more = rates(anon="1/day", user="1/day")
        view = api(AnonRateLimit, UserRateLimit)
        with site(more=more, CLIENT_IP=client_ip(hops=1)) as at, at.showing(index=view):
            at.get(headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.7"})
        assert [at.consumed(key) for key in ("anon:203.0.113.7", "user:ip:203.0.113.7")] == [1, 1]

    def test_are_switched_off_by_the_setting(self, site: Callable[..., Site]) -> None:
        with site(ENABLED=False) as at, at.showing(index=api(Second)):
            assert at.statuses(2) == [200, 200]


class TestRefusals:
    def test_are_those_of_rest_framework_by_default(self, site: Callable[..., Site]) -> None:
        with site() as at, at.showing(index=api(Second)):
            at.get()
            refused = at.get()
        assert refused.status_code == 429
        assert refused["Retry-After"] == str(DAY)
        assert json.loads(refused.content) == {"detail": "Request was throttled. Expected available in 86400 seconds."}

    def test_say_nothing_of_a_wait_that_never_ends(self, site: Callable[..., Site]) -> None:
        class Dear(RateLimitThrottle):
            limits = "1/day"
            cost = 2

        with site() as at, at.showing(index=api(Dear)):
            refused = at.get()
        assert refused.status_code == 429
        assert "Retry-After" not in refused

    @pytest.mark.parametrize("throttles", [(First, Second), (Second, First)])
    def test_cost_nothing_by_any_throttle(self, site: Callable[..., Site], throttles: tuple[Any, Any]) -> None:
        with site() as at, at.showing(index=api(*throttles)):
            responses = [at.get() for _ in range(4)]
        assert [response.status_code for response in responses] == [200, 429, 429, 429]
        assert [at.consumed(f"{name}:ip:127.0.0.1") for name in ("first", "second")] == [1, 1]
        assert responses[1]["Retry-After"] == str(DAY)

    def test_are_problems_by_the_exception_handler(self, site: Callable[..., Site]) -> None:
        more = {"REST_FRAMEWORK": {"EXCEPTION_HANDLER": "ratelimit.integrations.rest_framework.exception_handler"}}

        with site(more=more) as at, at.showing(index=api(Second), unknown=api(First, show=unknown)):
            at.get()
            refused, missing = at.get(), at.get("/unknown")
        assert refused.status_code == 429
        assert refused["Content-Type"] == "application/problem+json"
        assert refused["Retry-After"] == str(DAY)
        assert json.loads(refused.content)["violated-policies"] == ["second"]
        assert fields(refused)["RateLimit"] == [("second", {"r": 0, "t": DAY})]
        assert missing.status_code == 404
        assert missing["Content-Type"] == "application/json"

    def test_by_others_are_left_to_rest_framework(self, site: Callable[..., Site]) -> None:
        class Others(BaseThrottle):
            def allow_request(self, request: Request, view: APIView) -> bool:
                return False

            def wait(self) -> float:
                return 1.5

        with site() as at, at.showing(index=api(First, Others, get_exception_handler=lambda _: exception_handler)):
            refused = at.get()
        assert refused.status_code == 429
        assert refused["Content-Type"] == "application/json"
        assert refused["Retry-After"] == "2"

    @pytest.mark.parametrize("handler", ["rest_framework.views", "ratelimit.integrations.rest_framework"])
    def test_where_the_store_fails_are_no_fault_of_the_client(self, site: Callable[..., Site], handler: str) -> None:
        store = ScriptedStore()
        more = {"REST_FRAMEWORK": {"EXCEPTION_HANDLER": f"{handler}.exception_handler"}}
        with site(store=store, ON_ERROR="deny", more=more) as at, at.showing(index=api(First)):
            store.fail()
            refused = at.get()
        assert refused.status_code == 503
        assert refused["Retry-After"] == "1"
        assert ("detail" in json.loads(refused.content)) is handler.startswith("rest_framework")

    def test_where_there_is_no_key_are_bad_requests(self, site: Callable[..., Site]) -> None:
        class Tenants(RateLimitThrottle):
            limits = "1/day"
            key = header("X-Tenant")

        with site() as at, at.showing(index=api(Tenants)):
            refused = at.get()
        assert refused.status_code == 400
        assert "header:x-tenant" in json.loads(refused.content)["detail"]


class TestFields:
    def test_are_on_all_responses_without_the_middleware(self, site: Callable[..., Site]) -> None:
        with site() as at, at.showing(index=api(First), unknown=api(First, show=unknown)):
            responses = [at.get(), at.get("/unknown"), at.get(method="DELETE"), at.get()]
        assert [response.status_code for response in responses] == [200, 404, 405, 429]
        assert [fields(response)["RateLimit"][0][1]["r"] for response in responses] == [2, 1, 0, 0]
        assert fields(responses[0])["RateLimit-Policy"] == [("first", {"q": 3, "w": DAY})]

    def test_tell_of_all_throttles(self, site: Callable[..., Site]) -> None:
        with site() as at, at.showing(index=api(First, Second)):
            admitted, refused = at.get(), at.get()
        assert [name for name, _ in fields(admitted)["RateLimit"]] == ["first", "second"]
        assert [name for name, _ in fields(refused)["RateLimit"]] == ["second"]


class TestTogether:
    @pytest.mark.parametrize("middleware", [False, True])
    @pytest.mark.parametrize("decorated", [None, "view", "dispatch", "get"])
    @pytest.mark.parametrize("throttled", [0, 1, 2])
    def test_middleware_decorator_and_throttles_charge_once(
        self, site: Callable[..., Site], middleware: bool, decorated: str | None, throttled: int
    ) -> None:
        class Once(RateLimitThrottle):
            limits = "3/day"
            name = "once"
            key = client_ip()

        rule = Rule("3/day", name="once")

        class Api(APIView):
            throttle_classes = [Once] * throttled

            def get(self, _: Request) -> Response:
                return Response("hello")

        if decorated in ("dispatch", "get"):
            method_decorator(rate_limit(rule), name=decorated)(Api)
        view = rate_limit(rule)(Api.as_view()) if decorated == "view" else Api.as_view()
        with site(middleware=middleware, RULES=[rule]) as at, at.showing(index=view):
            first = at.get()
            charged = bool(middleware or decorated or throttled)
            assert at.consumed("once:127.0.0.1") == charged
            assert fields(first).get("RateLimit", []) == ([("once", {"r": 2, "t": DAY // 3})] if charged else [])
            assert at.statuses(3) == ([200, 200, 429] if charged else [200, 200, 200])
            assert at.consumed("once:127.0.0.1") == (3 if charged else 0)

    def test_a_throttle_that_refuses_gives_back_what_the_middleware_took(self, site: Callable[..., Site]) -> None:
        rule = Rule("9/day", name="all")
        with site(middleware=True, RULES=[rule]) as at, at.showing(index=api(Second)):
            assert at.statuses(3) == [200, 429, 429]
        assert at.consumed("all:127.0.0.1") == 1

    def test_the_decision_is_with_the_request_of_rest_framework(self, site: Callable[..., Site]) -> None:
        seen: list[Any] = []

        def look(request: Request) -> Response:
            seen.append(request.ratelimit)  # type: ignore[attr-defined]
            return hello(request)

        with site() as at, at.showing(index=api(First, show=look)):
            at.get()
        assert seen[0].outcomes[0].probe.remaining_tokens == 2


PROGRAM = """
import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "rest_framework"],
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": [],
        "DEFAULT_THROTTLE_CLASSES": ["ratelimit.integrations.rest_framework.UserRateLimit"],
        "DEFAULT_THROTTLE_RATES": {"user": "50/day"},
    },
)
django.setup()

from django.core.wsgi import get_wsgi_application
from django.urls import path
from rest_framework.response import Response
from rest_framework.views import APIView


class View(APIView):
    def get(self, request):
        return Response("hello")


urlpatterns = [path("", View.as_view())]
application = get_wsgi_application()
"""


@pytest.mark.redis
def test_processes_admit_together_what_the_rate_says(redis_url: str, tmp_path: Path) -> None:
    with gunicorn(PROGRAM, tmp_path, redis_url=patient(redis_url)) as address:
        assert statuses(address, "/", 120) == {200: 50, 429: 70}
    with ProxyManager.from_url(redis_url, "50/day") as manager:
        assert manager.snapshot("ratelimit:user:ip:127.0.0.1").consumed_tokens == 50
