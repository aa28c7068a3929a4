"""What the integrations need, and what their tests need besides."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES: dict[str, list[str]] = {
    "aiohttp": ["aiohttp", "http_sf"],
    "asgi": [],
    "celery": ["celery", "http_sf"],
    "django": ["django"],
    "fastapi": ["fastapi"],
    "flask": ["flask"],
    "functions": [],
    "grpc": ["grpc", "grpc_status"],
    "http": [],
    "httpx": ["httpx", "http_sf"],
    "httpx2": ["httpx2", "http_sf"],
    "outbound": ["http_sf"],
    "requests": ["requests", "http_sf"],
    "rest_framework": ["rest_framework"],
    "wsgi": [],
}
"""The packages that each module of ``ratelimit.integrations`` needs."""

OF_TESTS: dict[str, list[str]] = {
    "answers": ["http_sf"],
    "asgi": ["httpx", "http_sf", "starlette", "uvicorn", "websockets"],
    "django": ["gunicorn", "http_sf", "uvicorn"],
    "fastapi": ["httpx", "http_sf", "uvicorn"],
    "flask": ["gunicorn", "http_sf"],
    "rest_framework": ["gunicorn", "http_sf"],
    "round_trips": ["fastapi", "flask", "httpx", "werkzeug"],
    "httpx": ["httpx2"],
    "settling": ["django", "fastapi", "flask", "http_sf", "httpx", "rest_framework", "starlette", "werkzeug"],
    "wsgi": ["http_sf"],
}


def missing_for(test: str) -> list[str]:
    """The packages that the tests of a file want, and that are not there."""
    name = test.removeprefix("test_")
    return [package for package in (*PACKAGES.get(name, []), *OF_TESTS.get(name, [])) if not find_spec(package)]
