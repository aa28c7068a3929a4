"""Rules: which requests are limited, by which key, to what, and at which cost."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from copy import copy
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any, Final, TypeAlias, TypedDict, Unpack

from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration, Limits
from ratelimit.engine.pipeline import AsyncLimitsOfKey
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError
from ratelimit.integrations.http.callables import answer_of
from ratelimit.integrations.http.keys import Missing, RequestKey, client_ip, joined, method, name_of
from ratelimit.integrations.http.plans import PlanLimits, Plans
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.routes import RouteTemplate, canonical, templates_of
from ratelimit.integrations.managers import checked_version
from ratelimit.keys import Key, brief
from ratelimit.runtime.steps import Steps

Predicate: TypeAlias = Callable[[HttpRequest], bool | Awaitable[bool]]
Cost: TypeAlias = int | Callable[[HttpRequest], int | Awaitable[int]]
LimitsOfRequest: TypeAlias = Callable[[Any, HttpRequest], Limits | Awaitable[Limits | None] | None]
RuleLimits: TypeAlias = Limits | Plans | AsyncLimitsOfKey | LimitsOfRequest

_PRINTABLE: Final = re.compile(r"[\x20-\x7e]{1,200}")  # what a string of a structured field may hold (RFC 9651)


class RuleSettings(TypedDict, total=False):
    """What a :class:`Rule` takes beside its limits."""

    key: RequestKey | None
    name: str | None
    methods: Collection[str] | None
    routes: Collection[str] | None
    when: Predicate | None
    exempt: Predicate | None
    cost: Cost
    missing: Missing
    per_method: bool
    version: int | None
    enabled: bool


class Rule:
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
        (the rest), or as the framework writes them; None: all. A route of the application stands for what its router
        sends there, another template for the paths that it matches.
    :param when: only requests for which this is true.
    :param exempt: not those for which this is true.
    :param cost: tokens of a request, an int of 1 or more, or a callable that is given the request; for 0 it is exempt.
    :param missing: how a request without the key ends: in an error (400), or without being limited.
    :param per_method: whether each method has buckets of its own; GET and HEAD have one together.
    :param version: of the limits, an int of 0 or more. Raise it whenever the limits of a rule with a name change:
        buckets with limits of a lower version, or none, get the new ones and keep their fill level. None: stored
        buckets keep the limits that they were made with. With ``Plans``, it is added to the version of the plan.
    :param enabled: False: the rule is about no request.
    :raises InvalidConfigurationError: for arguments outside of these.

    The callables may be ``async`` where the limiter is.
    """

    __slots__ = (
        *("_gives_request", "_hash", "_has_key", "_routes", "_where", "cost", "enabled", "exempt", "key", "limits"),
        *("methods", "missing", "name", "named", "per_method", "routes", "version", "when"),
    )

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
        missing: Missing = Missing.ERROR,
        per_method: bool = False,
        version: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.limits = limits if isinstance(limits, Plans) or callable(limits) else BucketConfiguration.of(limits)
        self._gives_request = callable(self.limits) and _takes_request(self.limits)
        self.named = name is not None
        self.name = _checked_name(self.limits, name)
        self._has_key = key is not None
        self.key = client_ip() if key is None else key
        if not callable(self.key):
            raise InvalidConfigurationError(f"key must be a callable, client_ip() say; got {brief(key)}", "key")
        self.methods = None if methods is None else _checked_methods(methods)
        self.routes = None if routes is None else tuple(_listed(routes, "routes"))
        self._routes = None if self.routes is None else templates_of(self.routes)
        self._where = " ".join((",".join(sorted(self.methods or ())), ",".join(self.routes or ()))).strip()
        self.when = when
        self.exempt = exempt
        if not callable(cost) and (isinstance(cost, bool) or not isinstance(cost, int) or cost < 1):
            raise InvalidConfigurationError(
                f"cost must be an int of 1 or more, or a callable; got {brief(cost)}", "cost"
            )
        self.cost = cost
        if not isinstance(missing, Missing):
            raise InvalidConfigurationError(f"missing must be a Missing; got {brief(missing)}", "missing")
        self.missing = missing
        self.per_method = _checked_bool(per_method, "per_method")
        self.version = checked_version(version)
        self.enabled = _checked_bool(enabled, "enabled")
        self._hash = hash((self.name, self.named, self.methods, self.routes, self.version))

    @classmethod
    def of(cls, rule: Rule | RuleLimits, **settings: Unpack[RuleSettings]) -> Rule:
        """Return a rule for whatever a caller may give for one: itself, or limits and other settings with them.

        :raises InvalidArgumentError: for settings beside a rule.
        """
        if not isinstance(rule, Rule):
            return cls(rule, **settings)
        if settings:
            raise InvalidArgumentError(f"a Rule has its settings already; {brief(', '.join(settings))} goes there")
        return rule

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return self is other or self._parts() == other._parts()

    def __hash__(self) -> int:
        return self._hash

    def _parts(self) -> tuple[object, ...]:
        return (
            *(self.limits, self.key, self.name, self.named, self.methods, self.routes, self.when, self.exempt),
            *(self.cost, self.missing, self.per_method, self.version, self.enabled),
        )

    def __repr__(self) -> str:
        limits = str(self.limits) if isinstance(self.limits, BucketConfiguration) else self.limits
        shown = [repr(limits), f"key={self.key!r}"]
        defaults = {"methods": None, "routes": None, "when": None, "exempt": None, "cost": 1, "missing": Missing.ERROR}
        defaults |= {"per_method": False, "version": None, "enabled": True}
        if self.named:
            shown.append(f"name={self.name!r}")
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={sorted(value) if name == 'methods' else value!r}")
        return f"Rule({', '.join(shown)})"

    def by(self, key: RequestKey | None) -> Rule:
        """Return the rule with another key, unless it was given one of its own, or there is none."""
        if self._has_key or key is None:
            return self
        rule = copy(self)
        rule.key = key
        return rule

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

    def limits_of(self, request: HttpRequest, key: Key) -> Steps[PlanLimits]:
        """Return the limits of a request that has this key, and their version."""
        if isinstance(self.limits, BucketConfiguration):
            return PlanLimits(self.limits, self.version)
        if isinstance(self.limits, Plans):
            found = yield from self.limits.limits_of(request, key)
            if self.version is None:
                return found
            return PlanLimits(found.configuration, self.version + (found.version or 0))
        arguments: tuple[Any, ...] = (key, request) if self._gives_request else (key,)
        limits: Any = yield from answer_of(self.limits(*arguments))
        return PlanLimits(None if limits is None else BucketConfiguration.of(limits), self.version)

    @property
    def inheritance(self) -> TokensInheritance:
        """How the tokens of a live bucket pass to limits of a higher version."""
        return self.limits.inheritance if isinstance(self.limits, Plans) else TokensInheritance.PROPORTIONALLY

    def bucket_name(self, place: str) -> tuple[str, ...]:
        """Return what the rule's buckets are named by, before the keys of requests: see :func:`bucket_key`.

        That is the rule's name. A rule without one is named by all that tells it from others: its place, its methods
        and routes, its limits, and by which key it counts. With other limits it has other buckets.

        :param place: where the rule stands; empty for a whole application.
        """
        if self.named:
            return (self.name,)
        where = (self._where,) if self._where else ()
        return (place, *where, self.name, name_of(self.key))

    def policy_name(self, configuration: BucketConfiguration, bandwidth: Bandwidth) -> str:
        """Return the name that clients see for a bandwidth."""
        if len(configuration.bandwidths) == 1:
            return self.name
        own = bandwidth.id if bandwidth.id and _PRINTABLE.fullmatch(bandwidth.id) else _printed(bandwidth)
        return f"{self.name}: {own}" if self.named else own

    def counted_by(self, request: HttpRequest, key: Key) -> Key:
        """Return what follows the bucket's name: the key, with the method where each counts apart."""
        return joined([method()(request), key]) if self.per_method else key


