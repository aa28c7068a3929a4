"""Processes that use the library in every way at once, and keep book of what they were told."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.synchronize import Event
from typing import Any, Final

from ratelimit import AsyncProxyManager, Optimization, ProxyManager, StoreError

LEDGER: Final = "ledger"
"""A bucket without an end: every token that was admitted must be found in it."""
DELAYED: Final = "delayed"
"""A bucket without an end whose tokens are reported to the store later."""
RATE: Final = "rate"
"""A bucket that refills: no more may be admitted than the limit allows."""
RATE_TOKENS, RATE_BURST = 300, 50
_TURNS: Final = "turns"
_MANY: Final = 3_000
_THREADS: Final = 6
_TASKS: Final = 60
_MEMORY: Final = 2**20
LONGEST: Final = "longest, ms"

Book = Counter[str]


def limits_of(key: Any) -> str:
    """The limits of all keys, by the beginning of their names."""
    if key in (LEDGER, DELAYED):
        return "1000000000/36500d intervally"
    if key == RATE:
        return f"{RATE_TOKENS}/s burst {RATE_BURST}"
    return f"{1000 + int(key)}/s"


def serve(kind: str, url: str, seed: int, stop: Event, report: Any) -> None:
    """Run one of the processes until it is to stop, and send its book every second, the last one with the end."""
    logging.getLogger("ratelimit").setLevel(logging.ERROR)  # waits that end in trouble are part of it
    book: Book = Counter()
    over = threading.Event()

    def tell() -> None:
        while not over.wait(1):
            report.send(("book", dict(book)))

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        _KINDS[kind](url, random.Random(seed), stop, book)
    except BaseException:  # noqa: BLE001  # whatever it is, it goes into the summary
        book["unexpected errors"] += 1
        report.send(("error", traceback.format_exc()))
    finally:
        over.set()
        teller.join()
        report.send(("end", dict(book)))


def _noted(book: Book, key: str, error: StoreError) -> None:
    book[type(error).__name__] += 1
    book[f"{_entry(key)} in doubt"] += error.in_doubt


def _entry(key: str) -> str:
    return "many" if key.isdecimal() else key


def _begun(book: Book, begin: float) -> None:
    book[_TURNS] += 1
    book[LONGEST] = max(book[LONGEST], round((time.monotonic() - begin) * 1000))


def _by_threads(  # noqa: C901
    url: str, chance: random.Random, stop: Event, book: Book, optimization: Optimization | None = None
) -> None:
    key_of_all = LEDGER if optimization is None else DELAYED
    lock = threading.Lock()
    failures: list[BaseException] = []
    manager = ProxyManager.from_url(url, limits_of, memory_limit_bytes=_MEMORY, optimization=optimization)

    def work(own: random.Random) -> None:
        try:
            while not stop.is_set():
                key = own.choice([key_of_all, key_of_all, RATE, str(own.randrange(_MANY))])
                if optimization is not None and key == RATE:
                    continue  # whose bound is that of exact decisions
                begin = time.monotonic()
                try:
                    if key.isdecimal() and own.random() < 0.2:
                        taken = int(manager.consume(key, own.randrange(1, 50), max_wait=0.05))
                    else:
                        taken = manager.try_consume(key)
                except StoreError as error:
                    with lock:
                        _noted(book, key, error)
                else:
                    with lock:
                        book[_entry(key)] += taken
                with lock:
                    _begun(book, begin)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(random.Random(chance.random()),)) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _patiently(manager.close)
    if failures:
        raise failures[0]


def _patiently(close: Callable[[], None]) -> None:
    """What was handed out is told to a store that is there again."""
    for _ in range(20):
        try:
            close()
        except StoreError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError("what was handed out could not be told")


def _by_threads_delaying(url: str, chance: random.Random, stop: Event, book: Book) -> None:
    _by_threads(url, chance, stop, book, Optimization.delaying(20, 0.5))


def _by_tasks(url: str, chance: random.Random, stop: Event, book: Book) -> None:
    async def turn(manager: AsyncProxyManager, key: str) -> None:
        begin = time.monotonic()
        try:
            if key.isdecimal() and chance.random() < 0.2:
                taken = int(await manager.consume(key, chance.randrange(1, 50), max_wait=0.05))
            else:
                taken = await manager.try_consume(key)
        except StoreError as error:
            _noted(book, key, error)
        except asyncio.CancelledError:
            book[f"{_entry(key)} in doubt"] += 1
            raise
        else:
            book[_entry(key)] += taken
        _begun(book, begin)

    async def work(manager: AsyncProxyManager) -> None:
        while not stop.is_set():
            key = chance.choice([LEDGER, LEDGER, RATE, str(chance.randrange(_MANY))])
            call = asyncio.create_task(turn(manager, key))
            if chance.random() < 0.05:
                await asyncio.sleep(chance.uniform(0, 0.002))
                call.cancel()
            with suppress(asyncio.CancelledError):
                await call
            await asyncio.sleep(0.001)

    async def main() -> None:
        async with AsyncProxyManager.from_url(url, limits_of, memory_limit_bytes=_MEMORY) as manager:
            await asyncio.gather(*(work(manager) for _ in range(_TASKS)))

    asyncio.run(main())


_KINDS: Final = {"threads": _by_threads, "tasks": _by_tasks, "delaying threads": _by_threads_delaying}
KINDS: Final = tuple(_KINDS)
