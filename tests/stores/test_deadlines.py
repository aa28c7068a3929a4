"""Work in a thread of its own, and a wait for it that has an end."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from ratelimit.stores.redis.deadlines import within
from tests.support.servers import wait_until


class Held:
    """Work that ends when it may."""

    def __init__(self, work: Callable[[], str] = lambda: "done") -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.late: list[str] = []
        self.was_late = threading.Event()
        self._work = work

    def __call__(self) -> str:
        self.begun.set()
        assert self.may_end.wait(10)
        return self._work()

    def take(self, result: str) -> None:
        self.late.append(result)
        self.was_late.set()


def soon() -> float:
    return time.monotonic() + 0.02


def never() -> float:
    return time.monotonic() + 60


def failing() -> str:
    raise LookupError("no such thing")


@pytest.fixture(scope="module")
def until_the_threads_end() -> Callable[[], None]:
    time.sleep(0.1)  # what others have left running ends
    threads = _thread._count()
    return lambda: wait_until(lambda: _thread._count() <= threads, "the threads of the work end")


@pytest.fixture(autouse=True)
def _all_ends(until_the_threads_end: Callable[[], None]) -> Generator[None]:
    yield
    until_the_threads_end()


@pytest.mark.parametrize("deadline", [None, float("inf")], ids=str)
def test_the_work_is_done_in_another_thread(deadline: float | None) -> None:
    assert within(deadline and never(), threading.get_ident) != threading.get_ident()


def test_without_threads_the_work_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", no_thread)
    assert within(never(), threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("deadline", [None, float("inf")], ids=str)
def test_an_error_of_the_work_is_raised(deadline: float | None) -> None:
    with pytest.raises(LookupError, match="no such thing"):
        within(deadline and never(), failing)


def test_what_comes_after_the_deadline_goes_where_late_results_go() -> None:
    work = Held()
    with pytest.raises(TimeoutError):
        within(soon(), work, late=work.take)
    assert work.late == []
    work.may_end.set()
    assert work.was_late.wait(10)
    assert work.late == ["done"]


def test_an_error_after_the_deadline_is_dropped(until_the_threads_end: Callable[[], None]) -> None:
    work = Held(failing)
    with pytest.raises(TimeoutError):
        within(soon(), work, late=work.take)
    work.may_end.set()
    until_the_threads_end()
    assert work.late == []


def test_a_deadline_that_is_over_is_not_waited_for() -> None:
    work = Held()
    with pytest.raises(TimeoutError):
        within(time.monotonic() - 1, work, late=work.take)
    work.may_end.set()
    assert work.was_late.wait(10)


def test_a_result_in_time_is_not_late(until_the_threads_end: Callable[[], None]) -> None:
    late: list[str] = []
    assert within(never(), lambda: "done", late=late.append) == "done"
    until_the_threads_end()
    assert late == []


def test_an_interruption_of_the_wait_leaves_the_result_to_late() -> None:
    work, main, raised = Held(), threading.get_ident(), threading.Event()

    def handler(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        assert work.begun.wait(10)
        # Nothing shows that the main thread has begun to wait, and a signal that comes just before does not wake it.
        while not raised.wait(0.05):
            signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, handler)
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            within(never(), work, late=work.take)
    finally:
        interrupting.join()
        signal.signal(signal.SIGINT, before)
    work.may_end.set()
    assert work.was_late.wait(10)
    assert work.late == ["done"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of a handler")], ids=repr)
def test_an_interruption_while_the_thread_starts_leaves_the_result_to_late(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, start = Held(), _thread.start_new_thread

    def interrupted_start(*arguments: Any) -> None:
        start(*arguments)
        raise error

    monkeypatch.setattr(_thread, "start_new_thread", interrupted_start)
    with pytest.raises(type(error)):
        within(never(), work, late=work.take)
    work.may_end.set()
    assert work.was_late.wait(10)
    assert work.late == ["done"]


def test_of_results_at_the_very_deadline_each_goes_one_way() -> None:
    late: list[int] = []
    in_time: list[int] = []
    for number in range(200):
        with suppress(TimeoutError):
            in_time.append(within(time.monotonic() + 0.0001, partial(int, number), late=late.append))
    wait_until(lambda: len(in_time) + len(late) >= 200, "each has gone its way")
    assert sorted(in_time + late) == list(range(200))


def test_a_thread_that_ends_before_it_begins_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 loses a new thread when an exception is set on the thread that starts it."""
    start, started = _thread.start_new_thread, 0

    def start_in_vain(work: Any, arguments: Any) -> Any:
        nonlocal started
        started += 1
        return start(work, arguments) if started > 2 else start(int, ())

    monkeypatch.setattr(_thread, "start_new_thread", start_in_vain)
    assert within(never(), lambda: "done") == "done"
    assert started == 3


def test_work_that_takes_longer_than_a_thread_to_start_is_done_once() -> None:
    done: list[None] = []

    def work() -> None:
        time.sleep(0.3)
        done.append(None)

    within(never(), work)
    assert done == [None]
