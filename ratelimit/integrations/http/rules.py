"""Rules: which requests are limited, by which key, to what, and at which cost."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from functools import lru_cache
from typing import Final, TypeAlias, TypedDict, Unpack

from ratelimit.core.bandwidth import Bandwidth, BucketConfiguration, Limits
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError, Key, brief
from ratelimit.handle import AsyncLimitsOfKey
from ratelimit.integrations.http.keys import Missing, RequestKey, client_ip
from ratelimit.integrations.http.plans import Plans
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.managers import bucket_key

Predicate: TypeAlias = Callable[[HttpRequest], bool | Awaitable[bool]]
Cost: TypeAlias = int | Callable[[HttpRequest], int | Awaitable[int]]
RuleLimits: TypeAlias = Limits | Plans | AsyncLimitsOfKey

_PRINTABLE: Final = re.compile(r"[\x20-\x7e]{1,200}")  # what a string of a structured field may hold (RFC 9651)


class RuleSettings(TypedDict, total=False):
    """What a :class:`Rule` can be told beside its limits."""

    key: RequestKey | None
    name: str | None
    methods: Collection[str] | None
    routes: Collection[str] | None
    when: Predicate | None
    exempt: Predicate | None
    cost: Cost
    missing: Missing


class Rule:
    """A limit, and the requests that it is for.

    ::

        Rule("10/minute", key=api_key(secret=...), routes=["/search"], cost=lambda request: 5)

    A bucket is named by the rule's name and the request's key: rules of the same name share their buckets, and a
    request pays for each bucket once.

    :param limits: text, a ``BucketConfiguration``, a list of limits, ``Plans``, or a callable that is given the key and
        answers with limits, or None for a key that is not limited.
    :param key: whose bucket it is; by default that of the peer's address, see :func:`client_ip`.
    :param name: printable ASCII, at most 200 characters: a part of the bucket's key, and the name of the policy that
        clients are told. By default the text of the limits, ``default`` where they are looked up.
    :param methods: only requests with these methods; None: all.
    :param routes: only requests to these paths: templates like ``/users/{id}`` (a segment) and ``/files/{rest:path}``
        (the rest); None: all.
    :param when: only requests for which this is true.
    :param exempt: not those for which this is true.
    :param cost: tokens of a request, an int of 1 or more, or a callable that is given the request; for 0 it is exempt.
    :param missing: what becomes of a request without the key: an error (400), or it is not limited.
    :raises InvalidConfigurationError: for what cannot be.

    The callables may be ``async`` where the limiter is.
    """

    __slots__ = ("_paths", "cost", "exempt", "key", "limits", "methods", "missing", "name", "named", "routes", "when")

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
    ) -> None:
        self.limits = limits if isinstance(limits, Plans) or callable(limits) else BucketConfiguration.of(limits)
        self.named = name is not None
        self.name = _checked_name(self.limits, name)
        self.key = client_ip() if key is None else key
        if not callable(self.key):
            raise InvalidConfigurationError(f"key must be a callable, client_ip() say, not {brief(key)}", "key")
        self.methods = None if methods is None else _checked_methods(methods)
        self.routes = None if routes is None else tuple(_listed(routes, "routes"))
        self._paths = None if self.routes is None else [_path(route) for route in self.routes]
        self.when = when
        self.exempt = exempt
        if not callable(cost) and (isinstance(cost, bool) or not isinstance(cost, int) or cost < 1):
            raise InvalidConfigurationError(f"cost must be an int above 0, or a callable, not {brief(cost)}", "cost")
        self.cost = cost
        if not isinstance(missing, Missing):
            raise InvalidConfigurationError(f"missing must be a Missing, not {brief(missing)}", "missing")
        self.missing = missing

    @classmethod
    def of(cls, rule: Rule | RuleLimits, **settings: Unpack[RuleSettings]) -> Rule:
        """A rule from whatever a caller may give for one: itself, or limits, and other settings with them.

        :raises InvalidArgumentError: for settings beside a rule.
        """
        if not isinstance(rule, Rule):
            return cls(rule, **settings)
        if settings:
            raise InvalidArgumentError(f"a Rule has its settings already; {brief(', '.join(settings))} goes there")
        return rule

    def __repr__(self) -> str:
        return f"Rule({self.limits!r}, key={self.key!r}, name={self.name!r})"

    def is_about(self, request: HttpRequest) -> bool:
        """Whether method and path of a request are those of the rule."""
        if self.methods is not None and request.method not in self.methods:
            return False
        return self._paths is None or any(path.fullmatch(request.path) for path in self._paths)

    def stored_key(self, key: Key) -> Key:
        """The key of the bucket: after the rule's name, that of the request."""
        return bucket_key(self.name, key)

    def policy_name(self, configuration: BucketConfiguration, bandwidth: Bandwidth) -> str:
        """What clients are told that a bandwidth is called."""
        if len(configuration.bandwidths) == 1:
            return self.name
        own = bandwidth.id if bandwidth.id and _PRINTABLE.fullmatch(bandwidth.id) else _printed(bandwidth)
        return f"{self.name}: {own}" if self.named else own


def checked_rules(rules: Collection[Rule | RuleLimits]) -> tuple[Rule, ...]:
    """Rules from whatever callers may give for them.

    :raises InvalidConfigurationError: where two of one name differ in their limits.
    """
    checked = tuple(Rule.of(rule) for rule in rules)
    limits: dict[str, object] = {}
    for rule in checked:
        if limits.setdefault(rule.name, rule.limits) != rule.limits:
            raise InvalidConfigurationError(f"two rules with other limits have the name {brief(rule.name)}", "name")
    return checked


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
    return frozenset(method.upper() for method in _listed(methods, "methods"))


def _listed(texts: Collection[str], name: str) -> Collection[str]:
    if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
        raise InvalidConfigurationError(f"{name} must be a list of texts, not {brief(texts)}", name)
    return texts


_PARAMETER: Final = re.compile(r"\{(\w+)(:path)?\}")


def _path(route: str) -> re.Pattern[str]:
    """The pattern of a template."""
    if not route.startswith("/"):
        raise InvalidConfigurationError(f"a route begins with a slash, unlike {brief(route)}", "routes")
    if re.search(r"[{}]", _PARAMETER.sub("", route)):
        raise InvalidConfigurationError(f"a parameter is {{name}} or {{name:path}}, unlike {brief(route)}", "routes")
    pattern, end = "", 0
    for parameter in _PARAMETER.finditer(route):
        pattern += re.escape(route[end : parameter.start()]) + (".*" if parameter[2] else "[^/]+")
        end = parameter.end()
    return re.compile(pattern + re.escape(route[end:]), re.DOTALL)
