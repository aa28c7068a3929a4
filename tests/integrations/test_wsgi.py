from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from io import BytesIO
from pathlib import Path
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import http_sf
import pytest

from ratelimit import InvalidConfigurationError, OnError, ProxyManager, StoreUnavailableError
from ratelimit.integrations.http import Answers, Limiter, Rule, header
from ratelimit.integrations.wsgi import RateLimitMiddleware, decision_of, http_request
from ratelimit.testing import ScriptedStore
from tests.integrations.gunicorns import gunicorn, statuses
from tests.integrations.requests_of import Limits
from tests.support.workers import patient


@dataclass
class Answer:
    status: int
    headers: Message
    body: bytes

    def parsed(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """A field as RFC 9651 has it."""
        (value,) = self.headers.get_all(name) or []
        return http_sf.parse(value.encode(), tltype="list")  # type: ignore[return-value]  # of strings


def environment(**variables: Any) -> WSGIEnvironment:
    environ: WSGIEnvironment = {"REMOTE_ADDR": "192.0.2.1", "QUERY_STRING": "", "SERVER_PROTOCOL": "HTTP/1.1"}
    setup_testing_defaults(environ)
    return environ | variables


def served(application: WSGIApplication, **variables: Any) -> Answer:
    """The answer as it is on the wire of a server of the standard library."""
    wire = BytesIO()
    environ = environment(**variables)
    handler = SimpleHandler(environ["wsgi.input"], wire, sys.stderr, environ)
    handler.http_version = "1.1"
    handler.run(application)
    head, _, body = wire.getvalue().partition(b"\r\n\r\n")
    line, _, fields = head.partition(b"\r\n")
    return Answer(int(line.split()[1]), BytesParser().parsebytes(fields), body)


def hello(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def limiting(application: WSGIApplication, *rules: Any, **settings: Any) -> tuple[WSGIApplication, Limits]:
    """An application with the middleware before it, both of which are watched."""
    stored = Limits()
    settings.setdefault("manager", stored.manager)
    return validator(RateLimitMiddleware(validator(application), *rules, **settings)), stored


def test_ten_requests_are_admitted_and_five_refused() -> None:
    seen: list[str] = []

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(environ["PATH_INFO"])
        return hello(environ, start_response)

    limited, stored = limiting(application, "10/minute")
    answers = [served(limited, PATH_INFO=f"/{number}") for number in range(15)]
    assert [answer.status for answer in answers] == [200] * 10 + [429] * 5
    assert seen == [f"/{number}" for number in range(10)]
    assert [answer.parsed("RateLimit") for answer in answers[:10]] == [
        [("10/minute", {"r": left, "t": 6})] for left in range(9, -1, -1)
    ]
    assert answers[14].parsed("RateLimit-Policy") == [("10/minute", {"q": 10, "w": 60})]
    assert answers[14].headers["Retry-After"] == "6"
    assert answers[14].headers["Content-Type"] == "application/problem+json"
    assert json.loads(answers[14].body)["violated-policies"] == ["10/minute"]
    assert "Retry-After" not in answers[0].headers
    assert stored.consumed("|10/minute|ip:192.0.2.1") == 10


def test_the_body_of_a_request_that_is_refused_is_not_read() -> None:
    limited, _ = limiting(hello, Rule("1/minute", cost=2))
    body = BytesIO(b"x" * 100)
    assert served(limited, **{"REQUEST_METHOD": "POST", "wsgi.input": body}).status == 429
    assert body.tell() == 0


def test_an_answer_to_head_has_no_body() -> None:
    limited, _ = limiting(hello, Rule("1/minute", cost=2))
    with_body, without = served(limited), served(limited, REQUEST_METHOD="HEAD")
    assert (without.status, without.body) == (429, b"")
    assert without.headers["Content-Length"] == str(len(with_body.body))


@pytest.mark.parametrize(
    ("rule", "policy", "status"),
    [
        (Rule("1/minute", key=header("x-tenant")), None, 400),
        ("1/minute", OnError.DENY, 503),
        ("1/minute", OnError.ALLOW, 200),
    ],
)
def test_a_request_without_a_key_and_a_store_that_fails_have_answers_of_their_own(
    rule: Any, policy: Any, status: int
) -> None:
    store = ScriptedStore()
    store.fail(times=10)
    limited, _ = limiting(hello, rule, manager=ProxyManager(store), on_error=policy)
    answer = served(limited)
    assert answer.status == status
    assert "RateLimit" not in answer.headers


def test_where_the_policy_is_to_raise_the_server_gets_the_error() -> None:
    store = ScriptedStore()
    store.fail()
    limited = RateLimitMiddleware(hello, "1/minute", manager=ProxyManager(store, on_error=OnError.RAISE))
    with pytest.raises(StoreUnavailableError):
        limited(environment(), lambda *_: lambda _: None)


def test_answers_may_be_replaced() -> None:
    class Teapot(Answers):
        def problem(self, decision: Any) -> dict[str, Any]:
            return {"status": 499}

    limited, _ = limiting(hello, Rule("1/minute", cost=2), answers=Teapot(x_ratelimit="delta"))
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], object]:
        started.append((status, dict(headers)["X-RateLimit-Limit"]))
        return lambda _: None

    answer: Any = limited(environment(), start_response)
    assert list(answer) == [b'{"status": 499}']
    answer.close()
    assert started == [("499 Unknown", "1")]


