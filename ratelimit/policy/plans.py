"""Plans: which limits a customer has, looked up elsewhere, and applied to live buckets when they change."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, SupportsIndex, TypeAlias

from ratelimit.checks import instance, nanos_from_zero, refusal, whole_number
from ratelimit.core.algorithm import Configuration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.limits import Limits, configuration_of
from ratelimit.core.numbers import NANOS_PER_SECOND, Duration
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import Key, brief
from ratelimit.policy.callables import answer_of
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps

# While one caller looks a plan up again, the others go on with the last answer for this long.
_RENEWAL_SECONDS: Final = 5.0

_logger = logging.getLogger("ratelimit")


class Assigned(NamedTuple):
    """The plan of a customer.

    :param plan: the name of the plan.
    :param version: a number of 0 or more that grows with every change of this customer's plan: the revision of the
        subscription, or the time at which it was changed. A bucket whose limits are of a lower one gets the new ones.
    """

    plan: str
    version: int


PlanAnswer: TypeAlias = Assigned | tuple[str, int] | str | None
PlanOf: TypeAlias = Callable[[Key], PlanAnswer | Awaitable[PlanAnswer]]


class PlanLimits(NamedTuple):
    """The limits that a plan sets for a bucket, and their version; a configuration of None: not limited."""

    configuration: Configuration | None
    version: int | None


@dataclass(slots=True, eq=False)
class _Entry:
    found: PlanLimits
    fresh_until: float


class Plans(OfThisProcess):
    """The limits of each plan, and which customer has which plan.

    ::

        Plans({"free": "20/hour", "paid": "1000/hour", "internal": None}, plan_of)

    where ``plan_of("acme")`` answers ``Assigned("paid", version=7)``, or the name of the plan alone, which counts for
    new buckets only, or None for the default plan.

    :param plans: limits by the name of the plan; None: not limited.
    :param plan_of: the look-up, which is called with the key, without the rule's name; plain, or ``async`` where the
        limiter is. An error that it raises reaches the caller, unless an older answer is known: then that answer stays
        valid, and a warning is logged.
    :param by: a callable that is given the request, and answers with the key that is looked up; by default that is the
        key of the rule. It is needed where the rule's key is a hash, or has a route in it: ``by=header("x-api-key")``.
        A request without this key has the default plan.
    :param default: the plan of customers that the look-up does not know. None: then that is an error.
    :param version: the version of the plans themselves: raise it with every change of their limits.
    :param inheritance: how the tokens of a live bucket pass to other limits. By default its fill level is kept, so that
        nobody gains anything by changing plans and changing back.
    :param ttl: how long an answer of the look-up is valid, in seconds or as a ``timedelta``; 0: not at all. When a plan
        changes, processes may go by the old one for this long.
    :param size: the number of answers that are kept; the least recently used go first.
    :param clock: seconds of a clock that only goes forward.
    :raises InvalidConfigurationError: for limits, a default, or numbers that are not valid.
    """

    def __init__(
        self,
        plans: Mapping[str, Limits | None],
        plan_of: PlanOf,
        *,
        by: Callable[[Any], Key | Awaitable[Key | None] | None] | None = None,
        default: str | None = None,
        version: int = 0,
        inheritance: TokensInheritance = TokensInheritance.PROPORTIONALLY,
        ttl: Duration = 60,
        size: int = 10_000,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._plans = {name: None if one is None else configuration_of(one) for name, one in plans.items()}
        if default is not None and default not in self._plans:
            raise refusal("default", "one of the plans", default, InvalidConfigurationError)
        self.inheritance = instance(
            inheritance, TokensInheritance, "inheritance", "a TokensInheritance", InvalidConfigurationError
        )
        self._by = by
        self._plan_of = plan_of
        self._default = default
        self._version = whole_number(version, "version", least=0, error=InvalidConfigurationError)
        self._ttl = nanos_from_zero(ttl, "ttl", InvalidConfigurationError) / NANOS_PER_SECOND
        self._size = whole_number(size, "size", error=InvalidConfigurationError)
        self._clock = clock
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = fork_safety.lock()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle the plans, without the answers that this process has kept."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_entries", "_lock")}
        return _restored, (type(self), kept)

    def forget(self, key: Key) -> None:
        """Drop what this process knows of a key, so that it is looked up at its next use."""
        fork_safety.check()
        with self._lock:
            self._entries.pop(key, None)

    def limits_of(self, request: object, key: Key) -> Steps[PlanLimits]:
        """Return the limits of a request to which its rule gives this key, by the look-up or by its last answer."""
        fork_safety.check()
        if self._by is not None:
            looked_up: Any = yield from answer_of(self._by(request))
            if looked_up is None:
                return self._limits(None)
            key = looked_up
        known = self._known(key)
        if known is not None and known.fresh_until > self._clock():
            return known.found
        if known is not None:
            known.fresh_until = self._clock() + min(self._ttl, _RENEWAL_SECONDS)
        try:
            answer = yield from answer_of(self._plan_of(key))
        except Exception as error:
            if known is None:
                raise
            _logger.warning("a plan could not be looked up, the last one known stays valid: %s", brief(error))
            return known.found
        found = self._limits(answer)
        self._keep(key, _Entry(found, self._clock() + self._ttl))
        return found

    def _known(self, key: Key) -> _Entry | None:
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
            return known

    def _keep(self, key: Key, entry: _Entry) -> None:
        if not self._ttl:
            return
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def _limits(self, answer: object) -> PlanLimits:
        name, version = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
        name = self._default if name is None else name
        if not isinstance(name, str) or name not in self._plans:
            raise InvalidConfigurationError(
                f"the answer of plan_of must be one of the plans; got {brief(name)}", "plan_of"
            )
        if version is None:
            return PlanLimits(self._plans[name], self._version or None)
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise InvalidConfigurationError(
                f"the version of a plan must be an int of 0 or more; got {brief(version)}", "plan_of"
            )
        # Both versions only grow, hence their sum grows with each of them.
        return PlanLimits(self._plans[name], self._version + version)


def _restored(cls: type[Plans], kept: dict[str, Any]) -> Plans:
    plans = cls.__new__(cls)
    vars(plans).update(kept, _entries=OrderedDict(), _lock=fork_safety.lock())
    return plans
