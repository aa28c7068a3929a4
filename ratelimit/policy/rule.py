"""Rules: which requests are limited, by which key, to what, and at which cost. Requests are of any type."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from copy import copy
from enum import Enum
from functools import lru_cache
from typing import Any, ClassVar, Final, Generic, Self, TypeAlias, TypeVar

from ratelimit.checks import boolean, function, instance, refusal
from ratelimit.core.algorithm import Configuration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.limits import Limits, configuration_of
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError
from ratelimit.keys import Key, brief
from ratelimit.policy.callables import answer_of, checked_cost, name_of, required_arguments
from ratelimit.policy.managers import checked_version
from ratelimit.policy.plans import PlanLimits, Plans
from ratelimit.runtime.steps import Steps

R = TypeVar("R")
RuleT = TypeVar("RuleT", bound="Rule[Any]")

RuleKey: TypeAlias = Callable[[R], Key | Awaitable[Key | None] | None]
Predicate: TypeAlias = Callable[[R], bool | Awaitable[bool]]
Cost: TypeAlias = int | Callable[[R], int | Awaitable[int]]
LimitsOfKey: TypeAlias = Callable[[Any], Limits | Awaitable[Limits | None] | None]
LimitsOfRequest: TypeAlias = Callable[[Any, R], Limits | Awaitable[Limits | None] | None]
RuleLimits: TypeAlias = Limits | Plans | LimitsOfKey | LimitsOfRequest[R]

# Text that a policy may be named by: every protocol and every log can carry printable ASCII.
PRINTABLE: Final = re.compile(r"[\x20-\x7e]{1,200}")


class Missing(Enum):
    """How a request without a key ends."""

    ERROR = "error"
    """It is in error, and is not let through."""
    UNLIMITED = "unlimited"
    """It is let through, and counts for nobody."""


class AmbiguousKeyError(Exception):
    """Raised by a key if a request has several values for it: the request is in error, whatever ``missing`` says."""


class Rule(Generic[R]):
    """A limit, and the requests that it is for.

    ::

        Rule("10/minute", key=lambda order: order.customer, cost=lambda order: len(order.lines), name="orders")

    A bucket is named by the rule and the request's key. A rule without a name counts for the place where it stands.
    Rules of one name share their buckets wherever they stand, and a request pays for each bucket once. Rules that are
    made alike are equal.

    :param limits: text, a limit, a list of limits, ``Plans``, or a callable that is given the key, or
        the key and the request, and answers with limits, or with None for a key that is not limited. Where the rule has
        no key, it is given the name of the rule.
    :param key: whose bucket it is: a ``str`` or ``bytes``, or a callable that is given the request. None: all requests
        share a bucket.
    :param name: a part of the bucket's key, and the name of the policy that clients see. Without one, clients see the
        text of the limits, or ``default`` where they are looked up.
    :param when: only requests for which this is true.
    :param exempt: only requests for which this is false.
    :param cost: tokens of a request, an int of 1 or more, or a callable that is given the request; for 0 it is free.
    :param missing: how a request without the key ends: in an error, or without being limited.
    :param version: of the limits, an int of 0 or more. Raise it whenever the limits of a rule with a name change:
        buckets with limits of a lower version, or none, get the new ones and keep their fill level. None: stored
        buckets keep the limits that they were made with. With ``Plans``, it is added to the version of the plan.
    :param enabled: False: the rule limits no request.
    :raises InvalidConfigurationError: for arguments that are not valid.

    The callables may be ``async`` where the limiter is.
    """

    __slots__ = (
        *("_gives_request", "_has_key", "_hash", "cost", "enabled", "exempt", "inheritance", "is_looked_up", "key"),
        *("limits", "missing", "name", "named", "version", "when"),
    )

    max_wait_nanos: int | None = 0
    """The longest wait for the tokens of a request, in nanoseconds; None: as long as it takes.

    Of several rules that decide together, each says how long a request may wait because of it: one that accepts no wait
    refuses at once, also where others would let the request wait."""

    _shown_settings: ClassVar[dict[str, object]] = {
        "when": None,
        "exempt": None,
        "cost": 1,
        "missing": Missing.ERROR,
        "version": None,
        "enabled": True,
    }
    """The settings that are printed and compared, in their order, with their defaults."""

    def __init__(
        self,
        limits: RuleLimits[R],
        *,
        key: RuleKey[R] | Key | None = None,
        name: str | None = None,
        when: Predicate[R] | None = None,
        exempt: Predicate[R] | None = None,
        cost: Cost[R] = 1,
        missing: Missing = Missing.ERROR,
        version: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.is_looked_up = isinstance(limits, Plans) or callable(limits)
        self.limits: Any = limits if self.is_looked_up else configuration_of(limits)
        self.inheritance = limits.inheritance if isinstance(limits, Plans) else TokensInheritance.PROPORTIONALLY
        self._gives_request = callable(limits) and required_arguments(limits) == 2
        self.named = name is not None
        self.name = self._checked_name(self._default_name() if name is None else name)
        self._has_key = key is not None
        self.key = self._checked_key(key)
        self.when = None if when is None else function(when, "when", InvalidConfigurationError)
        self.exempt = None if exempt is None else function(exempt, "exempt", InvalidConfigurationError)
        self.cost: Cost[R] = checked_cost(cost, InvalidConfigurationError)
        self.missing = instance(missing, Missing, "missing", "a Missing", InvalidConfigurationError)
        self.version = checked_version(version)
        self.enabled = boolean(enabled, "enabled", InvalidConfigurationError)
        self._hash = hash((self.name, self.named, self.version))

    @classmethod
    def of(cls, rule: Self | RuleLimits[R], **settings: Any) -> Self:
        """Return a rule for whatever a caller may give for one: itself, or limits and other settings with them.

        :raises InvalidArgumentError: for settings beside a rule.
        """
        if not isinstance(rule, Rule):
            return cls(rule, **settings)
        if not isinstance(rule, cls):
            raise refusal("rule", f"a {cls.__module__}.{cls.__qualname__} or limits", rule)
        if settings:
            raise InvalidArgumentError(f"a Rule has its settings already; {brief(', '.join(settings))} goes there")
        return rule

    def _default_name(self) -> str:
        return "default" if self.is_looked_up else str(self.limits)

    def _checked_name(self, name: str) -> str:
        return instance(name, str, "name", "a str", InvalidConfigurationError)

    def _checked_key(self, key: Any) -> Any:
        if key is None or callable(key):
            return key
        return instance(key, (str, bytes), "key", "a str, bytes, or a callable", InvalidConfigurationError)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return self is other or (type(self) is type(other) and self._parts() == other._parts())

    def __hash__(self) -> int:
        return self._hash

    def _parts(self) -> tuple[object, ...]:
        settings = [getattr(self, name) for name in self._shown_settings]
        return (self.limits, self.key, self.name, self.named, *settings)

    def __repr__(self) -> str:
        limits = self.limits if self.is_looked_up else str(self.limits)
        shown = [repr(limits)]
        if self.key is not None:
            shown.append(f"key={self.key!r}")
        if self.named:
            shown.append(f"name={self.name!r}")
        for name, default in self._shown_settings.items():
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={sorted(value) if isinstance(value, frozenset) else value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def by(self, key: RuleKey[R] | None) -> Self:
        """Return the rule with this key; the rule itself if it was given a key of its own, or if this one is None."""
        if self._has_key or key is None:
            return self
        rule = copy(self)
        rule.key = key
        return rule

    def is_about(self, request: R) -> bool:
        """Return whether the rule is about such requests at all, before its callables are asked."""
        return self.enabled

    def applies(self, request: R) -> Steps[bool]:
        """Return whether the rule limits a request, by ``when`` and ``exempt``."""
        if self.when is not None and not (yield from answer_of(self.when(request))):
            return False
        return self.exempt is None or not (yield from answer_of(self.exempt(request)))

    def limits_of(self, request: R, key: Key) -> Steps[PlanLimits]:
        """Look up the limits of a request that has this key, and their version."""
        look_up = self.limits
        if isinstance(look_up, Plans):
            found = yield from look_up.limits_of(request, key)
            if self.version is None:
                return found
            return PlanLimits(found.configuration, self.version + (found.version or 0))
        limits = yield from answer_of(look_up(key, request) if self._gives_request else look_up(key))
        return PlanLimits(None if limits is None else configuration_of(limits), self.version)

    def bucket_name(self, place: str) -> tuple[str, ...]:
        """Return what the rule's buckets are named by, before the keys of requests: see ``bucket_key``.

        That is the rule's name. A rule without one is named by all that distinguishes it from others: its place, its
        limits, and by which key it counts. With other limits it has other buckets.

        :param place: where the rule stands; empty for a whole application.
        """
        if self.named:
            return (self.name,)
        return (place, self.name) if self.key is None else (place, self.name, name_of(self.key))

    def policy_name(self, configuration: Configuration, limit: Any) -> str:
        """Return the name that clients see for one of the limits of a configuration."""
        if len(configuration) == 1:
            return self.name
        id = getattr(limit, "id", None)
        own = id if id and PRINTABLE.fullmatch(id) else _printed(limit)
        return f"{self.name}: {own}" if self.named else own

    def counted_by(self, request: R, key: Key) -> Key:
        """Return what follows the bucket's name for a request that has this key."""
        return key


def checked_rules(rules: Collection[RuleT]) -> tuple[RuleT, ...]:
    """Return the rules of one place.

    :raises InvalidConfigurationError: where two rules of one name have different limits, or where two rules without a
        name would share their buckets.
    """
    names = Names()
    for rule in rules:
        names.add(rule)
    return tuple(rules)


class Names:
    """The rules of an application by the names of their buckets; finds those that would share buckets by mistake."""

    def __init__(self) -> None:
        self._rules: dict[tuple[str, ...], Rule[Any]] = {}

    def add(self, rule: Rule[Any], place: str = "") -> None:
        """Add a rule that stands at a place.

        :raises InvalidConfigurationError: where another rule with other limits has its name, or where it has no name
            and would share its buckets with another rule.
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


def _shown(rule: Rule[Any]) -> str:
    limits = rule.limits if rule.is_looked_up else str(rule.limits)
    return brief(limits) + (f" of version {rule.version}" if rule.version is not None else "")


@lru_cache(maxsize=1024)
def _printed(limit: Any) -> str:
    return str(limit).encode("ascii", "backslashreplace").decode()[:200]