def checked_rules(rules: Collection[Rule | RuleLimits]) -> tuple[Rule, ...]:
    """Return the rules of one place, made of whatever callers may give for them.

    :raises InvalidConfigurationError: where two of one name differ in their limits, or two without a name in nothing
        that their buckets are named by.
    """
    checked = tuple(Rule.of(rule) for rule in rules)
    names = Names()
    for rule in checked:
        names.add(rule)
    return checked


class Names:
    """The rules of an application by the names of their buckets; finds those that would share buckets by mistake."""

    def __init__(self) -> None:
        self._rules: dict[tuple[str, ...], Rule] = {}

    def add(self, rule: Rule, place: str = "") -> None:
        """Add a rule that stands at a place.

        :raises InvalidConfigurationError: where another rule with other limits has its name, or where one without a
            name differs from it in nothing that their buckets are named by.
        """
        name = rule.bucket_name(place)
        other = self._rules.setdefault(name, rule)
        if rule.named:
            if (other.limits, other.version) != (rule.limits, rule.version):
                raise InvalidConfigurationError(
                    f"rules of one name must have the same limits and version; {brief(rule.name)} has {_shown(other)}"
                    f" and {_shown(rule)}",
                    "name",
                )
        elif other != rule:
            raise InvalidConfigurationError(
                f"two rules with the same limits must have names, or they would share their buckets: {brief(other)},"
                f" {brief(rule)}",
                "name",
            )


def _shown(rule: Rule) -> str:
    limits = str(rule.limits) if isinstance(rule.limits, BucketConfiguration) else rule.limits
    return brief(limits) + (f" of version {rule.version}" if rule.version is not None else "")


def _takes_request(limits: Callable[..., object]) -> bool:
    """Return whether a callable wants the request beside the key: a second argument that it cannot do without."""
    try:
        parameters = signature(limits).parameters.values()
    except (TypeError, ValueError):  # of a builtin that has no signature
        return False
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is Parameter.empty for each in parameters) == 2


def _checked_bool(value: bool, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidConfigurationError(f"{name} must be True or False; got {brief(value)}", name)
    return value


@lru_cache(maxsize=1024)
def _printed(bandwidth: Bandwidth) -> str:
    return str(bandwidth).encode("ascii", "backslashreplace").decode()[:200]


def _checked_name(limits: object, name: str | None) -> str:
    if name is None:
        name = str(limits) if isinstance(limits, BucketConfiguration) else "default"
    if not isinstance(name, str) or not _PRINTABLE.fullmatch(name):
        raise InvalidConfigurationError(f"name must be 1 to 200 printable ASCII characters, not {brief(name)}", "name")
    return name


def _checked_methods(methods: Collection[str]) -> frozenset[str]:
    listed = {method.upper() for method in _listed(methods, "methods")}
    # Routers send HEAD to where GET goes, so that a rule for GET could be got around by it.
    return frozenset(listed | {"HEAD"} if "GET" in listed else listed)


def _listed(texts: Collection[str], name: str) -> Collection[str]:
    if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
        raise InvalidConfigurationError(f"{name} must be a list of texts, not {brief(texts)}", name)
    return texts
