"""Plans: which limits a customer has, looked up elsewhere, and in force on live buckets when they change."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, SupportsIndex, TypeAlias

from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import NANOS_PER_SECOND, Duration, to_nanos
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration, Limits
from ratelimit.errors import InvalidConfigurationError
from ratelimit.integrations.http.callables import answer_of
from ratelimit.integrations.http.keys import RequestKey
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.keys import Key, brief
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps

_RENEWAL_SECONDS: Final = 5.0  # for which others go on with what is known, while one looks it up anew

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
    """What a plan comes to for a bucket; a configuration of None: not limited."""

    configuration: BucketConfiguration | None
    version: int | None


@dataclass(slots=True, eq=False)
class _Entry:
    found: PlanLimits
    fresh_until: float


class Plans(OfThisProcess):
    """The limits of each plan, and who has which.

    ::

        Plans({"free": "20/hour", "paid": "1000/hour", "internal": None}, plan_of)

    where ``plan_of("acme")`` answers ``Assigned("paid", version=7)``, or the name of the plan alone, which counts for
    new buckets only, or None for the default plan.

    :param plans: limits by the name of the plan; None: not limited.
    :param plan_of: the look-up: is called with the key, without the rule's name; plain, or ``async`` where the limiter
        is. What it raises is raised, unless an older answer is there: then that one counts on, and a warning is logged.
    :param by: the key that is looked up; by default that of the rule. To be named where that one is a hash, or has a
        route in it: ``by=header("x-api-key")``. A request without it has the default plan.
    :param default: the plan of those of whom the look-up knows none. None: then that is an error.
    :param version: of the plans themselves: raise it with every change of their limits.
    :param inheritance: what becomes of the tokens of a live bucket. By default its fill level is kept, so that there is
        nothing to be gained by changing plans to and fro.
    :param ttl: for how long an answer of the look-up counts, in seconds or as a ``timedelta``; 0: not at all. For as
        long processes may be behind when a plan changes.
    :param size: answers kept, the least recently used go first.
    :param clock: seconds of a clock that only goes forward.
    :raises InvalidConfigurationError: for limits, a default, or numbers that cannot be.
    """

    def __init__(
        self,
        plans: Mapping[str, Limits | None],
        plan_of: PlanOf,
        *,
        by: RequestKey | None = None,
        default: str | None = None,
        version: int = 0,
        inheritance: TokensInheritance = TokensInheritance.PROPORTIONALLY,
        ttl: Duration = 60,
        size: int = 10_000,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._plans = {name: None if one is None else BucketConfiguration.of(one) for name, one in plans.items()}
        if default is not None and default not in self._plans:
            raise InvalidConfigurationError(f"default must be one of the plans, not {brief(default)}", "default")
        if isinstance(version, bool) or not isinstance(version, int) or version < 0:
            raise InvalidConfigurationError(f"version must be an int of 0 or more, not {brief(version)}", "version")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidConfigurationError(f"size must be an int of 1 or more, not {brief(size)}", "size")
        if not isinstance(inheritance, TokensInheritance):
            raise InvalidConfigurationError(
                f"inheritance must be a TokensInheritance, not {brief(inheritance)}", "inheritance"
            )
        self.inheritance = inheritance
        self._by = by
        self._plan_of = plan_of
        self._default = default
        self._version = version
        self._ttl = _seconds(ttl)
        self._size = size
        self._clock = clock
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = fork_safety.lock()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle the plans, without the answers that this process has kept."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_entries", "_lock")}
        return _restored, (type(self), kept)

    def forget(self, key: Key) -> None:
        """Look a key up anew at its next use, in this process."""
        fork_safety.check()
        with self._lock:
            self._entries.pop(key, None)

    def limits_of(self, request: HttpRequest, key: Key) -> Steps[PlanLimits]:
        """The limits of a request that has this key by its rule: by the look-up, or by its last answer."""
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
            _logger.warning("a plan could not be looked up, the last one known counts on: %s", brief(error))
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
            raise InvalidConfigurationError(f"the look-up must give a plan that there is, not {brief(name)}", "plan_of")
        if version is None:
            return PlanLimits(self._plans[name], self._version or None)
        if isinstance(version, bool) or not isinstance(version, int) or version < 0:
            raise InvalidConfigurationError(
                f"the version of a plan must be an int of 0 or more, not {brief(version)}", "plan_of"
            )
        # Each only ever grows, hence the sum grows with either.
        return PlanLimits(self._plans[name], self._version + version)


def _restored(cls: type[Plans], kept: dict[str, Any]) -> Plans:
    plans = cls.__new__(cls)
    vars(plans).update(kept, _entries=OrderedDict(), _lock=fork_safety.lock())
    return plans


def _seconds(ttl: Duration) -> float:
    try:
        nanos = to_nanos(ttl)
    except (TypeError, ValueError) as error:
        raise InvalidConfigurationError(f"ttl {error}", "ttl") from None
    if nanos < 0:
        raise InvalidConfigurationError(f"ttl must be 0 or more, not {brief(ttl)}", "ttl")
    return nanos / NANOS_PER_SECOND
