"""The demo: processes share buckets in a real Redis, and the tokens they were given are compared with the limits."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NamedTuple

from ratelimit.core.algorithm import Configuration
from ratelimit.demo.errors import DemoError
from ratelimit.demo.local_redis import find_binary, local_redis
from ratelimit.demo.screen import Screen
from ratelimit.demo.server_facts import location, server_nanos, software
from ratelimit.demo.team import Team
from ratelimit.demo.verdict import Outcome, verdict
from ratelimit.demo.worker import KINDS, Task
from ratelimit.errors import StoreError
from ratelimit.stores.redis.store import RedisStore
from ratelimit.stores.urls import store_from_url

_ASKED_FOR = ["user:1", "user:2"]
_WAITED_FOR = ["report"]
# A worker that makes a bucket may be this far behind the server's time. The bucket then begins that much earlier.
_BEHIND_NANOS = 10_000_000


def demo(url: str | None, limits: Configuration, processes: int, seconds: float) -> int:
    """Let processes share buckets for some seconds; return 0 when the limits held, 1 when one was broken.

    :param url: the Redis to use; None for one that lives as long as the demo.
    :param limits: the limits of each bucket.
    :raises DemoError: where no verdict can be given.
    """
    try:
        with _redis(url) as redis:
            return _run(redis, limits, _kinds(processes), seconds)
    except StoreError as error:
        # Leave the key out: the user of the demo has not chosen it.
        raise DemoError(error.message) from error


class _Redis(NamedTuple):
    """A Redis server to use.

    :param source: where it is from, in words.
    """

    url: str
    store: RedisStore
    source: str


@contextmanager
def _redis(url: str | None) -> Generator[_Redis]:
    with ExitStack() as stack:
        source = None
        if url is None:
            binary = find_binary()
            url = stack.enter_context(local_redis(binary))
            source = f"{binary.source}, started for this demo"
        store = stack.enter_context(closing(store_from_url(url)))
        if not isinstance(store, RedisStore):
            raise DemoError(f"processes cannot share {url}: the demo wants a Redis")
        yield _Redis(url, store, source or f"at {location(url)}")


def _kinds(processes: int) -> list[str]:
    """Return the kinds of the processes: of seven, two wait, one runs asyncio, and four ask; of two, both ask."""
    ask, ask_in_tasks, wait = KINDS
    in_tasks = int(processes > 2)
    waiting = max(2 * processes // 7, in_tasks)
    return [ask] * (processes - waiting - in_tasks) + [ask_in_tasks] * in_tasks + [wait] * waiting


def _run(redis: _Redis, limits: Configuration, kinds: Sequence[str], seconds: float) -> int:
    screen, prefix = Screen(), f"ratelimit-demo:{secrets.token_hex(6)}:"
    tasks = [
        Task(kind, redis.url, str(limits), prefix, _WAITED_FOR if kind == "consume" else _ASKED_FOR, seconds)
        for kind in kinds
    ]
    stored = {key: f"{prefix}{key}".encode() for task in tasks for key in task.keys}
    screen.say(f"{software(redis.store, stored[tasks[0].keys[0]])} {redis.source}")
    screen.say(f"{len(tasks)} processes import ratelimit and share {len(stored)} buckets of {limits} for {seconds:g} s")

    def times() -> dict[str, int]:
        return {key: server_nanos(redis.store, each) for key, each in stored.items()}

    def show_progress() -> None:
        elapsed = time.monotonic_ns() - local_begin
        show(team.processes, [Outcome(key, limits, team.admitted(key), elapsed) for key in stored])

    with _removed_afterwards(redis.store, stored.values()), Team.of(tasks) as team:
        team.wait_until(lambda process: process.ready)
        begin, local_begin = times(), time.monotonic_ns()
        team.go()
        with screen.progress() as show:
            team.wait_until(lambda process: process.counts.done, show_progress, seconds)
        elapsed = {key: now - begin[key] + _BEHIND_NANOS for key, now in times().items()}
        outcomes = [Outcome(key, limits, team.admitted(key), elapsed[key]) for key in stored]
        if team.last_error and not any(outcome.admitted for outcome in outcomes):
            raise DemoError(f"nothing was admitted: {team.last_error}")
        kept, sentence = verdict(outcomes)
        screen.result(team.processes, outcomes, kept, sentence)
    return 0 if kept else 1


@contextmanager
def _removed_afterwards(store: RedisStore, keys: Iterable[bytes]) -> Generator[None]:
    try:
        yield
    finally:
        # They expire by themselves where the server is gone.
        with suppress(StoreError):
            for key in keys:
                store.delete(key)
