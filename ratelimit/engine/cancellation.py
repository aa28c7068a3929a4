"""Requests of asyncio that are seen through, although the task that waits for them is cancelled."""

from __future__ import annotations

import asyncio
from inspect import isawaitable
from typing import Any, TypeVar

from ratelimit.engine.question import Course
from ratelimit.runtime.steps import Steps

T = TypeVar("T")


def seen_through(pending: Any, course: Course) -> Steps[Any]:
    """Wait for a request that is in flight, whatever cancels the task; the cancellation is left in the course.

    A request of sync code has ended already.
    """
    answering = asyncio.ensure_future(pending) if isawaitable(pending) else None
    while answering is not None:
        try:
            return (yield asyncio.shield(answering))
        except asyncio.CancelledError as error:
            if answering.cancelled():
                raise
            course.interruption = error
    return (yield pending)


def uninterrupted(steps: Steps[T], course: Course) -> Steps[T]:
    """Run steps of asyncio to their end, whatever cancels the task; the cancellation is left in the course."""
    value, failure = None, None
    while True:
        try:
            pending = steps.send(value) if failure is None else steps.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            value, failure = (yield from seen_through(pending, course)), None
        except GeneratorExit:
            # They may be in a cycle with an error that they handle, and would end much later.
            steps.close()
            raise
        except BaseException as error:  # noqa: BLE001  # the steps handle it, or let it pass
            failure = error
