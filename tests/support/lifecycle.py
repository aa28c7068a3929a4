"""Programs of their own interpreter, for tests of how processes and event loops begin and end.

``python -m tests.support.lifecycle NAME URL FORK`` runs one of them; it prints "ended", nothing else, and ends with 0.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

from ratelimit import AsyncProxyManager, ProxyManager
from ratelimit.runtime import fork_safety

KEYS = [f"user:{number}" for number in range(20)]
PATIENCE = 60
"""Seconds for a decision on a busy machine."""
KEPT: list[Any] = []
"""Objects that are still there when the interpreter ends."""


def _fork_in_c() -> int:
    """Fork as uWSGI does, so that no hook of the interpreter runs."""
    return int(ctypes.PyDLL(None).fork())


def _fork_in_c_noticed_by_process_id() -> int:
    """Fork so on a system whose memory says nothing of forks."""
    fork_safety._page = fork_safety._PageByProcessId()
    return _fork_in_c()


FORKS: dict[str, Callable[[], int]] = {"os.fork": getattr(os, "fork", _fork_in_c), "C": _fork_in_c}
FORKS["C, by process id"] = _fork_in_c_noticed_by_process_id
fork_process = FORKS["os.fork"]
"""How the programs fork."""


def limits_of(key: Any) -> str:
    """Limits by which a reply shows whose it is."""
    return f"{1000 + int(str(key).partition(':')[2])}/365d intervally"


def use(manager: ProxyManager, times: int = 5) -> int:
    """Take tokens of all keys, check that each answer is that of its key, and return how many were taken."""
    for _ in range(times):
        for key in KEYS:
            assert manager.try_consume(key)
            assert str(manager.configuration(key)) == limits_of(key).replace("365d", "365 days")
    return times * len(KEYS)


async def ause(manager: AsyncProxyManager, times: int = 5) -> int:
    """Take tokens of all keys at the same time, and return how many were taken."""

    async def use_key(key: str) -> None:
        for _ in range(times):
            assert await manager.try_consume(key)
            assert str(await manager.configuration(key)) == limits_of(key).replace("365d", "365 days")

    await asyncio.gather(*map(use_key, KEYS))
    return times * len(KEYS)


def taken(url: str) -> int:
    """Return how many tokens were ever taken of all keys."""
    with ProxyManager.from_url(url, limits_of, timeout=PATIENCE) as manager:
        return sum(manager.snapshot(key).consumed_tokens for key in KEYS)


def fork(work: Callable[[], object], how: Callable[[], int] | None = None) -> int:
    """Fork a process that does the work, and return its number."""
    child = (how or fork_process)()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # it must not go back into the program
        traceback.print_exc()
    finally:
        os._exit(status)


def in_children(work: Callable[[], object], count: int = 3) -> list[int]:
    """Fork several children that each do the work, and return their numbers."""
    return [fork(work) for _ in range(count)]


def all_ended_well(children: list[int]) -> None:
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0


def forked(work: Callable[[], Any], how: Callable[[], int] | None = None) -> Any:
    """Return what the work gives in a forked process, which is killed when it hangs."""
    reader, writer = os.pipe()

    def tell() -> None:
        signal.alarm(20)
        os.write(writer, json.dumps(work()).encode())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = fork(tell, how)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"
    return json.loads(answer)


def prefork_of_threads(url: str) -> None:
    """Parent and children use what the parent has used, the children by threads, and all at once."""
    with ProxyManager.from_url(url, limits_of, timeout=PATIENCE) as manager:
        use(manager)

        def work() -> None:
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(lambda _: use(manager), range(4)))

        children = in_children(work)
        use(manager)
        all_ended_well(children)
        use(manager)
    assert taken(url) == 15 * 100


def prefork_of_tasks(url: str) -> None:
    """Fork by tasks: the loop of the parent is closed, and each child has a loop of its own."""
    manager = AsyncProxyManager.from_url(url, limits_of, timeout=PATIENCE)
    asyncio.run(ause(manager))
    children = in_children(lambda: asyncio.run(ause(manager)))
    asyncio.run(ause(manager))
    all_ended_well(children)
    assert taken(url) == 5 * 100


def fork_beside_a_loop(url: str) -> None:
    """Fork beside an open loop of the parent, which goes on; the children inherit its connection and leave it alone."""
    manager = AsyncProxyManager.from_url(url, limits_of, timeout=PATIENCE)

    async def use_and_close() -> None:
        await ause(manager)
        await manager.aclose()

    with asyncio.Runner() as runner:
        runner.run(ause(manager))
        for _ in range(3):
            children = in_children(lambda: asyncio.run(use_and_close()))
            runner.run(ause(manager))
            all_ended_well(children)
        runner.run(ause(manager))
        runner.run(manager.aclose())
    assert taken(url) == 14 * 100


def fork_with_a_loop(url: str) -> None:
    """Children run the loop that the parent has made, while it rests; then the parent goes on with its connection."""
    KEPT.append(manager := AsyncProxyManager.from_url(url, limits_of, timeout=PATIENCE))
    runner = asyncio.Runner()
    KEPT.append(runner)  # a child must not close it: the system has one list for all of what the loop waits for
    runner.run(ause(manager))

    def forget() -> None:
        nonlocal manager
        forgotten = weakref.ref(manager)
        KEPT.remove(manager)
        del manager
        gc.collect()
        assert forgotten() is None
        runner.run(asyncio.sleep(0.1))

    def addresses() -> set[Any]:
        links = manager._store._channel._connection._links.values()  # type: ignore[attr-defined]
        return {link.transport.get_extra_info("sockname") for link in links}

    theirs = addresses()

    def use_another_connection() -> None:
        runner.run(ause(manager))
        assert len(addresses()) == 1
        assert not addresses() & theirs

    all_ended_well([fork(forget)])
    runner.run(ause(manager))
    all_ended_well([fork(use_another_connection)])
    assert addresses() == theirs
    runner.run(ause(manager))
    runner.run(manager.aclose())
    runner.close()
    assert taken(url) == 4 * 100


def children_that_close(url: str) -> None:
    """Children close what the parent has opened and goes on to use, or forget it, some after they have used it."""
    manager = ProxyManager.from_url(url, limits_of, timeout=PATIENCE)

    def close() -> None:
        manager.close()

    def use_and_close() -> None:
        use(manager)
        manager.close()

    def forget() -> None:
        nonlocal manager
        forgotten = weakref.ref(manager)
        del manager
        gc.collect()
        assert forgotten() is None

    for work in (close, use_and_close, forget):
        use(manager)
        children = in_children(work)
        use(manager)
        all_ended_well(children)
        use(manager)
    manager.close()
    assert taken(url) == 12 * 100


def children_that_end_as_programs_do(url: str) -> None:
    """Children end with all that the interpreter does at its end, one of them without any decision."""
    manager = ProxyManager.from_url(url, limits_of, timeout=PATIENCE)
    KEPT.append(manager)
    for uses in (0, 1):
        use(manager)
        child = fork_process()
        if not child:
            if uses:
                use(manager)
            warnings.simplefilter("ignore", ResourceWarning)  # of the parent's socket, which is left as it is
            sys.exit()
        all_ended_well([child])
        use(manager)
    manager.close()
    assert taken(url) == 5 * 100


def _child(manager: ProxyManager) -> None:
    use(manager)


def multiprocessing_fork(url: str) -> None:
    """Processes of ``multiprocessing``, whose ends run more of the interpreter's."""
    with ProxyManager.from_url(url, limits_of, timeout=PATIENCE) as manager:
        use(manager)
        processes = [get_context("fork").Process(target=_child, args=(manager,)) for _ in range(3)]
        for process in processes:
            process.start()
        use(manager)
        for process in processes:
            process.join()
            assert process.exitcode == 0
    assert taken(url) == 5 * 100


