"""The middleware, the decorator and the setting of Django, over both of its faces."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import Client, RequestFactory, override_settings
from django.utils.decorators import method_decorator
from django.utils.functional import SimpleLazyObject
from django.views import View

from ratelimit import InvalidArgumentError, InvalidConfigurationError, OnError, ProxyManager
from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.integrations import http
from ratelimit.integrations.django import exempt, rate_limit, user_or_client
from ratelimit.integrations.django.conf import current
from ratelimit.integrations.http import Answers, HttpDecision, Missing, Rule, client_ip, header, route, user
from ratelimit.testing import ScriptedStore
from tests.integrations import django_site
from tests.integrations.django_site import AUTHENTICATION, SESSIONS, Site, ahello, fields, hello, session_of
from tests.integrations.gunicorns import ROOT, gunicorn, statuses
from tests.integrations.uvicorns import program
from tests.support.workers import patient

DAY = 86_400


@pytest.fixture(scope="module", autouse=True)
def _settings() -> Generator[None]:
    with django_site.overridden():
        yield


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def site(request: pytest.FixtureRequest) -> Callable[..., Site]:
    """A site over one of the faces."""
    return partial(Site, asynchronous=request.param)


def limited(site: Site, *decorators: Callable[[Any], Any], view: Callable[..., Any] | None = None) -> Any:
    """A view of the site's face, decorated."""
    decorated: Any = view or site.view
    for decorator in reversed(decorators):
        decorated = decorator(decorated)
    return decorated


