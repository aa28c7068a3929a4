"""Rules for HTTP requests: to which routes, by which methods, from whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, ClassVar, TypeAlias, TypedDict

from ratelimit import policy
from ratelimit.checks import boolean, function, refusal
from ratelimit.errors import InvalidConfigurationError
from ratelimit.integrations.http.keys import RequestKey, client_ip, joined, method
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.response import HttpResponse
from ratelimit.integrations.http.routes import RouteTemplate, canonical, templates_of
from ratelimit.keys import Key
from ratelimit.policy import Missing
from ratelimit.policy import rule as of_any

Predicate: TypeAlias = of_any.Predicate[HttpRequest]
Cost: TypeAlias = of_any.Cost[HttpRequest]
DeductWhen: TypeAlias = Callable[[HttpResponse], bool | Awaitable[bool]]
RuleLimits: TypeAlias = of_any.RuleLimits[HttpRequest]
"""Limits of one bucket, ``Plans``, or a callable that returns limits by the key, or by the key and the request."""


class RuleSettings(TypedDict, total=False):
    """What a :class:`Rule` takes besides its limits."""

    key: RequestKey | None
    name: str | None
    methods: Collection[str] | None
    routes: Collection[str] | None
    when: Predicate | None
    exempt: Predicate | None
    cost: Cost
    deduct_when: DeductWhen | None
    missing: Missing
    per_method: bool
    version: int | None
    enabled: bool


class Rule(policy.Rule[HttpRequest]):
    """A limit, and the requests that it is for.

    ::

        Rule("10/minute", key=api_key(secret=...), routes=["/search"], cost=lambda request: 5)

    A bucket is named by the rule and the request's key. A rule without a name counts for the place where it stands: the
    route, view, blueprint or middleware. Rules of one name share their buckets wherever they stand, and a request pays
    for each bucket once. Rules that are made alike are equal.

    :param limits: text, a ``BucketConfiguration``, a list of limits, ``Plans``, or a callable that is given the key, or
        the key and the request, and answers with limits, or with None for a key that is not limited.
    :param key: whose bucket it is; by default that of the peer's address, see :func:`client_ip`.
    :param name: printable ASCII, at most 200 characters: a part of the bucket's key, and the name of the policy that
        clients see. Without one, clients see the text of the limits, or ``default`` where they are looked up.
    :param methods: only requests with these methods; HEAD belongs to GET. None: all.
    :param routes: only requests to these routes: templates like ``/users/{id}`` (a segment) and ``/files/{rest:path}``
        (the rest), or as the framework writes them; None: all. A route of the application stands for the requests that
        its router sends there; any other template stands for the paths that it matches.
    :param when: only requests for which this is true.
    :param exempt: only requests for which this is false.
    :param cost: tokens of a request, an int of 1 or more, or a callable that is given the request; for 0 it is exempt.
    :param deduct_when: is given the :class:`HttpResponse`, before it is sent: where it is false, the request has cost
        nothing. The tokens are taken before the request goes on and given back then, so that no more requests are under
        way at once than the limit admits. Without a response, as after an error that no handler has turned into one,
        they stay charged.
    :param missing: how a request without the key ends: in an error (400), or without being limited.
    :param per_method: whether each method has buckets of its own; GET and HEAD have one together.
    :param version: of the limits, an int of 0 or more. Raise it whenever the limits of a rule with a name change:
        buckets with limits of a lower version, or none, get the new ones and keep their fill level. None: stored
        buckets keep the limits that they were made with. With ``Plans``, it is added to the version of the plan.
    :param enabled: False: the rule limits no request.
    :raises InvalidConfigurationError: for arguments that are not valid.

    The callables may be ``async`` where the limiter is.
    """

    __slots__ = ("_routes", "_where", "deduct_when", "methods", "per_method", "routes")

    _shown_settings: ClassVar[dict[str, object]] = {
        "methods": None,
        "routes": None,
        "when": None,
        "exempt": None,
        "cost": 1,
        "deduct_when": None,
        "missing": Missing.ERROR,
        "per_method": False,
        "version": None,
        "enabled": True,
    }

    key: RequestKey

    def __init__(
        self,
        limits: RuleLimits,
        *,
        key: RequestKey | None = None,
        name: str | None = None,
        methods: Collection[str] | None = None,
        routes: Collection[str] | None = None,
        when: Predicate | None = None,
        exempt: Predicate | None = None,
        cost: Cost = 1,
        deduct_when: DeductWhen | None = None,
        missing: Missing = Missing.ERROR,
        per_method: bool = False,
        version: int | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__(
            limits,
            key=key,
            name=name,
            when=when,
            exempt=exempt,
            cost=cost,
            missing=missing,
            version=version,
            enabled=enabled,
        )
        self.deduct_when = (
            None if deduct_when is None else function(deduct_when, "deduct_when", InvalidConfigurationError)
        )
        self.methods = None if methods is None else _checked_methods(methods)
        self.routes = None if routes is None else tuple(_listed(routes, "routes"))
        self._routes = None if self.routes is None else templates_of(self.routes)
        self._where = " ".join((",".join(sorted(self.methods or ())), ",".join(self.routes or ()))).strip()
        self.per_method = boolean(per_method, "per_method", InvalidConfigurationError)
        self._hash = hash((self._hash, self.methods, self.routes))

    def _checked_name(self, name: str) -> str:
        if not isinstance(name, str) or not of_any.PRINTABLE.fullmatch(name):
            raise refusal("name", "1 to 200 printable ASCII characters", name, InvalidConfigurationError)
        return name

    def _checked_key(self, key: Any) -> Any:
        if key is None:
            return client_ip()
        if not callable(key):
            raise refusal("key", "a callable such as client_ip()", key, InvalidConfigurationError)
        return key

    def is_about(self, request: HttpRequest) -> bool:
        """Return whether the rule is about requests with this method, to this route."""
        if not self.enabled or (self.methods is not None and request.method not in self.methods):
            return False
        return self._routes is None or self._is_routed(self._routes, request)

    def _is_routed(self, routes: tuple[RouteTemplate, ...], request: HttpRequest) -> bool:
        known = request.find_routes()
        found: str | None = None
        for route in routes:
            if route.canonical not in known:
                if route.matches(request.path):
                    return True
                continue
            # Routers take their time: this one is asked once.
            found = canonical(request.find_route() or "") if found is None else found
            if route.canonical == found:
                return True
        return False

    def bucket_name(self, place: str) -> tuple[str, ...]:
        """Return what the rule's buckets are named by, before the keys of requests: see ``bucket_key``.

        That is the rule's name. A rule without one is named by all that distinguishes it from others: its place, its
        methods and routes, its limits, and by which key it counts. With other limits it has other buckets.

        :param place: where the rule stands; empty for a whole application.
        """
        if self.named or not self._where:
            return super().bucket_name(place)
        return (place, self._where, *super().bucket_name(place)[1:])

    def counted_by(self, request: HttpRequest, key: Key) -> Key:
        """Return what follows the bucket's name: the key, with the method where each counts apart."""
        return joined([method()(request), key]) if self.per_method else key


def checked_rules(rules: Collection[Rule | RuleLimits]) -> tuple[Rule, ...]:
    """Return the rules of one place, made of whatever callers may give for them.

    :raises InvalidConfigurationError: where two rules of one name have different limits, or where two rules without a
        name would share their buckets.
    """
    return of_any.checked_rules([Rule.of(rule) for rule in rules])


def _checked_methods(methods: Collection[str]) -> frozenset[str]:
    listed = {method.upper() for method in _listed(methods, "methods")}
    # Routers send HEAD where GET goes, so that HEAD would be a way around a rule for GET.
    return frozenset(listed | {"HEAD"} if "GET" in listed else listed)


def _listed(texts: Collection[str], name: str) -> Collection[str]:
    if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
        raise refusal(name, "a list of texts", texts, InvalidConfigurationError)
    return texts
