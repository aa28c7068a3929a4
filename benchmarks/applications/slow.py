"""``slowapi``, for Starlette and FastAPI."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from benchmarks.applications.common import in_memory, limit_of
from benchmarks.model import Setup


@contextmanager
def slowapi(setup: Setup, *, default: bool, headers: bool) -> Generator[Any]:
    """Its limiter, over ``limits`` and a blocking redis-py, which is the only one that it has."""
    module, util = import_module("slowapi"), import_module("slowapi.util")
    limiter = module.Limiter(
        key_func=util.get_remote_address,
        default_limits=[limit_of(setup)] if default else [],
        headers_enabled=headers,
        storage_uri=setup.url,
    )
    try:
        yield limiter
    finally:
        if not in_memory(setup):
            limiter._storage.storage.close()  # noqa: SLF001  # it has no close


def with_slowapi(app: Any, limiter: Any) -> Any:
    module = import_module("slowapi")
    app.state.limiter = limiter
    app.add_exception_handler(module.errors.RateLimitExceeded, module._rate_limit_exceeded_handler)  # noqa: SLF001
    return app