class Views:
    """Views for sync code and for asyncio, and how often they were called."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[HttpRequest] = []

    def of(self, *, asynchronous: bool) -> Callable[..., Any]:
        return self.aview if asynchronous else self.view

    def view(self, request: HttpRequest, **_: object) -> HttpResponse:
        self.calls += 1
        self.seen.append(request)
        return HttpResponse("hello")

    async def aview(self, request: HttpRequest, **_: object) -> HttpResponse:
        return self.view(request)


def broken(_: HttpRequest) -> HttpResponse:
    raise ZeroDivisionError


async def abroken(_: HttpRequest) -> HttpResponse:
    raise ZeroDivisionError


def middleware_with_lazy_user(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[..., HttpResponse]:
    def middleware(request: HttpRequest) -> HttpResponse:
        def find() -> Any:
            with pytest.raises(RuntimeError):  # Django would forbid a database here otherwise
                asyncio.get_running_loop()
            return django_site.Users().get_user(7)

        request.user = SimpleLazyObject(find)  # type: ignore[assignment]  # as Django's own does
        return get_response(request)

    return middleware


OTHER_URLS = django_site.Urls({"other/<slug:name>": lambda _, name: HttpResponse(name)})


def middleware_with_urls(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[..., HttpResponse]:
    def middleware(request: HttpRequest) -> HttpResponse:
        request.urlconf = OTHER_URLS  # type: ignore[assignment]  # a module is not the only thing that it may be
        return get_response(request)

    return middleware


class TestMiddleware:
    def test_admits_what_the_rules_say_and_refuses_the_rest(self, site: Callable[..., Site]) -> None:
        views = Views()
        with site(RULES=["3/day"]) as at, at.showing(index=views.of(asynchronous=at.asynchronous)):
            assert at.statuses(5) == [200, 200, 200, 429, 429]
            assert views.calls == 3
            assert at.consumed("|3/day|ip:127.0.0.1") == 3
            at.clock.advance(DAY / 3)
            assert at.statuses(2) == [200, 429]

    def test_takes_a_list_within_its_rules_for_one_rule_of_several_limits(self, site: Callable[..., Site]) -> None:
        with site(RULES=(["3/day", "2/hour"], "4/day")) as at:
            assert [str(rule.limits) for rule in current().rules] == ["3/day; 2/hour", "4/day"]
            assert at.statuses(3) == [200, 200, 429]
            at.clock.advance(3600)
            assert at.statuses(2) == [200, 429]

    def test_tells_clients_what_is_left_and_why_they_are_refused(self, site: Callable[..., Site]) -> None:
        with site(RULES=["2/day"]) as at:
            admitted, _, refused = at.get(), at.get(), at.get()
        policy = [("2/day", {"q": 2, "w": DAY})]
        assert fields(admitted) == {"RateLimit-Policy": policy, "RateLimit": [("2/day", {"r": 1, "t": DAY // 2})]}
        assert fields(refused) == {"RateLimit-Policy": policy, "RateLimit": [("2/day", {"r": 0, "t": DAY // 2})]}
        assert refused["Retry-After"] == str(DAY // 2)
        assert refused["Content-Type"] == "application/problem+json"
        assert json.loads(refused.content)["violated-policies"] == ["2/day"]
        assert "Retry-After" not in admitted

    def test_leaves_the_decision_with_the_request(self, site: Callable[..., Site]) -> None:
        views = Views()
        with site(RULES=["2/day"]) as at, at.showing(index=views.of(asynchronous=at.asynchronous)):
            at.get()
        decision: Any = views.seen[0].ratelimit  # type: ignore[attr-defined]
        assert isinstance(decision, HttpDecision)
        assert decision.outcomes[0].probe.remaining_tokens == 1

    def test_tells_also_with_errors(self, site: Callable[..., Site]) -> None:
        with site(RULES=["5/day"]) as at:
            view = abroken if at.asynchronous else broken
            with at.showing(index=view):
                failed, unknown = at.get(), at.get("/nowhere")
        assert (failed.status_code, unknown.status_code) == (500, 404)
        assert fields(failed)["RateLimit"][0][1]["r"] == 4
        assert fields(unknown)["RateLimit"][0][1]["r"] == 3

    def test_leaves_a_stream_a_stream(self, site: Callable[..., Site]) -> None:
        produced: list[int] = []

        def parts() -> Iterator[bytes]:
            for number in range(3):
                produced.append(number)
                yield b"%d" % number

        async def aparts() -> AsyncIterator[bytes]:
            for part in parts():
                yield part

        with site(RULES=["5/day"]) as at:

            def stream(_: HttpRequest) -> StreamingHttpResponse:
                return StreamingHttpResponse(aparts() if at.asynchronous else parts())

            with at.showing(index=stream):
                response = at.get()
                assert response.streaming
                assert produced == []
                assert fields(response)["RateLimit"][0][1]["r"] == 4

                async def whole() -> bytes:
                    return b"".join([part async for part in response.streaming_content])

                content = asyncio.run(whole()) if at.asynchronous else b"".join(response.streaming_content)
                assert content == b"012"

    def test_stays_in_the_thread_that_it_is_called_in(self, site: Callable[..., Site]) -> None:
        threads: list[int] = []

        def key(_: http.HttpRequest) -> str:
            threads.append(threading.get_ident())
            return "all"

        views = Views()
        with site(RULES=[Rule("5/day", key=key)]) as at, at.showing(index=views.of(asynchronous=at.asynchronous)):
            at.get()
            kind = AsyncBucket if at.asynchronous else Bucket
        assert threads == [threading.get_ident()]
        assert isinstance(views.seen[0].ratelimit.outcomes[0].bucket, kind)  # type: ignore[attr-defined]

    def test_awaits_what_rules_find_out_where_it_is_async(self) -> None:
        async def key(_: http.HttpRequest) -> str:
            await asyncio.sleep(0)
            return "awaited"

        with Site(asynchronous=True, RULES=[Rule("1/day", key=key)]) as at:
            assert at.statuses(2) == [200, 429]
            assert at.consumed("|1/day|key:awaited") == 1

    def test_matches_routes_below_the_script_name(self, site: Callable[..., Site]) -> None:
        more = {"FORCE_SCRIPT_NAME": "/app"}
        with site(RULES=[Rule("1/day", routes=["/"])], more=more) as at, at.showing(index=at.view, other=at.view):
            base = "/app" if at.asynchronous else ""  # a WSGI server takes it off the path, ASGI leaves it there
            assert at.statuses(2, f"{base}/") == [200, 429]
            assert at.statuses(2, f"{base}/other") == [200, 200]

    def test_knows_the_route_before_the_view_is_looked_for(self, site: Callable[..., Site]) -> None:
        def show(_: HttpRequest, pk: int) -> HttpResponse:
            return HttpResponse(str(pk))

        rule = Rule("2/day", name="r", key=route(), missing=Missing.UNLIMITED)
        with site(RULES=[rule]) as at, at.showing(**{"things/<int:pk>/": show}):
            assert [at.get(f"/things/{pk}/").status_code for pk in (1, 2, 3)] == [200, 200, 429]
            assert at.get("/nowhere").status_code == 404
        assert at.consumed("r:/things/<int:pk>/") == 2

    def test_knows_the_routes_that_another_middleware_has_chosen(self, site: Callable[..., Site]) -> None:
        before = [f"{__name__}.middleware_with_urls"]
        with site(RULES=[Rule("2/day", name="r", key=route())], before=before) as at:
            assert at.get("/other/one").status_code == 200
        assert at.consumed("r:/other/<slug:name>") == 1

    def test_limits_users_each_on_their_own(self, site: Callable[..., Site]) -> None:
        rule = Rule("1/day", name="each", key=user(), missing=Missing.UNLIMITED)
        with site(RULES=[rule], before=[SESSIONS, AUTHENTICATION]) as at:
            assert at.statuses(2) == [200, 200]
            for pk in (1, 2):
                at.cookies["sessionid"] = session_of(pk)
                assert at.statuses(2) == [200, 429]
            assert [at.consumed(f"each:{pk}") for pk in (1, 2)] == [1, 1]

    def test_takes_the_address_of_who_has_not_logged_in(self, site: Callable[..., Site]) -> None:
        rule = Rule("1/day", name="each", key=user_or_client)
        with site(RULES=[rule], before=[SESSIONS, AUTHENTICATION], CLIENT_IP=client_ip(hops=1)) as at:
            assert at.statuses(2, headers={"X-Forwarded-For": "203.0.113.7"}) == [200, 429]
            at.cookies["sessionid"] = session_of(1)
            assert at.statuses(2) == [200, 429]
        assert [at.consumed(key) for key in ("each:ip:203.0.113.7", "each:user:1")] == [1, 1]

    def test_finds_a_user_that_another_middleware_knows_without_blocking_the_event_loop(
        self, site: Callable[..., Site]
    ) -> None:
        before = [f"{__name__}.middleware_with_lazy_user"]
        with site(RULES=[Rule("1/day", name="each", key=user())], before=before) as at:
            assert at.statuses(2) == [200, 429]
            assert at.consumed("each:7") == 1

    def test_says_which_middleware_is_missing_where_a_rule_is_by_user(self, site: Callable[..., Site]) -> None:
        with site(RULES=[Rule("1/day", key=user())]) as at:
            response = at.get()
        assert response.status_code == 500
        _, error, _ = response.exc_info
        assert isinstance(error, ImproperlyConfigured)
        assert "AuthenticationMiddleware before" in str(error)

    def test_refuses_a_request_without_the_key(self, site: Callable[..., Site]) -> None:
        with site(RULES=[Rule("1/day", key=header("X-Tenant"))]) as at:
            response = at.get()
            assert at.get(headers={"X-Tenant": "acme"}).status_code == 200
        assert response.status_code == 400
        assert response["Content-Type"] == "application/problem+json"


class TestDecorator:
    def test_refuses_before_the_view_is_called(self, site: Callable[..., Site]) -> None:
        views = Views()
        with site(middleware=False) as at:
            view = rate_limit("2/day", name="search")(views.of(asynchronous=at.asynchronous))
            with at.showing(index=view):
                responses = [at.get() for _ in range(3)]
        assert [response.status_code for response in responses] == [200, 200, 429]
        assert views.calls == 2
        assert [fields(response)["RateLimit"][0][1]["r"] for response in responses] == [1, 0, 0]
        assert responses[2]["Retry-After"] == str(DAY // 2)
        assert at.consumed("search:127.0.0.1") == 2

    def test_passes_arguments_on_and_keeps_the_name(self, site: Callable[..., Site]) -> None:
        with site(middleware=False) as at:

            def show(_: HttpRequest, pk: int) -> HttpResponse:
                """Show it."""
                return HttpResponse(str(pk))

            async def ashow(_: HttpRequest, pk: int) -> HttpResponse:
                """Show it."""
                return HttpResponse(str(pk))

            view = rate_limit("2/day")(ashow if at.asynchronous else show)
            assert (view.__name__, view.__doc__) == ("ashow" if at.asynchronous else "show", "Show it.")
            with at.showing(**{"<int:pk>": view}):
                assert at.get("/42").content == b"42"

    def test_gives_back_what_the_middleware_took_where_it_refuses(self, site: Callable[..., Site]) -> None:
        with site(RULES=[Rule("9/day", name="all")]) as at:
            view = limited(at, rate_limit("1/day", name="search"))
            with at.showing(index=view):
                responses = [at.get() for _ in range(3)]
        assert [response.status_code for response in responses] == [200, 429, 429]
        assert (at.consumed("all:127.0.0.1"), at.consumed("search:127.0.0.1")) == (1, 1)
        policies = [("all", {"q": 9, "w": DAY}), ("search", {"q": 1, "w": DAY})]
        assert [fields(response)["RateLimit-Policy"] for response in responses] == [policies] * 3

    def test_gives_back_what_an_async_middleware_took_where_a_sync_view_is_refused(self) -> None:
        with Site(asynchronous=True, RULES=[Rule("9/day", name="all")]) as at:
            view = rate_limit("1/day", name="search")(hello)
            with at.showing(index=view):
                assert at.statuses(3) == [200, 429, 429]
            assert (at.consumed("all:127.0.0.1"), at.consumed("search:127.0.0.1")) == (1, 1)

    def test_gives_back_what_a_sync_middleware_took_where_an_async_view_is_refused(self) -> None:
        with Site(asynchronous=False, RULES=[Rule("9/day", name="all")]) as at:
            view = rate_limit("1/day", name="search")(ahello)
            with at.showing(index=view):
                assert at.statuses(3) == [200, 429, 429]
            assert (at.consumed("all:127.0.0.1"), at.consumed("search:127.0.0.1")) == (1, 1)

    @pytest.mark.parametrize("middleware", [False, True])
    @pytest.mark.parametrize("decorators", [1, 2])
    @pytest.mark.parametrize("view", [hello, ahello])
    def test_charges_a_rule_once(
        self, site: Callable[..., Site], middleware: bool, decorators: int, view: Callable[..., Any]
    ) -> None:
        rule = Rule("5/day", name="once", cost=2)
        with site(RULES=[rule] if middleware else [], middleware=middleware) as at:
            patterns = {"index": limited(at, *[rate_limit(rule)] * decorators, view=view)}
            with at.showing(**patterns):
                response = at.get()
                assert fields(response) == {
                    "RateLimit-Policy": [("once", {"q": 5, "w": DAY})],
                    "RateLimit": [("once", {"r": 3, "t": DAY // 5})],
                }
                assert at.consumed("once:127.0.0.1") == 2
                assert at.statuses(2) == [200, 429]
                assert at.consumed("once:127.0.0.1") == 4

    def test_views_with_the_same_limits_and_key_share_their_buckets(self, site: Callable[..., Site]) -> None:
        with site(middleware=False) as at:
            views = {path: limited(at, rate_limit("1/day", name=name)) for path, name in [("a", None), ("b", None)]}
            views["c"] = limited(at, rate_limit("1/day", name="c"))
            with at.showing(**views):
                assert [at.get(f"/{path}").status_code for path in "abc"] == [200, 429, 200]

    @pytest.mark.parametrize("name", ["dispatch", "get"])
    def test_limits_methods_of_class_based_views(self, site: Callable[..., Site], name: str) -> None:
        class Sync(View):
            def get(self, request: HttpRequest) -> HttpResponse:
                return HttpResponse(type(self).__name__)

        class Async(View):
            async def get(self, request: HttpRequest) -> HttpResponse:
                return HttpResponse(type(self).__name__)

        with site(middleware=False) as at:
            one: Any = Async if at.asynchronous else Sync
            view = method_decorator(rate_limit("1/day"), name=name)(one).as_view()
            with at.showing(index=view):
                first, second, other = at.get(), at.get(), at.get(method="DELETE")
        assert (first.status_code, first.content) == (200, one.__name__.encode())
        assert second.status_code == 429
        assert fields(first)["RateLimit"] == [("1/day", {"r": 0, "t": DAY})]
        assert other.status_code == (429 if name == "dispatch" else 405)

    def test_awaits_the_dispatch_of_an_async_class_without_blocking(self) -> None:
        seen: list[Any] = []

        @method_decorator(rate_limit("1/day"), name="dispatch")
        class Async(View):
            async def get(self, request: HttpRequest) -> HttpResponse:
                seen.append(request)
                return HttpResponse()

        with Site(asynchronous=True, middleware=False, views={"": Async.as_view()}) as at:
            assert at.statuses(2) == [200, 429]
        assert isinstance(seen[0].ratelimit.outcomes[0].bucket, AsyncBucket)

    def test_limits_what_as_view_gives(self, site: Callable[..., Site]) -> None:
        class Sync(View):
            def get(self, request: HttpRequest) -> HttpResponse:
                return HttpResponse()

        class Async(View):
            async def get(self, request: HttpRequest) -> HttpResponse:
                return HttpResponse()

        with site(middleware=False) as at:
            one: Any = Async if at.asynchronous else Sync
            with at.showing(index=rate_limit("1/day")(one.as_view())):
                assert at.statuses(2) == [200, 429]

    def test_leaves_it_to_django_to_complain_of_what_is_no_response(self) -> None:
        def nothing(_: HttpRequest) -> None:
            return None

        with Site(asynchronous=False, middleware=False, views={"": rate_limit("1/day")(nothing)}) as at:
            response = at.get()
        assert "didn't return an HttpResponse" in str(response.exc_info[1])

    def test_refuses_what_it_cannot_limit(self) -> None:
        with pytest.raises(InvalidArgumentError, match="method_decorator"):
            rate_limit("1/day")(View)
        with pytest.raises(InvalidArgumentError, match=r"settings already; .key. goes there"):
            rate_limit(Rule("1/day"), key=user())
        with pytest.raises(InvalidConfigurationError, match="unknown unit"):
            rate_limit("1/fortnight")

        class Undecorated(View):
            @rate_limit("1/day")
            def get(self, request: HttpRequest) -> HttpResponse:
                return HttpResponse()

        with pytest.raises(InvalidArgumentError, match="a method is limited by method_decorator"):
            Undecorated.as_view()(RequestFactory().get("/"))


class TestExempt:
    def views(self, site: Site) -> dict[str, Any]:
        """One of each kind, as an application would have it."""

        class Plain(View):
            def get(self, _: HttpRequest) -> HttpResponse:
                return HttpResponse("hello")

        class Async(View):
            async def get(self, _: HttpRequest) -> HttpResponse:
                return HttpResponse("hello")

        kind: Any = Async if site.asynchronous else Plain
        by_method: Any = method_decorator(exempt, name="dispatch")
        decorated = by_method(type("Decorated", (kind,), {}))
        return {
            "function": exempt(Views().of(asynchronous=site.asynchronous)),
            "class": decorated.as_view(),
            "around": exempt(kind.as_view()),
            "not": kind.as_view(),
        }

    @pytest.mark.parametrize("kind", ["function", "class", "around"])
    def test_the_rules_of_the_middleware_do_not_count_for_a_view(self, site: Callable[..., Site], kind: str) -> None:
        with site(RULES=["1/minute"]) as one, one.showing(**self.views(one)):
            assert one.statuses(3, f"/{kind}") == [200, 200, 200]
            assert "RateLimit" not in one.get(f"/{kind}")
            assert len(one.memory) == 0
            assert one.statuses(2, "/not") == [200, 429]
            assert one.statuses(1, "/nowhere") == [429]
            assert one.statuses(1, f"/{kind}") == [200]

    @pytest.mark.parametrize("inside", [True, False])
    def test_the_limits_of_its_own_decorators_count(self, site: Callable[..., Site], inside: bool) -> None:
        with site(RULES=["1/minute"]) as one:
            limit = rate_limit("2/minute")
            of_its_own = Views().of(asynchronous=one.asynchronous)
            view = limited(one, *((limit, exempt) if inside else (exempt, limit)), view=of_its_own)
            with one.showing(own=view):
                assert one.statuses(3, "/own") == [200, 200, 429]

    def test_refuses_what_is_not_a_view(self) -> None:
        wrong: Any
        for wrong in (View, "view"):
            with pytest.raises(InvalidArgumentError, match="exempt must be given a view that is a function; got"):
                exempt(wrong)


class TestSetting:
    @pytest.mark.parametrize(
        ("ratelimit", "complaint"),
        [
            ("100/minute", "RATELIMIT must be a dict"),
            ({"RULE": []}, "RATELIMIT knows URL, RULES, .* and not 'RULE'"),
            ({"RULES": "100/minute"}, r"RATELIMIT\['RULES'\] must be a list; got '100/minute'"),
            ({"RULES": ["100/fortnight"]}, r"RATELIMIT\['RULES'\] is not valid: unknown unit of time 'fortnight'"),
            ({"RULES": [7]}, r"RATELIMIT\['RULES'\] is not valid"),
            ({"RULES": ["nowhere.at.all"]}, r"RATELIMIT\['RULES'\] names what cannot be imported: No module"),
            ({"RULES": [Rule("1/day", name="a"), Rule("2/day", name="a")]}, "rules of one name must have the same"),
            ({"CLIENT_IP": "203.0.113.7"}, r"RATELIMIT\['CLIENT_IP'\] must be a key"),
            ({"ANSWERS": {}}, r"RATELIMIT\['ANSWERS'\] must be an Answers"),
            ({"ON_ERROR": "local"}, r"RATELIMIT\['ON_ERROR'\] must be an OnError, 'allow', 'deny' or 'raise'"),
            ({"ENABLED": "False"}, r"RATELIMIT\['ENABLED'\] must be True or False; got 'False'"),
            ({"URL": 6379}, r"RATELIMIT\['URL'\] must be a str"),
            ({"MANAGER": "redis://localhost"}, r"RATELIMIT\['MANAGER'\] must be a ProxyManager"),
            (
                {"ASYNC_MANAGER": "ratelimit.ProxyManager"},
                r"RATELIMIT\['ASYNC_MANAGER'\] must be an? AsyncProxyManager",
            ),
        ],
    )
    def test_that_cannot_be_is_refused_when_the_server_starts(self, ratelimit: Any, complaint: str) -> None:
        from django.core.wsgi import get_wsgi_application

        with (
            override_settings(MIDDLEWARE=[django_site.LIMITING], RATELIMIT=ratelimit),
            pytest.raises(ImproperlyConfigured, match=complaint),
        ):
            get_wsgi_application()

    def test_may_name_things_by_dotted_paths(self, site: Callable[..., Site]) -> None:
        here = __name__
        with site(
            RULES=[f"{here}.LOGIN", f"{here}.LIMITS"],
            CLIENT_IP=f"{here}.CLIENT",
            ANSWERS=f"{here}.Plain",
            ON_ERROR=f"{here}.policy",
        ) as at:
            response = at.get(headers={"X-Forwarded-For": "203.0.113.7"})
            assert current().limiters.get("on_error") is policy
            assert current().rules[0] is LOGIN
        assert response["X-RateLimit-Limit"] == "3"
        assert "RateLimit" not in response
        assert (at.consumed("login:203.0.113.7"), at.consumed("|5/day|ip:203.0.113.7")) == (1, 1)

    def test_counts_at_once_when_it_is_overridden(self, site: Callable[..., Site]) -> None:
        with site(RULES=["1/day"]) as at:
            assert at.statuses(2) == [200, 429]
            with override_settings(RATELIMIT={"MANAGER": at.manager, "ASYNC_MANAGER": at.amanager}):
                assert at.statuses(2) == [200, 200]
            assert at.get().status_code == 429

    def test_switches_everything_off(self, site: Callable[..., Site]) -> None:
        views = Views()
        with site(RULES=["1/day"], ENABLED=False) as at:
            view = rate_limit("1/day")(views.of(asynchronous=at.asynchronous))
            with at.showing(index=view):
                responses = [at.get() for _ in range(3)]
        assert [response.status_code for response in responses] == [200, 200, 200]
        assert fields(responses[0]) == {}
        assert views.seen[0].ratelimit == HttpDecision()  # type: ignore[attr-defined]
        assert at.consumed("|1/day|ip:127.0.0.1") == 0

    def test_may_be_absent(self) -> None:
        from django.conf import settings

        with override_settings(RATELIMIT={}):
            del settings.RATELIMIT
            current.cache_clear()
            assert current().rules == ()
        current.cache_clear()

    @pytest.mark.parametrize(
        ("policy", "status"), [(OnError.ALLOW, 200), ("allow", 200), ("deny", 503), ("raise", 500), (None, 503)]
    )
    def test_says_what_is_answered_where_the_store_fails(
        self, site: Callable[..., Site], policy: Any, status: int
    ) -> None:
        store = ScriptedStore()
        with site(RULES=["1/day"], store=store, ON_ERROR=policy) as at:
            store.fail()
            assert at.get().status_code == status

    def test_denies_by_default_where_the_store_of_the_url_fails(self, site: Callable[..., Site]) -> None:
        with site() as at, override_settings(RATELIMIT={"URL": "redis://localhost:1/0", "RULES": ["1/day"]}):
            response = at.get()
        assert response.status_code == 503
        assert response["Retry-After"] == "1"
        assert json.loads(response.content)["type"].endswith("#temporary-reduced-capacity")

    def test_lets_no_client_choose_its_bucket_by_a_header(self, site: Callable[..., Site]) -> None:
        with site(RULES=["2/day"]) as at:
            codes = [at.get(headers={"X-Forwarded-For": f"203.0.113.{n}"}).status_code for n in range(3)]
        assert codes == [200, 200, 429]

    def test_tells_clients_apart_behind_proxies_in_all_rules_without_a_key(self, site: Callable[..., Site]) -> None:
        own = Rule("3/day", name="own")
        with site(RULES=["2/day", own], CLIENT_IP=client_ip(hops=1)) as at:
            view = limited(at, rate_limit("4/day"))
            with at.showing(index=view):
                at.get(headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.7"})
        place = f"{view.__module__}.{view.__qualname__}"
        assert [at.consumed(f"{name}:203.0.113.7") for name in ("|2/day|ip", "own", f"{place}|4/day|ip")] == [1, 1, 1]
        assert own.key == client_ip()  # as it was before the setting was looked at

    def test_leaves_a_rule_the_key_that_it_has(self, site: Callable[..., Site]) -> None:
        rule = Rule("3/day", name="own", key=client_ip(hops=2))
        with site(RULES=[rule], CLIENT_IP=client_ip(hops=1)) as at:
            at.get(headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.7"})
            assert rule.key == client_ip(hops=2)
        assert at.consumed("own:198.51.100.1") == 1

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_wants_a_manager_for_each_kind_of_code_that_there_is(self, asynchronous: bool) -> None:
        with Site(asynchronous=asynchronous, RULES=["1/day"]) as at:
            given = {"MANAGER": at.manager} if asynchronous else {"ASYNC_MANAGER": at.amanager}
            wanted = "ASYNC_MANAGER" if asynchronous else "MANAGER"
            with override_settings(RATELIMIT={"RULES": ["1/day"]} | given):
                response = at.get()
        assert f"RATELIMIT['{wanted}'] is needed, or URL" in str(response.exc_info[1])


LOGIN = Rule("3/day", name="login")
LIMITS = "5/day"
CLIENT = client_ip(hops=1)


class Plain(Answers):
    def __init__(self) -> None:
        super().__init__(standard=False, x_ratelimit="delta")


def policy(*_: object) -> OnError:
    return OnError.ALLOW


@pytest.mark.redis
def test_async_views_under_wsgi_decide_in_event_loops_of_their_own(redis_url: str) -> None:
    view = rate_limit("20/day", name="loops")(ahello)
    urls = django_site.Urls({"": view})
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[], RATELIMIT={"URL": patient(redis_url)}):
        codes = [Client().get("/").status_code for _ in range(30)]
    assert codes == [200] * 20 + [429] * 10
    with ProxyManager.from_url(redis_url, "20/day") as manager:
        assert manager.snapshot("ratelimit:loops:127.0.0.1").consumed_tokens == 20


PROGRAM = """
import sys

