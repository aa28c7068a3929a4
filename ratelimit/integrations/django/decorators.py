"""The decorator for views."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import isclass
from typing import Any, TypeVar, Unpack, cast

from asgiref.sync import iscoroutinefunction

from ratelimit.drive import adrive, drive
from ratelimit.errors import InvalidArgumentError, brief
from ratelimit.integrations.django.conf import async_limiter, current, limiter
from ratelimit.integrations.django.requests import answered, native_of
from ratelimit.integrations.http import Rule, RuleSettings
from ratelimit.integrations.http.rules import RuleLimits

ViewT = TypeVar("ViewT", bound=Callable[..., Any])


def rate_limit(limits: Rule | RuleLimits, **settings: Unpack[RuleSettings]) -> Callable[[ViewT], ViewT]:
    """Limit a view, sync or async. A request that is refused does not reach it.

    ::

        @rate_limit("10/minute", key=user())
        def search(request): ...

    Class-based views take it by ``method_decorator(rate_limit("10/minute"), name="dispatch")``.

    :param limits: a :class:`Rule`, or what one is made of, with its other settings.
    :raises InvalidConfigurationError: at decoration, for settings that cannot be.
    :raises InvalidArgumentError: at decoration, for settings beside a rule, and for a class.

    Views with rules of the same name, which is by default the text of the limits, share their buckets; a request pays
    once for each, also where the middleware has it too.
    """
    rules = (Rule.of(limits, **settings),)

    def decorate(view: ViewT) -> ViewT:
        if isclass(view) or not callable(view):
            raise InvalidArgumentError(
                f"rate_limit is for functions, which {brief(view)} is not; for a class:"
                ' @method_decorator(rate_limit(...), name="dispatch")'
            )

        @wraps(view)
        def limited(request: Any, *args: Any, **kwargs: Any) -> Any:
            if not current().enabled:
                return view(request, *args, **kwargs)
            return drive(answered(limiter(rules), native_of(request), partial(view, request, *args, **kwargs)))

        @wraps(view)
        async def alimited(request: Any, *args: Any, **kwargs: Any) -> Any:
            if not current().enabled:
                return await view(request, *args, **kwargs)
            respond = partial(view, request, *args, **kwargs)
            return await adrive(answered(async_limiter(rules), native_of(request), respond))

        return cast("ViewT", alimited if _is_async(view) else limited)

    return decorate


def _is_async(view: object) -> bool:
    if iscoroutinefunction(view):  # pyright: ignore[reportDeprecated]  # inspect's does not see Django's mark in 3.11
        return True
    # ``dispatch`` is a plain function, also where its class is async and what it returns is awaited.
    method = getattr(view, "func", view)
    return bool(getattr(getattr(method, "__self__", None), "view_is_async", False))
