"""A load on a store that fails over, and ledgers of its calls, which are compared with what is stored."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from ratelimit import AsyncProxyManager, Expiration, ProxyManager, StoreError
from tests.support.servers import ServerError, wait_until

HUGE = "1000000/day"
"""A limit that no test reaches: ``consumed_tokens`` of a bucket is then what the store knows of the ledger."""

LONGEST_CALL = 12.0
"""Seconds within which every call has to end, whatever happens to the servers, on a busy machine."""

_PATIENCE = 45.0
_PAUSE = 0.002  # of a worker, between calls: others use the machine as well

CLUSTER_DOWN = "cluster down"
"""The name by which errors are counted that hand on a node's ``CLUSTERDOWN``."""


class Ledger:
    """The answers that one worker has had, by key. No other thread writes to it."""

    def __init__(self) -> None:
        self.acknowledged: defaultdict[str, list[float]] = defaultdict(list)
        """When each token was acknowledged."""
        self.rejected: Counter[str] = Counter()
        self.in_doubt: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.slowest = 0.0

    def note(self, key: str, began: float, answer: bool | StoreError) -> None:
        now = time.monotonic()
        self.slowest = max(self.slowest, now - began)
        if isinstance(answer, StoreError):
            is_down = "the Redis cluster is down" in str(answer)
            name = CLUSTER_DOWN if is_down else type(answer).__name__
            self.errors[f"{name}{' in doubt' * answer.in_doubt}"] += 1
            self.in_doubt[key] += answer.in_doubt
        elif answer:
            self.acknowledged[key].append(now)
        else:
            self.rejected[key] += 1


class Load:
    """Threads and tasks that take one token after another from the buckets of all groups.

    Each group has a thread and two tasks of its own, so that keys of a node that is down do not hold up those of
    others. All threads share one manager, and all tasks another.

    :param deadline: seconds for each decision, where managers have such a thing; None for what they have by default.
    """

    def __init__(
        self, url: str, groups: Sequence[Sequence[str]], limits: str = HUGE, *, deadline: float | None = None
    ) -> None:
        self._url = url
        self._limits = limits
        self._settings: dict[str, Any] = {"expiration": Expiration.none()}
        if deadline is not None and "timeout" in inspect.signature(ProxyManager).parameters:
            self._settings["timeout"] = deadline
        self.keys = [key for group in groups for key in group]
        self._ledgers: dict[str, list[Ledger]] = {"sync": [], "asyncio": []}
        self._end = threading.Event()
        works = (partial(self._run_threads, groups), partial(self._run_tasks, groups))
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]
        self._began = self._ended = 0.0
        self._failures: list[BaseException] = []

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._ended = time.monotonic()
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a call hangs"
            self._raise_failure()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again where the test ends
            self._failures.append(error)

    def _ledger(self, face: str) -> Ledger:
        ledger = Ledger()
        self._ledgers[face].append(ledger)
        return ledger

    def _run_threads(self, groups: Sequence[Sequence[str]]) -> None:
        def work(group: Sequence[str], ledger: Ledger) -> None:
            while not self._end.is_set():
                for key in group:
                    began = time.monotonic()
                    try:
                        ledger.note(key, began, manager.try_consume(key))
                    except StoreError as error:
                        ledger.note(key, began, error)
                    time.sleep(_PAUSE)

        with ProxyManager.from_url(self._url, self._limits, **self._settings) as manager:
            works = [partial(work, group, self._ledger("sync")) for group in groups]
            threads = [threading.Thread(target=self._guarded, args=(one,), daemon=True) for one in works]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _run_tasks(self, groups: Sequence[Sequence[str]]) -> None:
        async def work(manager: AsyncProxyManager, group: Sequence[str], ledger: Ledger) -> None:
            while not self._end.is_set():
                for key in group:
                    began = time.monotonic()
                    try:
                        ledger.note(key, began, await manager.try_consume(key))
                    except StoreError as error:
                        ledger.note(key, began, error)
                    await asyncio.sleep(_PAUSE)

        async def run() -> None:
            async with AsyncProxyManager.from_url(self._url, self._limits, **self._settings) as manager:
                await asyncio.gather(
                    *(work(manager, group, self._ledger("asyncio")) for group in groups for _ in range(2))
                )

        asyncio.run(run())

    @property
    def faces(self) -> Sequence[str]:
        """Return the faces under load: ``sync`` and ``asyncio``."""
        return list(self._ledgers)

    def of(self, *faces: str) -> list[Ledger]:
        """The ledgers of these faces, or all."""
        return [ledger for face in faces or self._ledgers for ledger in self._ledgers[face]]

    def acknowledged(self, key: str, *faces: str, since: float = 0, until: float = float("inf")) -> int:
        """How many tokens of a key callers were told that they had, between two times."""
        return sum(since <= time_ <= until for ledger in self.of(*faces) for time_ in tuple(ledger.acknowledged[key]))

    def in_doubt(self, key: str) -> int:
        return sum(ledger.in_doubt[key] for ledger in self.of())

    def rejected(self, key: str) -> int:
        return sum(ledger.rejected[key] for ledger in self.of())

    def errors(self, *faces: str) -> Counter[str]:
        return sum((ledger.errors for ledger in self.of(*faces)), Counter[str]())

    @property
    def slowest(self) -> float:
        """How long the slowest call took, in seconds."""
        return max(ledger.slowest for ledger in self.of())

    @property
    def lasted(self) -> float:
        """Seconds from the first call to the last, of a load that has ended."""
        return self._ended - self._began

    def longest_gap(self, face: str, keys: Sequence[str]) -> float:
        """The longest time in which none of these keys was served."""
        times = sorted(time_ for ledger in self.of(face) for key in keys for time_ in ledger.acknowledged[key])
        times = [self._began, *times, self._ended or time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))

    def await_progress(self, keys: Sequence[str] | None = None, tokens: int = 20) -> None:
        """Wait until so many tokens more of each key were acknowledged, to threads and to tasks."""
        wanted = [(face, key) for face in self._ledgers for key in keys or self.keys]
        since = time.monotonic()

        def served() -> bool:
            self._raise_failure()
            return all(self.acknowledged(key, face, since=since) >= tokens for face, key in wanted)

        try:
            wait_until(served, f"{tokens} tokens more of each key", _PATIENCE)
        except ServerError as error:
            error.add_note(self.summary())
            raise

    def await_rejections(self) -> None:
        """Wait until all buckets are empty."""

        def empty() -> bool:
            self._raise_failure()
            return all(self.rejected(key) for key in self.keys)

        wait_until(empty, "all buckets are empty", _PATIENCE)

    def _raise_failure(self) -> None:
        for error in self._failures:
            raise error

    def stored(self) -> dict[str, int]:
        """Return the tokens that were consumed of each key, as the store has them."""
        with ProxyManager.from_url(self._url, self._limits, expiration=Expiration.none()) as witness:
            return {key: witness.snapshot(key).consumed_tokens for key in self.keys}

    def summary(self) -> str:
        """The numbers of all keys together."""
        taken = sum(map(self.acknowledged, self.keys))
        doubt = sum(map(self.in_doubt, self.keys))
        errors = ", ".join(f"{count} {name}" for name, count in self.errors().items()) or "none"
        return f"acknowledged {taken}, in doubt {doubt}, errors: {errors}, slowest call {self.slowest:.2f} s"
