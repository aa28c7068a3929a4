"""What the applications of all frameworks share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from benchmarks import floor
from benchmarks.model import OURS, AsyncHit, Contender, Entrant, Hit, Kind, Setup
from ratelimit import AsyncProxyManager, ProxyManager
from ratelimit.settings import SettingsByName

BARE: Final = "bare application"
BUCKET: Final = f"{OURS}, bucket alone"
REDIS_PY: Final = "redis-py evalsha alone"
ALONE: Final = (BUCKET, REDIS_PY)
"""Asked without an application around them."""

BODY: Final = b"ok"
PERIODS: Final = {1: "second", 60: "minute", 86_400: "day"}

Opened = AbstractContextManager[Hit]
AsyncOpened = AbstractAsyncContextManager[AsyncHit]


@dataclass(frozen=True)
class Framework:
    """A framework, and all that is opened for it; the bare application first."""

    id: str
    title: str
    contenders: Sequence[Contender]

    @property
    def asynchronous(self) -> bool:
        return self.contenders[0].asyncio is not None


def addresses(number: int) -> list[str]:
    return [f"10.0.{i // 250}.{i % 250 + 1}" for i in range(number)]


def limit_of(setup: Setup) -> str:
    """Return the only limit as text of the form ``10/second``, which all these libraries read."""
    (limit,) = setup.limits
    return f"{limit.tokens}/{PERIODS[limit.seconds]}"


def in_memory(setup: Setup) -> bool:
    return setup.url == "memory://"


_numbers = count()


def _settings(setup: Setup) -> SettingsByName:
    """Return settings with a prefix of their own, so that the applications of one table do not share their buckets."""
    return SettingsByName(timeout=setup.timeout, prefix=f"{next(_numbers)}:")


def manager_for(setup: Setup) -> ProxyManager:
    return ProxyManager.from_url(setup.url, **_settings(setup))


def async_manager_for(setup: Setup) -> AsyncProxyManager:
    return AsyncProxyManager.from_url(setup.url, **_settings(setup))


@contextmanager
def bucket(setup: Setup) -> Generator[Hit]:
    with ProxyManager.from_url(setup.url, limit_of(setup), **_settings(setup)) as manager:
        yield lambda key: manager.try_consume_and_return_remaining(key).consumed


@asynccontextmanager
async def async_bucket(setup: Setup) -> AsyncGenerator[AsyncHit]:
    async with AsyncProxyManager.from_url(setup.url, limit_of(setup), **_settings(setup)) as manager:

        async def hit(key: str) -> bool:
            return (await manager.try_consume_and_return_remaining(key)).consumed

        yield hit


def ours(name: str) -> Entrant:
    return Entrant(f"{OURS}, {name}", Kind.OURS, token_bucket=True, headers=True)


def peer(name: str, *, headers: bool = False) -> Entrant:
    return Entrant(name, Kind.PEER, headers=headers)


def bare(*, sync: Callable[[Setup], Opened] | None = None, asyncio: Any = None) -> Contender:
    return Contender(Entrant(BARE, Kind.FLOOR), sync, asyncio)


WITHOUT: Final = [
    Contender(Entrant(REDIS_PY, Kind.FLOOR), floor.redis_py, floor.redis_py_asyncio),
    Contender(Entrant(BUCKET, Kind.OURS, token_bucket=True), bucket, async_bucket),
]
"""Contenders without an application, which are shown beside those of every framework."""
