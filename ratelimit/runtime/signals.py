"""Signals that end a command: they raise an exception in it, so that it can clean up."""

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


class Interrupted(BaseException):
    """A signal asks the command to end.

    It is not a KeyboardInterrupt, because after that ``subprocess.Popen`` does not wait for its process.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """Return the status that a shell shows for a command that a signal has ended."""
        return 128 + self.number


@contextmanager
def interruptible() -> Generator[None]:
    """Raise Interrupted at the first SIGINT, SIGTERM or SIGHUP, and ignore later ones: the command is ending already.

    Signals that were ignored before stay so, after ``nohup`` for instance. Outside the main thread nothing is changed.
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
    """Interrupt again, a moment later, where the exception was lost in a finalizer that happened to run.

    The interpreter reports any exception of a finalizer, and does not raise it. Where the platform has no timers, the
    next signal interrupts instead.
    """
    # The handlers that were there before.
    alarms: list[Any] = []
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
        # The command has ended by itself, perhaps before the alarm went off.
        for handler in alarms[:1]:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