def _child_by_url(url: str) -> None:
    with ProxyManager.from_url(url, limits_of, timeout=PATIENCE) as manager:
        use(manager)


def _processes_by_url(url: str, context: SpawnContext | ForkServerContext) -> None:
    with ProxyManager.from_url(url, limits_of, timeout=PATIENCE) as manager:
        use(manager)
        processes = [context.Process(target=_child_by_url, args=(url,)) for _ in range(2)]
        for process in processes:
            process.start()
        use(manager)
        for process in processes:
            process.join()
            assert process.exitcode == 0
    assert taken(url) == 4 * 100


def multiprocessing_forkserver(url: str) -> None:
    """Processes of ``multiprocessing`` that a server forks, which has imported the package."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["ratelimit"])
    _processes_by_url(url, context)


def multiprocessing_spawn(url: str) -> None:
    """Processes of ``multiprocessing`` that begin with an interpreter of their own."""
    _processes_by_url(url, get_context("spawn"))


def parallel_loops(url: str) -> None:
    """Loops in threads of their own, one after the other in each."""
    manager = AsyncProxyManager.from_url(url, limits_of, timeout=PATIENCE)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            list(threads.map(lambda _: asyncio.run(ause(manager)), range(4)))
    assert taken(url) == 12 * 100


def left_open(url: str) -> None:
    """Leave a manager open."""
    KEPT.append(manager := ProxyManager.from_url(url, limits_of, timeout=PATIENCE))
    use(manager)


def left_open_by_threads(url: str) -> None:
    """Leave a manager open beside threads that are using it."""
    KEPT.append(manager := ProxyManager.from_url(url, limits_of, timeout=PATIENCE))
    begun = threading.Event()

    def work() -> None:
        while True:
            use(manager)
            begun.set()

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    assert begun.wait(60)


def left_open_by_tasks(url: str) -> None:
    """Leave a manager of tasks open, whose loop has ended."""
    KEPT.append(manager := AsyncProxyManager.from_url(url, limits_of, timeout=PATIENCE))
    asyncio.run(ause(manager))


def left_in_flight(url: str) -> None:
    """A loop that was closed with requests in flight, and then is no more; the next one finds all in order."""
    manager = AsyncProxyManager.from_url(url, limits_of, timeout=PATIENCE)

    async def leave() -> None:
        await ause(manager)
        calls = [asyncio.ensure_future(manager.try_consume(key)) for key in KEYS]
        await asyncio.sleep(0)
        KEPT.extend(calls)

    asyncio.run(leave())
    KEPT.clear()
    asyncio.run(ause(manager))


def main() -> None:
    """Run the program that is named."""
    # asyncio warns of slow callbacks, which a busy machine always has.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # redis-py's connection closes its socket when it is collected. Where a collection comes between the making of the
    # two, a later one may find the socket first, which complains that it is open. So there is none until the program
    # asks for it, or ends.
    gc.disable()
    _, name, url, how = sys.argv
    globals()["fork_process"] = FORKS[how]
    globals()[name](url)
    print("ended")


if __name__ == "__main__":
    main()
