"""A rule for a route is about the requests that the framework's router sends there, and about no others.

Each application has a route ``/login`` and a rule for it, and is asked by real servers for whatever might be taken for
that route. Where the answer is that of the endpoint, it has the header fields of the rule; else it has none.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("gunicorn")
pytest.importorskip("flask")
pytest.importorskip("django")
pytest.importorskip("fastapi")

import asyncio
from functools import partial

from tests.integrations.gunicorns import gunicorn
from tests.integrations.uvicorns import program, serving

REACHED = {"x-reached": "yes"}

TARGETS = {
    "as it is": ("/login", 200, 200, 200),
    "with a query": ("/login?next=/", 200, 200, 200),
    "newline at the end": ("/login%0a", 200, 404, 404),
    "slash at the end": ("/login/", 307, 404, 404),
    "encoded slash at the end": ("/login%2f", 307, 404, 404),
    "slash too many": ("//login", 404, 200, 404),
    "slashes within": ("/users//7", 404, 308, 404),
    "encoded letter": ("/%6cogin", 200, 200, 200),
    "encoded slash within": ("/users%2f7", 200, 200, 200),
    "dot segment": ("/./login", 404, 404, 404),
    "two dots": ("/other/../login", 404, 404, 404),
    "other case": ("/LOGIN", 404, 404, 404),
    "parameters": ("/login;a=b", 404, 404, 404),
    "absolute form": ("http://127.0.0.1/login", 200, 200, 200),
    "with a parameter": ("/users/7", 200, 200, 200),
    "nothing": ("/nowhere", 404, 404, 404),
    "a route of its own": ("/users/me", 200, 200, 200),
}
"""What the application is asked for, and the status that Starlette or FastAPI, Flask, and Django answer it with.

The rule is for ``/login`` and ``/users/{id}``; there is ``/users/me`` besides. docs/http.md shows the same.
"""

RULES = 'Rule("1000/hour", name="login", routes=["/login", "/users/{id}"], methods=["GET", "POST"])'

STARLETTE = f"""
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from ratelimit.integrations.asgi import RateLimitMiddleware
from ratelimit.integrations.http import Rule


async def reached(request):
    return PlainTextResponse("reached", headers={REACHED!r})


async def me(request):
    return PlainTextResponse("me")


routes = [
    Route("/login", reached, methods=["GET", "POST"]),
    Route("/users/me", me, methods=["GET", "POST"]),
    Route("/users/{{id}}", reached, methods=["GET", "POST"]),
]
"""

ASGI = {
    "Starlette": f"""{STARLETTE}
app = Starlette(routes=routes, middleware=[Middleware(RateLimitMiddleware, {RULES}, manager="memory://")])
""",
    "around Starlette": f"""{STARLETTE}
app = RateLimitMiddleware(Starlette(routes=routes), {RULES}, manager="memory://")
""",
    "FastAPI": f"""
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from ratelimit.integrations.fastapi import configure
from ratelimit.integrations.http import Rule

app = FastAPI()
configure(app, {RULES}, manager="memory://")


async def reached():
    return PlainTextResponse("reached", headers={REACHED!r})


async def me():
    return PlainTextResponse("me")


app.add_api_route("/login", reached, methods=["GET", "POST"])
app.add_api_route("/users/me", me, methods=["GET", "POST"])
app.add_api_route("/users/{{id}}", reached, methods=["GET", "POST"])
""",
}

FLASK = f"""
from flask import Flask

from ratelimit.integrations.flask import RateLimiter
from ratelimit.integrations.http import Rule
from ratelimit.integrations.wsgi import RateLimitMiddleware

app = application = Flask(__name__)


def reached(id=None):
    return "reached", 200, {REACHED!r}


app.add_url_rule("/login", "login", reached, methods=["GET", "POST"])
app.add_url_rule("/users/me", "me", lambda: "me", methods=["GET", "POST"])
app.add_url_rule("/users/<id>", "user", reached, methods=["GET", "POST"])
"""

DJANGO = f"""
import django
from django.conf import settings
from django.http import HttpResponse
from django.urls import path

from ratelimit.integrations.http import Rule

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["ratelimit.integrations.django.RateLimitMiddleware"],
    RATELIMIT={{"URL": "memory://", "RULES": [{RULES}]}},
)
django.setup()


def reached(request, id=None):
    return HttpResponse("reached", headers={REACHED!r})


def me(request):
    return HttpResponse("me")


urlpatterns = [path("login", reached), path("users/me", me), path("users/<str:id>", reached)]
"""

WSGI = {
    "Flask": f"{FLASK}\nRateLimiter({RULES}, app=app, manager='memory://')\n",
    "around Flask": f"{FLASK}\napplication = RateLimitMiddleware(app.wsgi_app, {RULES}, manager='memory://')\n",
    "Django": f"{DJANGO}\nfrom django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n",
}


class Answer(NamedTuple):
    """What became of a request: whether the endpoint was reached, and whether the rule was about it."""

    status: int
    reached: bool
    limited: bool
    text: str


def asked(address: tuple[str, int], method: str, target: str) -> Answer:
    """Send a request as it is written."""
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        text = b""
        while data := connection.recv(65536):
            text += data
    fields = text.partition(b"\r\n\r\n")[0].lower()
    status = int(text.split(None, 2)[1])
    return Answer(status, b"\r\nx-reached:" in fields, b"\r\nratelimit:" in fields, text.decode("latin-1"))


def check(address: tuple[str, int], column: int, *, absolute_form: int = 200) -> None:
    """Ask for every target, by every method that a route for GET and POST may be asked by."""
    for name, (target, *statuses) in TARGETS.items():
        expected = absolute_form if name == "absolute form" else statuses[column]
        for method in ("GET", "POST", "HEAD"):
            answer = asked(address, method, target)
            if method == "HEAD":
                # FastAPI does not send HEAD to where GET goes. A rule for GET is about it all the same.
                assert answer.limited or not answer.reached, f"{name}: {answer.text}"
                continue
            assert answer.limited == answer.reached, f"{method} {name}: {answer.text}"
            assert answer.status == expected, f"{method} {name}: {answer.text}"
            assert answer.reached == (expected == 200 and name != "a route of its own"), (
                f"{method} {name}: {answer.text}"
            )


def made(text: str, name: str) -> Any:
    """What a program calls by this name."""
    namespace: dict[str, Any] = {"__name__": f"tests.integrations.served_{name}"}
    exec(text, namespace)
    return namespace[name]


@pytest.mark.parametrize("text", ASGI.values(), ids=ASGI)
@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_of_asgi(text: str, http: str) -> None:
    async with serving(made(text, "app"), http=http) as address:
        await asyncio.to_thread(partial(check, address, 0, absolute_form=200 if http == "httptools" else 404))


@pytest.mark.parametrize("framework", WSGI)
def test_of_wsgi(framework: str, tmp_path: Path) -> None:
    with gunicorn(WSGI[framework], tmp_path, redis_url="memory://") as address:
        check(address, 2 if framework == "Django" else 1)


def test_of_django_under_asgi(tmp_path: Path) -> None:
    text = f"{DJANGO}\nfrom django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n"
    with program(text, tmp_path, redis_url="memory://") as address:
        check(address, 2)
