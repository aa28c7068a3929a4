"""Attributes of functions, by which decorators mark views and endpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, TypeVar, cast

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def marked(function: FunctionT, name: str, value: object) -> FunctionT:
    """Give a function an attribute, and return the function.

    A bound method takes no attributes: a ``partial`` of it, which frameworks treat alike, is returned in its place.
    """
    try:
        setattr(function, name, value)
    except AttributeError:
        around: Any = update_wrapper(partial(function), function)
        setattr(around, name, value)
        return cast("FunctionT", around)
    return function