def test_two_rules_of_one_name_have_the_same_limits() -> None:
    with pytest.raises(InvalidConfigurationError, match="'api'"):
        RateLimitMiddleware(hello, Rule("1/s", name="api"), Rule("2/s", name="api"))


class TestAnswersOfTheApplication:
    def test_keep_the_fields_that_it_has_set(self) -> None:
        own = [
            ("Content-Type", "text/plain"),
            ("ratelimit", '"mine";r=1'),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
        ]

        def application(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            start_response("200 OK", own)
            return [b""]

        limited, _ = limiting(application, "2/minute")
        answer = served(limited)
        assert answer.parsed("RateLimit") == [("mine", {"r": 1})]
        assert answer.parsed("RateLimit-Policy") == [("2/minute", {"q": 2, "w": 60})]
        assert answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
        assert len(own) == 4

    def test_tell_what_is_decided_when_they_start(self) -> None:
        stored = Limits()
        manager: Any = stored.manager
        inner = Limiter("100/hour", "2/minute", manager=manager)

        def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            assert [outcome.rule.name for outcome in decision_of(environ).outcomes] == ["2/minute"]
            inner.decide(http_request(environ))
            return hello(environ, start_response)

        limited, _ = limiting(application, "2/minute", manager=manager)
        assert served(limited).parsed("RateLimit") == [
            ("2/minute", {"r": 1, "t": 30}),
            ("100/hour", {"r": 99, "t": 36}),
        ]
        assert [stored.consumed(f"|{name}|ip:192.0.2.1") for name in ("2/minute", "100/hour")] == [1, 1]

    def test_pass_as_they_come(self) -> None:
        made: list[int] = []
        closed: list[bool] = []

        def application(_environ: WSGIEnvironment, start_response: StartResponse) -> Generator[bytes]:
            start_response("200 OK", [("Content-Type", "text/plain")])
            try:
                for number in range(3):
                    made.append(number)
                    yield b"%d" % number
            finally:
                closed.append(True)

        limited, _ = limiting(application, "2/minute")
        started: list[str] = []

        def start_response(_status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], object]:
            started.extend(name for name, _ in headers)
            return lambda _: None

        body: Any = limited(environment(), start_response)
        assert started == []
        assert next(body) == b"0"
        assert started == ["Content-Type", "RateLimit-Policy", "RateLimit"]
        assert made == [0]
        body.close()
        assert (made, closed) == ([0], [True])

    def test_are_the_very_objects(self) -> None:
        file = FileWrapper(BytesIO(b"file"))  # which servers know, and send in ways of their own
        manager: Any = Limits().manager
        limited = RateLimitMiddleware(lambda *_: file, "2/minute", manager=manager)
        assert limited(environment(), lambda *_: lambda _: None) is file

    def test_may_be_written(self) -> None:
        def application(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            write = start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
            write(b"one")
            return [b"two"]

        limited, _ = limiting(application, "2/minute")
        answer = served(limited)
        assert (answer.body, answer.headers["RateLimit"]) == (b"onetwo", '"2/minute";r=1;t=30')

    def test_may_be_replaced_after_an_error(self) -> None:
        def application(_environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            start_response("200 OK", [("Content-Type", "text/plain"), ("X-Never", "sent")])
            try:
                _ = 1 / 0
            except ZeroDivisionError:
                start_response("500 Oh", [("Content-Type", "text/plain")], sys.exc_info())
            return [b"oh"]

        limited, _ = limiting(application, "2/minute")
        answer = served(limited)
        assert (answer.status, answer.body, "X-Never" in answer.headers) == (500, b"oh", False)
        assert answer.parsed("RateLimit") == [("2/minute", {"r": 1, "t": 30})]

    def test_end_with_the_error_where_they_have_begun(self) -> None:
        seen: list[BaseException] = []

        def application(_environ: WSGIEnvironment, start_response: StartResponse) -> Generator[bytes]:
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield b"begun"
            try:
                _ = 1 / 0
            except ZeroDivisionError as error:
                try:
                    start_response("500 Oh", [("Content-Type", "text/plain")], sys.exc_info())
                except ZeroDivisionError as raised:
                    seen.append(raised)
                    assert raised is error

        limited, _ = limiting(application, "2/minute")
        assert served(limited).body == b"begun"
        assert len(seen) == 1


class TestTwoMiddlewares:
    def test_charge_for_the_same_rule_once(self) -> None:
        stored = Limits()
        manager: Any = stored.manager
        rule = Rule("5/minute", name="api")
        inner = RateLimitMiddleware(hello, rule, "9/minute", manager=manager)
        answer = served(RateLimitMiddleware(inner, rule, Rule("5/minute", name="api"), manager=manager))
        assert answer.parsed("RateLimit") == [("api", {"r": 4, "t": 12}), ("9/minute", {"r": 8, "t": 7})]
        assert stored.consumed("api:192.0.2.1") == 1

    def test_give_back_what_was_paid_to_the_one_where_the_other_refuses(self) -> None:
        stored = Limits()
        manager: Any = stored.manager
        limited = RateLimitMiddleware(
            RateLimitMiddleware(hello, "1/minute", manager=manager), "9/minute", manager=manager
        )
        answers = [served(limited) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 429, 429]
        assert answers[2].parsed("RateLimit") == [("1/minute", {"r": 0, "t": 60})]
        assert answers[2].headers.get_all("Retry-After") == ["60"]
        assert stored.consumed("|9/minute|ip:192.0.2.1") == 1


class TestRequest:
    @pytest.mark.parametrize(
        ("variables", "path"),
        [
            ({"PATH_INFO": "/a b"}, "/a b"),
            ({"PATH_INFO": "/gr\xc3\xbc\xc3\x9fe"}, "/grüße"),
            ({"PATH_INFO": "/\xff"}, "/\N{REPLACEMENT CHARACTER}"),
            ({"PATH_INFO": "/\u1234"}, "/?"),
            ({"PATH_INFO": "//search"}, "/search"),
            ({"PATH_INFO": "", "SCRIPT_NAME": "/mounted"}, "/"),
            ({"PATH_INFO": "/a", "SCRIPT_NAME": "/mounted", "QUERY_STRING": "q"}, "/a"),
        ],
    )
    def test_has_the_path_that_the_application_sees(self, variables: dict[str, str], path: str) -> None:
        assert http_request(environment(**variables)).path == path

    def test_has_headers_by_their_names(self) -> None:
        environ = environment(HTTP_X_API_KEY="k", CONTENT_TYPE="text/plain", CONTENT_LENGTH="")
        request = http_request(environ)
        assert [request.header(name) for name in ("x-api-key", "content-type", "content-length", "cookie")] == [
            *("k", "text/plain", None, None)
        ]

    @pytest.mark.parametrize(("address", "peer"), [("192.0.2.9", "192.0.2.9"), ("", None), (None, None)])
    def test_has_a_peer_unless_it_comes_through_a_unix_socket(self, address: str | None, peer: str | None) -> None:
        environ = environment(REMOTE_ADDR=address)
        if address is None:
            del environ["REMOTE_ADDR"]
        assert http_request(environ).peer == peer

    def test_has_its_method_in_capitals(self) -> None:
        assert http_request(environment(REQUEST_METHOD="post")).method == "POST"

    def test_of_which_nothing_is_decided_may_go_on(self) -> None:
        decision = decision_of(environment())
        assert decision
        assert decision.outcomes == ()


def test_no_framework_is_imported() -> None:
    program = "import sys, ratelimit.integrations.wsgi; print({'flask', 'werkzeug', 'django'} & sys.modules.keys())"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


PROGRAM = """
import os

from ratelimit import ProxyManager
from ratelimit.integrations.http import Rule
from ratelimit.integrations.wsgi import RateLimitMiddleware

manager = ProxyManager.from_url(os.environ["RATELIMIT_URL"], "50/day", timeout=60)
assert manager.try_consume("opens a connection before the fork")


def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


application = RateLimitMiddleware(hello, Rule("50/day", name="all"), manager=manager)
"""


@pytest.mark.redis
def test_processes_admit_together_what_the_limit_says(redis_url: str, tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    with gunicorn(PROGRAM, tmp_path, redis_url=patient(redis_url)) as address:
        assert statuses(address, "/", 120) == {200: 50, 429: 70}
    with ProxyManager.from_url(redis_url, "50/day") as manager:
        assert manager.snapshot("all:127.0.0.1").consumed_tokens == 50
