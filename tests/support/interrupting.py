"""Interrupts a thread at each point where the interpreter lets signals in, one after the other.

CPython looks for signals, and for exceptions that are set on a thread, where a function begins, after a call of one
that is not written in Python, and where a loop goes back; nowhere else. An exception of a trace function comes before
an instruction, so that it stands for one after the instruction before.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import ratelimit

_PACKAGE = str(Path(ratelimit.__file__).parent)
_ENTRIES = ("CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "RESUME", "INSTRUMENTED")


class Interruption(Exception):  # noqa: N818  # as the time limits of others are called
    """What the handler of a signal raises."""


class _Code:
    """Where the interpreter looks for signals in a piece of code, and which code handles what is raised where."""

    def __init__(self, code: CodeType) -> None:
        self.entries = {each.offset for each in dis.get_instructions(code) if each.opname.startswith(_ENTRIES)}
        self._table: list[Any] = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def handler(self, offset: int) -> int | None:
        return next((each.target for each in self._table if each.start <= offset < each.end), None)


_code = lru_cache(None)(_Code)


class _Tracer:
    """Raises at one point, counted from 1, in code of these places: files, or directories with all that they hold."""

    def __init__(self, point: int, places: tuple[str, ...]) -> None:
        self._left = point
        self._places = places
        self._last: dict[FrameType, int | None] = {}
        self.has_raised = False

    def enter(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        if frame.f_back is not None and frame.f_back in self._last:
            self._last[frame.f_back] = None  # its call is one of a function in Python
        if not frame.f_code.co_filename.startswith(self._places):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._last.setdefault(frame, None)
        return self._step

    def _step(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event != "opcode":
            return self._step
        code, last, now = _code(frame.f_code), self._last.get(frame), frame.f_lasti
        self._last[frame] = now
        if last is not None and last in code.entries and code.handler(last) == code.handler(now):
            self._left -= 1
            if not self._left:
                self.has_raised = True
                raise Interruption(f"{frame.f_code.co_qualname}, line {frame.f_lineno}")
        return self._step


def interrupted(work: Callable[[], Any], point: int, places: tuple[str, ...] = (_PACKAGE,)) -> tuple[bool, Any]:
    """Do some work that is interrupted at one point; whether it got there, and what the work has given or raised."""
    tracer = _Tracer(point, places)
    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # what is set by now decides in Python 3.12 what is reported
    sys.settrace(tracer.enter)
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001  # with the traceback its frames go, as where a caller goes on
        outcome = error.with_traceback(None)
        outcome.__context__ = outcome.__cause__ = None
    finally:
        sys.settrace(before)
        tracer._last.clear()
    return tracer.has_raised, outcome


def at_every_point(
    work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, places: tuple[str, ...] = (_PACKAGE,)
) -> Iterator[tuple[int, Any]]:
    """Do the work over and over, interrupted at the next point each time, until it gets through.

    It gets through once before that, too, so that all is as it is later.

    :param places: the files and directories whose code is interrupted.
    """
    for point in (sys.maxsize, *range(1, 100_000)):
        prepare()
        has_raised, outcome = interrupted(work, point, places)
        if has_raised:
            yield point, outcome
            continue
        assert not isinstance(outcome, Exception), outcome
        if point < sys.maxsize:
            return
