"""Work in a thread of its own, with an end to the wait for it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from ratelimit.stores.deadlines import within


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


def until_connecting_ends() -> None:
    for thread in threading.enumerate():
        if thread.name == "ratelimit-connect":
            thread.join(10)


def test_the_result_is_that_of_the_work() -> None:
    assert within(never(), lambda: threading.current_thread().name) == "ratelimit-connect"


def test_without_a_deadline_the_work_is_done_here() -> None:
    assert within(None, threading.get_ident) == threading.get_ident()


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


def test_an_error_after_the_deadline_is_dropped() -> None:
    work = Held(failing)
    with pytest.raises(TimeoutError):
        within(soon(), work, late=work.take)
    work.may_end.set()
    until_connecting_ends()
    assert work.late == []


def test_a_deadline_that_is_over_is_not_waited_for() -> None:
    work = Held()
    with pytest.raises(TimeoutError):
        within(time.monotonic() - 1, work, late=work.take)
    work.may_end.set()
    assert work.was_late.wait(10)


def test_a_result_in_time_is_not_late() -> None:
    late: list[str] = []
    assert within(never(), lambda: "done", late=late.append) == "done"
    until_connecting_ends()
    assert late == []


def test_an_interruption_of_who_waits_leaves_the_result_to_late() -> None:
    work, main = Held(), threading.get_ident()

    def interrupt() -> None:
        assert work.begun.wait(10)
        time.sleep(0.05)  # nothing tells that who waits has begun to: a signal before that would not wake him
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        within(never(), work, late=work.take)
    work.may_end.set()
    assert work.was_late.wait(10)
    assert work.late == ["done"]


def test_an_interruption_while_the_thread_starts_leaves_the_result_to_late(monkeypatch: pytest.MonkeyPatch) -> None:
    work, start = Held(), threading.Thread.start

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
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
    until_connecting_ends()
    assert sorted(in_time + late) == list(range(200))