import django
from django.conf import settings
from django.http import HttpResponse
from django.urls import path

from ratelimit.integrations.django import rate_limit
from ratelimit.integrations.http import Rule

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["ratelimit.integrations.django.RateLimitMiddleware"],
    RATELIMIT={"RULES": [Rule("50/day", name="all")]},
)
django.setup()


@rate_limit(Rule("50/day", name="all"))
def view(request):
    return HttpResponse("hello")


@rate_limit(Rule("50/day", name="all"))
async def aview(request):
    return HttpResponse("hello")


urlpatterns = [path("sync", view), path("async", aview)]
"""
WSGI = f"{PROGRAM}\nfrom django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n"
ASGI = f"{PROGRAM}\nfrom django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n"


@pytest.mark.redis
def test_processes_of_gunicorn_admit_together_what_the_limit_says(redis_url: str, tmp_path: Path) -> None:
    with gunicorn(WSGI, tmp_path, redis_url=patient(redis_url)) as address:
        assert statuses(address, "/sync", 120) == {200: 50, 429: 70}
    with ProxyManager.from_url(redis_url, "50/day") as manager:
        assert manager.snapshot("ratelimit:all:127.0.0.1").consumed_tokens == 50


@pytest.mark.redis
def test_the_first_example_of_its_page_is_served_as_it_stands(redis_url: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/django.md").read_text()
    _, _, program = page.partition("```python django\n# hello.py\n")
    program = program.partition("```")[0].replace("redis://localhost:6379/0", patient(redis_url))
    with gunicorn(program, tmp_path, redis_url="redis://localhost:1/0") as address:
        assert statuses(address, "/", 15) == {200: 10, 429: 5}


@pytest.mark.redis
@pytest.mark.parametrize("path", ["/sync", "/async"])
def test_tasks_of_uvicorn_admit_together_what_the_limit_says(redis_url: str, tmp_path: Path, path: str) -> None:
    with program(ASGI, tmp_path, redis_url=patient(redis_url)) as address:
        assert statuses(address, path, 120) == {200: 50, 429: 70}
    with ProxyManager.from_url(redis_url, "50/day") as manager:
        assert manager.snapshot("ratelimit:all:127.0.0.1").consumed_tokens == 50
