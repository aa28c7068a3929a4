"""The decorator for views."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import isclass
from typing import Any, TypeVar, Unpack, cast

from asgiref.sync import iscoroutinefunction

from ratelimit.errors import InvalidArgumentError
from ratelimit.integrations.django.conf import async_limiter, current, limiter, names
from ratelimit.integrations.django.requests import EXEMPT, answered, exempted, native_of
from ratelimit.integrations.http import Rule, RuleSettings
from ratelimit.integrations.http.rules import RuleLimits
from ratelimit.integrations.marks import marked
from ratelimit.keys import brief
from ratelimit.runtime.steps import arun, run

ViewT = TypeVar("ViewT", bound=Callable[..., Any])


def rate_limit(limits: Rule | RuleLimits, **settings: Unpack[RuleSettings]) -> Callable[[ViewT], ViewT]:
    """Limit a view, sync or async. A request that is refused does not reach it.

    ::

        @rate_limit("10/minute", key=user())
        def search(request): ...

    Class-based views take it by ``method_decorator(rate_limit("10/minute"), name="dispatch")``.

    :param limits: a :class:`ratelimit.integrations.http.Rule`, or what one is made of, with its other settings.
    :raises InvalidConfigurationError: at decoration, for settings that are not valid, and where another view has a
        rule of the same name with other limits.
    :raises InvalidArgumentError: at decoration, for settings beside a rule, and for a class.

    Without a name, a limit counts for the view; with ``name=`` it is shared by all that have it. A request pays
    for a bucket once, even if the middleware has the rule too.
    """
    rules = (Rule.of(limits, **settings),)
    if rules[0].named:
        names().add(rules[0])

    def decorate(view: ViewT) -> ViewT:
        if isclass(view) or not callable(view):
            raise InvalidArgumentError(
                f"rate_limit is for functions, which {brief(view)} is not; for a class:"
                ' @method_decorator(rate_limit(...), name="dispatch")'
            )

        place = _place(view)

        @wraps(view)
        def limited(request: Any, *args: Any, **kwargs: Any) -> Any:
            if not current().enabled:
                return view(request, *args, **kwargs)
            return run(answered(limiter(rules), native_of(request), partial(view, request, *args, **kwargs), place))

        @wraps(view)
        async def alimited(request: Any, *args: Any, **kwargs: Any) -> Any:
            if not current().enabled:
                return await view(request, *args, **kwargs)
            respond = partial(view, request, *args, **kwargs)
            return await arun(answered(async_limiter(rules), native_of(request), respond, place))

        return cast("ViewT", alimited if _is_async(view) else limited)

    return decorate


def exempt(view: ViewT) -> ViewT:
    """Exempt a view from the rules of the middleware. The rules of its own decorators still count.

    Class-based views take it as they take :func:`rate_limit`, or around ``as_view()``. The function itself is marked,
    so that all of its routes are exempt.

    :raises InvalidArgumentError: for what is not callable, and for a class.
    """
    if isclass(view) or not callable(view):
        raise InvalidArgumentError(f"exempt must be given a view that is a function; got {brief(view)}")
    exempted.append(True)
    return marked(view, EXEMPT, True)


def _place(view: Callable[..., Any]) -> str:
    """Return the view that a limit without a name counts for: ``shop.views.search``.

    ``method_decorator`` gives a decorator a bound method, which the class of its object may have inherited.
    """
    owner = getattr(getattr(view, "func", view), "__self__", None)
    name = getattr(view, "__name__", type(view).__name__)
    if owner is None:
        return f"{view.__module__}.{getattr(view, '__qualname__', name)}"
    return f"{type(owner).__module__}.{type(owner).__qualname__}.{name}"


def _is_async(view: object) -> bool:
    if iscoroutinefunction(view):  # pyright: ignore[reportDeprecated]  # inspect's does not see Django's mark in 3.11
        return True
    # ``dispatch`` is a plain function, even if its class is async and Django awaits what it returns.
    method = getattr(view, "func", view)
    return bool(getattr(getattr(method, "__self__", None), "view_is_async", False))
