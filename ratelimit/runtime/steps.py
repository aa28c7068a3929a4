"""How sync code and asyncio run the same logic.

Everything that talks to a store or a clock is a generator. It yields what the store or clock gave back, and is sent
the settled value: at once by :func:`run`, after an await by :func:`arun`. Where an await fails, or is cancelled,
the error is thrown into the generator at that place, so that the same ``try`` serves both.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")

Steps = Generator[Any, Any, T]


def run(steps: Steps[T]) -> T:
    """Run steps over a store and a clock that answer at once."""
    value = None
    try:
        while True:
            value = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    except BaseException as error:
        if steps.gi_frame is None:  # type: ignore[attr-defined]  # the error has ended them
            raise
        # The handler of a signal has raised the error here, while the steps stand still. Left alone, they would keep
        # their locks and connections for as long as somebody keeps the error, whose traceback refers to them.
        return _run_on(steps, error)


def _run_on(steps: Steps[T], error: BaseException) -> T:
    try:
        value = steps.throw(error)
        while True:
            value = steps.send(value)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def arun(steps: Steps[T]) -> T:
    """Run steps over a store and a clock whose answers are awaited."""
    value: Any = None
    failure: BaseException | None = None
    try:
        while True:
            value = steps.send(value)
            while hasattr(value, "__await__"):  # inspect.isawaitable takes several times as long
                try:
                    value = await value
                    break
                except GeneratorExit:  # this coroutine is being closed: nothing can be awaited any more
                    raise
                except BaseException as error:  # noqa: BLE001  # the steps handle it, or let it pass
                    failure = error
                value, failure = steps.throw(failure), None
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
