"""The limiters: decisions about requests of any type by rules, as steps that the sync and the asyncio face run."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeAlias, TypedDict, TypeVar, Unpack

from ratelimit.all_of import charging
from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.checks import function, stored_key
from ratelimit.core.algorithm import Configuration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.engine.on_error import ErrorPolicy
from ratelimit.engine.question import new_tuple
from ratelimit.errors import InvalidConfigurationError, RateLimitError
from ratelimit.keys import Key
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.policy.callables import answer_of, answered_cost, answered_key
from ratelimit.policy.decision import Decision, Outcome
from ratelimit.policy.logs import OtherLimits, RefusalLog
from ratelimit.policy.managers import async_manager_of, bucket_key, manager_of, namespace_of
from ratelimit.policy.recording import record, recorders
from ratelimit.policy.rule import AmbiguousKeyError, Missing, Rule, RuleLimits, checked_rules
from ratelimit.policy.switch import is_enabled
from ratelimit.policy.waiting import consumed
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run
from ratelimit.stores.urls import without_secrets

R = TypeVar("R")

OnRefused: TypeAlias = Callable[[R, Decision[R]], Awaitable[object] | object]
"""Is called for each request that is refused; what it returns is dropped. May be async where the limiter is."""


class LimiterSettings(TypedDict, Generic[R], total=False):
    """What limiters take besides their rules and their manager."""

    on_error: ErrorPolicy | None
    """What is decided where the store fails. None: what the manager decides then."""
    on_refused: OnRefused[R] | None
    """Is called with the request and the decision for each request that is refused."""
    namespace: str | None
    """Separates services that share a Redis, by their keys. None: that of the variable ``RATELIMIT_NAMESPACE``."""
    enabled: bool
    """False: every request goes on, and nothing is counted, as where ``RATELIMIT_ENABLED`` is ``false``."""


# Handles of buckets take a while to make.
_KEPT_BUCKETS: Final = 10_000
_LONGEST_KEPT_KEY: Final = 1_024

_NOTHING_DECIDED: Final[Decision[Any]] = Decision()

_logger = logging.getLogger("ratelimit")


class _Charge(NamedTuple):
    """What a rule charges a request.

    :param key: the key of the request, as the rule's key has found it; None where the rule has no key.
    :param configuration: the limits of the rule for this request.
    """

    rule: Rule[Any]
    key: Key | None
    bucket: Bucket | AsyncBucket
    tokens: int
    configuration: Configuration


class _WithoutKeyError(Exception):
    """Raised where a request has no key by which a rule could limit it.

    :ivar fault: says what is wrong with the key, where it is not missing but ambiguous.
    """

    def __init__(self, rule: Rule[Any], fault: str | None = None) -> None:
        super().__init__(fault)
        self.rule = rule
        self.fault = fault


class BaseLimiter(OfThisProcess, Generic[R]):
    """Decides about requests by rules; :class:`Limiter` and :class:`AsyncLimiter` are its two faces."""

    _advice = "pickle its rules, and make it in each process"

    _face: ClassVar[type[Bucket | AsyncBucket]]
    _rule_type: ClassVar[type[Rule[Any]]] = Rule
    """The class of the rules that are made from limits alone."""

    def __init__(
        self,
        *rules: Rule[R] | RuleLimits[R],
        manager: ProxyManager | AsyncProxyManager | str | None,
        on_error: ErrorPolicy | None = None,
        on_refused: OnRefused[R] | None = None,
        namespace: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.rules = checked_rules([self._rule_type.of(rule) for rule in rules])
        self._shown_manager = without_secrets(manager) if isinstance(manager, str) else manager
        self._on_error = on_error
        self._on_refused = None if on_refused is None else function(on_refused, "on_refused", InvalidConfigurationError)
        self._namespace = namespace_of(namespace)
        self._enabled = enabled
        self._kept_bucket = lru_cache(_KEPT_BUCKETS)(self._bucket_of)
        self._refusals = RefusalLog()
        self._other_limits = OtherLimits()

    def __repr__(self) -> str:
        shown = [*map(repr, self.rules)]
        if self._shown_manager is not None:
            shown.append(f"manager={self._shown_manager!r}")
        if self._namespace:
            shown.append(f"namespace={self._namespace!r}")
        if not self._enabled:
            shown.append("enabled=False")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def _buckets(self) -> ProxyManager | AsyncProxyManager:
        raise NotImplementedError

    def _decided_before(self, request: R) -> Decision[R]:
        """Return what has been decided about a request already, by other limiters or by this one."""
        return _NOTHING_DECIDED

    def _keep(self, request: R, decision: Decision[R]) -> None:
        """Keep a decision for whoever asks what has been decided about the request."""

    def _decide(self, request: R, place: str) -> Steps[Decision[R]]:
        """Decide by all rules at once: the request pays for each bucket, or for none.

        If it is refused, what it has paid to other limiters before is given back.
        """
        decision = self._decided_before(request)
        if not self._enabled or not is_enabled():
            return decision
        if decision:
            decision = yield from self._decided(place, request, decision)
            if not decision:
                yield from self._refused(request, decision)
        self._keep(request, decision)
        return decision

    def _decided(self, place: str, request: R, decision: Decision[R]) -> Steps[Decision[R]]:
        """Find what each rule charges the request, charge all of it, and return the decision after that."""
        charges: list[_Charge] = []
        so_far = decision, charges
        try:
            for rule in self.rules:
                if rule.is_about(request):
                    charge = yield from self._found(rule, place, request, so_far)
                    if charge is not None:
                        charges.append(charge)
        except _WithoutKeyError as error:
            return type(decision)(decision.outcomes, error.rule, request, error.fault)
        if not charges:
            return decision
        if len(charges) > 1:
            shares = [(charge.bucket, charge.tokens) for charge in charges]
            results = yield from charging(shares, [charge.rule.max_wait_nanos for charge in charges])
            outcomes = tuple([self._outcome(*each) for each in zip(charges, results, strict=True)])
        else:
            # One bucket is the common case, and is asked as it is by itself.
            ((rule, _, bucket, tokens, _),) = charges
            if rule.max_wait_nanos == 0:
                result = yield bucket.verbose.try_consume_and_return_remaining(tokens)
            else:
                result = yield from consumed(bucket, tokens, rule.max_wait_nanos)
            outcomes = (self._outcome(charges[0], result),)
        return type(decision)(decision.outcomes + outcomes, None, request)

    def _found(
        self, rule: Rule[R], place: str, request: R, so_far: tuple[Decision[R], Sequence[_Charge]]
    ) -> Steps[_Charge | None]:
        """Return what a rule charges a request; None for what is free, not limited, or paid for by another rule.

        :param so_far: what the request has paid for already, and what it is going to be charged.
        :raises _WithoutKeyError: where the request must have a key, and has none or several.
        """
        if (rule.when is not None or rule.exempt is not None) and not (yield from rule.applies(request)):
            return None
        key: Any = rule.key
        if callable(key):
            try:
                key = yield from answer_of(key(request))
            except AmbiguousKeyError as error:
                raise _WithoutKeyError(rule, str(error)) from error
            if key is None:
                if rule.missing is Missing.UNLIMITED:
                    return None
                raise _WithoutKeyError(rule)
            if type(key) is not str:
                answered_key(key)
        name = self._unpaid(rule, place, key, request, so_far)
        if name is None:
            return None
        if rule.is_looked_up or callable(rule.cost):
            return (yield from self._charge_of_request(rule, key, name, request))
        return self._charge(rule, key, name, rule.cost, (rule.limits, rule.version))

    def _unpaid(
        self, rule: Rule[R], place: str, key: Key | None, request: R, so_far: tuple[Decision[R], Sequence[_Charge]]
    ) -> Key | None:
        """Return the name of the bucket of a request to which a rule gives this key; None where it is paid for."""
        counted_by = None if key is None else rule.counted_by(request, key)
        name = bucket_key(rule.bucket_name(place), counted_by, self._namespace)
        decision, charges = so_far
        for paid in decision.outcomes:
            if _is_one(paid.bucket.key, name):
                if rule.named and not rule.is_looked_up:
                    self._compare(rule, rule.limits, paid.result)
                return None
        for charge in charges:
            if _is_one(charge.bucket.key, name):
                return None
        return name

    def _charge_of_request(self, rule: Rule[R], key: Key | None, name: Key, request: R) -> Steps[_Charge | None]:
        """Return what a rule charges whose cost or limits have to be found; None for what is free or not limited."""
        tokens: Any = rule.cost
        if callable(tokens):
            tokens = answered_cost((yield from answer_of(tokens(request))))
            if tokens == 0:
                return None
        limits = rule.limits, rule.version
        if rule.is_looked_up:
            limits = yield from rule.limits_of(request, rule.name if key is None else key)
            if limits[0] is None:
                return None
        return self._charge(rule, key, name, tokens, limits)

    def _charge(
        self, rule: Rule[R], key: Key | None, name: Key, tokens: Any, limits: tuple[Any, int | None]
    ) -> _Charge:
        """Return what a rule charges the bucket of this name."""
        configuration, version = limits
        is_kept = configuration is rule.limits and len(name) <= _LONGEST_KEPT_KEY
        bucket_of = self._kept_bucket if is_kept else self._bucket_of
        bucket = bucket_of(self._buckets, name, configuration, version, rule.inheritance)
        return new_tuple(_Charge, (rule, key, bucket, tokens, configuration))

    def _outcome(self, charge: _Charge, result: VerboseResult[ConsumptionProbe]) -> Outcome:
        """Return what a rule has decided; log where the bucket has other limits, and report it to recorders."""
        rule, key, bucket, tokens, configuration = charge
        if rule.named:
            self._compare(rule, configuration, result)
        outcome = Outcome(rule, key, bucket, tokens, result)
        if recorders:
            record(rule.name, key, admitted=not outcome.refuses)
        return outcome

    def _compare(self, rule: Rule[R], wanted: Configuration, result: VerboseResult[ConsumptionProbe]) -> None:
        """Log where a bucket has other limits than its rule; a local bucket that stands in for it may have others."""
        if result.configuration is not None and not result.degraded:
            self._other_limits.compare(rule.name, wanted, result.configuration)

    def _bucket_of(
        self,
        manager: ProxyManager | AsyncProxyManager,
        stored_key: Key,
        configuration: Configuration,
        version: int | None,
        inheritance: TokensInheritance,
    ) -> Bucket | AsyncBucket:
        return manager.bucket(
            stored_key,
            configuration,
            configuration_version=version,
            inheritance=inheritance,
            on_error=self._on_error,
        )

    def _refused(self, request: R, decision: Decision[R]) -> Steps[None]:
        """Do what a refusal entails: give back what the request has paid, log it, and call the hook."""
        yield from self._give_back(decision)
        refused = decision.refused
        if refused is not None:
            self._refusals.log(refused.rule.name, refused.key, refused.configuration)
        if self._on_refused is not None:
            yield from answer_of(self._on_refused(request, decision))

    def _give_back(self, decision: Decision[R]) -> Steps[None]:
        """Give back what a request has paid if it is refused in the end."""
        for outcome in decision.outcomes:
            if not outcome.is_open or not outcome.claim() or outcome.probe.degraded:
                continue
            try:
                yield self._own(outcome).give_back(outcome.tokens)
            except RateLimitError as error:  # the client must be shown the refusal, not this error
                _logger.warning("%d tokens of a refused request could not be given back: %s", outcome.tokens, error)

    def _own(self, outcome: Outcome) -> Bucket | AsyncBucket:
        """Return the bucket of an outcome, in the face of this limiter.

        A limiter of the other face may have paid: an async middleware, say, around a sync view.
        """
        bucket = outcome.bucket
        return bucket if isinstance(bucket, self._face) else self._buckets.bucket(bucket.key, outcome.configuration)


def _is_one(key: Key, other: Key) -> bool:
    """Return whether two keys are one in the store, where text is stored as bytes."""
    return key == other or (type(key) is not type(other) and stored_key(b"", key) == stored_key(b"", other))


class Limiter(BaseLimiter[R]):
    """Decides about requests, one after another, by rules whose buckets a manager has.

    :param rules: limits alone stand for a rule for all requests. All rules that are about a request are one decision:
        it pays for each of their buckets, or for none.
    :param manager: the manager of the buckets, or its URL; None: that of the variable ``RATELIMIT_URL``, or localhost.
    :param settings: those of every limiter, see :class:`LimiterSettings`.
    """

    _face = Bucket

    def __init__(
        self,
        *rules: Rule[R] | RuleLimits[R],
        manager: ProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings[R]],
    ) -> None:
        super().__init__(*rules, manager=manager, **settings)
        self._manager = manager if isinstance(manager, str | None) else manager_of(manager)

    @property
    def _buckets(self) -> ProxyManager:
        return manager_of(self._manager)

    def decide(self, request: R, place: str = "") -> Decision[R]:
        """Decide whether a request may go on.

        :param place: where the rules stand: what rules without a name count for; empty for a whole application.
        :raises RateLimitError: where the store fails, and the policy is to raise.
        """
        return run(self._decide(request, place))


class AsyncLimiter(BaseLimiter[R]):
    """A :class:`Limiter` for asyncio, whose callables may be ``async``."""

    _face = AsyncBucket

    def __init__(
        self,
        *rules: Rule[R] | RuleLimits[R],
        manager: AsyncProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings[R]],
    ) -> None:
        super().__init__(*rules, manager=manager, **settings)
        self._manager = manager if isinstance(manager, str | None) else async_manager_of(manager)

    @property
    def _buckets(self) -> AsyncProxyManager:
        return async_manager_of(self._manager)

    async def decide(self, request: R, place: str = "") -> Decision[R]:
        """See :meth:`Limiter.decide`."""
        return await arun(self._decide(request, place))
