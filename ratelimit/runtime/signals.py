"""How a command ends before its time."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AGAIN_SECONDS = 0.01


class CommandError(Exception):
    """What a command cannot do, in one line for its user."""


class Interrupted(BaseException):
    """A signal asks the command to end. No KeyboardInterrupt, after which subprocess.Popen would not wait."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """As a shell shows a command that a signal has ended."""
        return 128 + self.number


@contextmanager
def interruptible() -> Generator[None]:
    """Raise Interrupted at the first SIGINT, SIGTERM or SIGHUP; later ones find the command ending already.

    Signals that were ignored stay so: after ``nohup``, say. Outside the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    def arm() -> None:
        for number in before:
            signal.signal(number, interrupt)

    before = {number: signal.getsignal(number) for number in _ENDING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    try:
        arm()
        with _raised_again(interrupt, arm):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _raised_again(interrupt: Callable[[int, FrameType | None], None], arm: Callable[[], None]) -> Generator[None]:
    """Interrupt again, a moment later, where a finalizer that happened to run has swallowed it, as it does any error.

    Without timers for that, the next signal will do.
    """
    alarms: list[Any] = []  # the handlers that were there before
    report_before = sys.unraisablehook

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        interruption = unraisable.exc_value
        if not isinstance(interruption, Interrupted):
            report_before(unraisable)
        elif hasattr(signal, "setitimer"):
            number = interruption.number
            alarms.append(signal.signal(signal.SIGALRM, lambda _, frame: interrupt(number, frame)))
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            arm()

    try:
        sys.unraisablehook = report
        yield
    finally:
        sys.unraisablehook = report_before
        for handler in alarms[:1]:  # the command has ended by itself, perhaps before the moment has come
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
