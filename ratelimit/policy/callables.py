"""Callables of users (keys, costs, predicates, limits), which may be ``async`` where the limiter is."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, iscoroutine, iscoroutinefunction, signature
from typing import Any

from ratelimit.checks import Refusal, refusal, whole_number
from ratelimit.errors import InvalidArgumentError
from ratelimit.keys import Key
from ratelimit.runtime.steps import Steps


def answer_of(answer: Any) -> Steps[Any]:
    """Return what a callable has answered; an awaitable answer is awaited.

    :raises InvalidArgumentError: for a callable that is ``async`` in sync code.
    """
    settled = yield answer
    if iscoroutine(settled):
        settled.close()
        raise InvalidArgumentError("a callable must not be async in sync code: only an AsyncLimiter awaits its answer")
    return settled


def is_async(function: object) -> bool:
    """Return whether a function, or the ``__call__`` of an object, is ``async``."""
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(type(function), "__call__", None))  # noqa: B004


def check_sync(what: str, error: type[Refusal] = InvalidArgumentError, **callables: object) -> None:
    """Refuse callables that sync code could not await.

    :param what: names that code in the message: "the function", say.
    :param callables: by the names of the arguments; what is not a callable is passed over.
    :raises InvalidArgumentError: for one that is ``async``.
    """
    for name, given in callables.items():
        if is_async(given):
            raise refusal(name, f"sync, as {what} is", given, error)


def required_arguments(function: Callable[..., object]) -> int:
    """Return how many positional arguments a callable requires; 0 where that is not known."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return 0
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is Parameter.empty for each in parameters)


def name_of(key: object) -> str:
    """Return the short name of a key for messages: its ``name``, else that of the function or class."""
    name = getattr(key, "name", None) or getattr(key, "__name__", None)
    return name if isinstance(name, str) else type(key).__name__


def checked_cost(cost: Any, error: type[Refusal] = InvalidArgumentError) -> Any:
    """Return the cost of a rule: an int of 1 or more, or a callable.

    :raises InvalidArgumentError: for any other value.
    """
    if callable(cost):
        return cost
    if not isinstance(cost, int) or isinstance(cost, bool) or cost < 1:
        raise refusal("cost", "an int from 1 to 2**63 - 1, or a callable", cost, error)
    return whole_number(cost, "cost", error=error)


def answered_key(key: object) -> Key:
    """Return the key that a callable has answered with.

    :raises InvalidArgumentError: for what is neither text nor bytes.
    """
    if not isinstance(key, str | bytes):
        raise refusal("the answer of key", "a str, bytes or None", key)
    return key


def answered_cost(cost: Any) -> int:
    """Return the cost that a callable has answered with; 0 stands for a request that is free.

    :raises InvalidArgumentError: for what is not an int of 0 or more.
    """
    return whole_number(cost, "the answer of cost", least=0)
