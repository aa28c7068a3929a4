"""How a command ends before its time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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

    before = {number: signal.getsignal(number) for number in _ENDING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
