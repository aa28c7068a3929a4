"""Callables of users, which may be ``async`` where the limiter is."""

from __future__ import annotations

from inspect import iscoroutine
from typing import Any

from ratelimit.errors import InvalidArgumentError
from ratelimit.runtime.steps import Steps


def answer_of(answer: Any) -> Steps[Any]:
    """What a callable has answered, awaited where that can be done.

    :raises InvalidArgumentError: for one that is ``async`` in sync code.
    """
    settled = yield answer
    if iscoroutine(settled):
        settled.close()
        raise InvalidArgumentError("only an AsyncLimiter awaits callables that are async")
    return settled
