"""Instrumentation of the frameworks sees with the limiter all that it sees without it.

Each application is instrumented and asked twice as often as its limit allows, in a process of its own, because what
instruments a framework replaces parts of it. What is seen of the requests that are admitted must not differ from what
is seen without a limit; those that are refused must be seen as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in (
    *("opentelemetry.instrumentation.fastapi", "opentelemetry.instrumentation.starlette", "sentry_sdk"),
    *("opentelemetry.instrumentation.flask", "opentelemetry.instrumentation.django", "django_prometheus"),
    *("prometheus_fastapi_instrumentator", "prometheus_flask_exporter"),
):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]

OPENTELEMETRY = """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))


def seen():
    return [
        [span.name, str(span.kind), {name: value for name, value in span.attributes.items() if "port" not in name}]
        for span in exporter.get_finished_spans()
    ]
"""

SENTRY = """
import sentry_sdk
from sentry_sdk.transport import Transport


class Kept(Transport):
    events = []

    def capture_envelope(self, envelope):
        self.events.extend(item.payload.json for item in envelope.items if item.type in ("event", "transaction"))


sentry_sdk.init("https://public@localhost/1", transport=Kept, traces_sample_rate=1.0)


def seen():
    return [
        [event["type"], event["transaction"], event["contexts"].get("response", {}).get("status_code"),
         event["contexts"]["trace"].get("op")]
        for event in Kept.events
    ]
"""

PROMETHEUS = """
from prometheus_client import REGISTRY


def seen():
    return [
        [sample.name, sample.labels, sample.value]
        for metric in REGISTRY.collect() for sample in metric.samples
        if sample.name.endswith("_total") and ("http" in sample.name or "django" in sample.name)
    ]
"""

FASTAPI = """
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

app = FastAPI()
dependencies = []
if LIMITED:
    from ratelimit.integrations.fastapi import RateLimit, configure

    configure(app, "100/minute", manager="memory://")
    dependencies = [Depends(RateLimit("2/minute"))]


@app.get("/items/{number}", dependencies=dependencies)
async def item(number: int) -> int:
    return number


INSTRUMENT
client = TestClient(app)


def ask():
    return client.get("/items/7").status_code
"""

STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient


async def item(request):
    return PlainTextResponse(request.path_params["number"])


app = Starlette(routes=[Route("/items/{number}", item)])
if LIMITED:
    from ratelimit.integrations.asgi import RateLimitMiddleware

    app.add_middleware(RateLimitMiddleware, "2/minute", manager="memory://")
INSTRUMENT
client = TestClient(app)


def ask():
    return client.get("/items/7").status_code
"""

FLASK = """
from flask import Flask

app = Flask(__name__)
INSTRUMENT
limit = lambda view: view
if LIMITED:
    from ratelimit.integrations.flask import RateLimiter

    limit = RateLimiter("100/minute", app=app, manager="memory://").limit("2/minute")


@app.get("/items/<number>")
@limit
def item(number):
    return number


client = app.test_client()


def ask():
    return client.get("/items/7").status_code
"""

DJANGO = """
import django
from django.conf import settings
from django.http import HttpResponse
from django.urls import path
from werkzeug.test import Client

MIDDLEWARE = []
INSTRUMENT
if LIMITED:
    MIDDLEWARE.append("ratelimit.integrations.django.RateLimitMiddleware")
settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django_prometheus"],
    MIDDLEWARE=[*BEFORE, *MIDDLEWARE, *AFTER],
    RATELIMIT={"URL": "memory://", "RULES": ["2/minute"]},
)
django.setup()


def item(request, number):
    return HttpResponse(number)


urlpatterns = [path("items/<int:number>", item)]
INSTRUMENT_AFTER
from django.core.wsgi import get_wsgi_application

client = Client(get_wsgi_application())


def ask():
    return client.get("/items/7", environ_overrides={"REMOTE_ADDR": "192.0.2.1"}).status_code
"""

ASKED = """
import json

statuses = [ask() for _ in range(2)]
first = seen()
statuses += [ask() for _ in range(2)]
print(json.dumps([statuses, first, seen()]))
"""

NEITHER = "BEFORE, AFTER = [], []"
OTEL_OF = "from opentelemetry.instrumentation.{0} import {1}Instrumentor\n{1}Instrumentor()"
PROGRAMS = {
    "OpenTelemetry, FastAPI": (
        OPENTELEMETRY,
        FASTAPI,
        OTEL_OF.format("fastapi", "FastAPI") + ".instrument_app(app, tracer_provider=provider)",
    ),
    "OpenTelemetry, Starlette": (
        OPENTELEMETRY,
        STARLETTE,
        OTEL_OF.format("starlette", "Starlette") + ".instrument_app(app, tracer_provider=provider)",
    ),
    "OpenTelemetry, Flask": (
        OPENTELEMETRY,
        FLASK,
        OTEL_OF.format("flask", "Flask") + ".instrument_app(app, tracer_provider=provider)",
    ),
    "OpenTelemetry, Django": (
        OPENTELEMETRY,
        DJANGO,
        NEITHER,
        OTEL_OF.format("django", "Django") + ".instrument(tracer_provider=provider)",
    ),
    "Sentry, FastAPI": (SENTRY, FASTAPI, ""),
    "Sentry, Starlette": (SENTRY, STARLETTE, ""),
    "Sentry, Flask": (SENTRY, FLASK, ""),
    "Sentry, Django": (SENTRY, DJANGO, NEITHER),
    "Prometheus, FastAPI": (
        PROMETHEUS,
        FASTAPI,
        "from prometheus_fastapi_instrumentator import Instrumentator\nInstrumentator().instrument(app)",
    ),
    "Prometheus, Flask": (
        PROMETHEUS,
        FLASK,
        "from prometheus_flask_exporter import PrometheusMetrics\nPrometheusMetrics(app, registry=REGISTRY)",
    ),
    "Prometheus, Django": (
        PROMETHEUS,
        DJANGO,
        (
            "BEFORE = ['django_prometheus.middleware.PrometheusBeforeMiddleware']\n"
            "AFTER = ['django_prometheus.middleware.PrometheusAfterMiddleware']"
        ),
    ),
}


def seen(name: str, *, limited: bool) -> tuple[list[object], list[object]]:
    """What has been seen of the first two requests to an application, and of those and two more."""
    watching, application, instrument, *after = PROGRAMS[name]
    program = application.replace("INSTRUMENT_AFTER", "".join(after)).replace("INSTRUMENT", instrument)
    program = f"LIMITED = {limited}\n{watching}\n{program}\n{ASKED}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses, first, all_of_them = json.loads(done.stdout.splitlines()[-1])
    assert statuses == ([200, 200, 429, 429] if limited else [200] * 4)
    return first, all_of_them


@pytest.mark.parametrize("name", PROGRAMS)
def test_sees_the_same_with_a_limit_and_what_it_refuses(name: str) -> None:
    without, _ = seen(name, limited=False)
    assert without, "nothing is seen even without a limit"
    within, with_refusals = seen(name, limited=True)
    assert within == without
    assert with_refusals != within
