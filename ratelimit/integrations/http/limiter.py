"""The limiters: decisions about requests by rules, as steps that the sync and the asyncio face drive."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final, TypeAlias, TypedDict, Unpack

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError, RateLimitError
from ratelimit.integrations.http.answers import Answers, Headers
from ratelimit.integrations.http.callables import answer_of
from ratelimit.integrations.http.decision import HttpDecision, Outcome, service_limits
from ratelimit.integrations.http.keys import Missing
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule, RuleLimits, checked_rules
from ratelimit.integrations.logs import OtherLimits, RefusalLog
from ratelimit.integrations.managers import async_manager_of, bucket_key, manager_of, namespace_of
from ratelimit.integrations.recording import record, recorders
from ratelimit.integrations.switch import is_enabled
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run
from ratelimit.stores.urls import without_secrets

OnRefused: TypeAlias = Callable[[HttpRequest, HttpDecision], Awaitable[object] | object]
"""Hears of each request that is refused; what it returns does not matter. May be ``async`` where the limiter is."""


class LimiterSettings(TypedDict, total=False):
    """What limiters and integrations take beside their rules and their manager."""

    answers: Answers | None
    """What clients are told; ``Answers()`` by default."""
    on_error: ErrorPolicy | None
    """What is decided where the store fails.

    None: what the manager was made with, if it was given an ``on_error``, else ``OnError.DENY``, which is answered with
    503."""
    on_refused: OnRefused | None
    """Is called with the request and the decision for each request that is refused, before it is answered."""
    namespace: str | None
    """Separates services that share a Redis, by their keys. None: that of the variable ``RATELIMIT_NAMESPACE``."""
    enabled: bool
    """False: every request goes on, and nothing is counted, as where ``RATELIMIT_ENABLED`` is ``false``."""


NOTE: Final = "ratelimit"
"""The name under which the decision about a request is kept with it."""

_ANSWERS: Final = "ratelimit.answers"  # the same for those that make the fields of its answer

_NOTHING_DECIDED: Final = HttpDecision()
_KEPT_BUCKETS: Final = 10_000  # handles, which take a while to make
_LONGEST_KEPT_KEY: Final = 1_024

_logger = logging.getLogger("ratelimit")


class _Limiter(OfThisProcess):
    """What a limiter of either face does about a request."""

    _advice = "pickle its rules, and make it in each process"

    _face: ClassVar[type[Bucket | AsyncBucket]]

    def __init__(
        self,
        rules: Collection[Rule | RuleLimits],
        manager: ProxyManager | AsyncProxyManager | str | None,
        *,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
        on_refused: OnRefused | None = None,
        namespace: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.rules = checked_rules(rules)
        self._shown_manager = without_secrets(manager) if isinstance(manager, str) else manager
        self.answers = Answers() if answers is None else answers
        self._has_own_answers = answers is not None
        has_policy = isinstance(manager, ProxyManager | AsyncProxyManager) and manager.has_error_policy
        # To deny is a 503; an error would be a 500, and a traceback for each request.
        self._on_error = OnError.DENY if on_error is None and not has_policy else on_error
        if on_refused is not None and not callable(on_refused):
            raise InvalidConfigurationError(f"on_refused must be a callable; got {brief(on_refused)}", "on_refused")
        self._on_refused = on_refused
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

    def _decide(self, request: HttpRequest, place: str) -> Steps[HttpDecision]:
        """Ask one rule after the other, until one refuses: then what the request has paid so far is given back."""
        decision = decision_about(request)
        if not self._enabled or not is_enabled():
            return decision
        for rule in self.rules:
            if not decision:
                break
            if not rule.is_about(request) or not (yield from _applies(rule, request)):
                continue
            key: Any = yield from answer_of(rule.key(request))
            if key is None and rule.missing is Missing.ERROR:
                decision = HttpDecision(decision.outcomes, missing=rule, request=request)
            elif key is not None:
                decision = yield from self._decided_by(rule, place, key, request, decision)
            if not decision:
                yield from self._refused(request, decision)
        request.notes[NOTE] = decision
        if self._has_own_answers:
            request.notes[_ANSWERS] = self.answers
        return decision

    def _decided_by(
        self, rule: Rule, place: str, key: Key, request: HttpRequest, decision: HttpDecision
    ) -> Steps[HttpDecision]:
        """Return the decision as it is after one rule more."""
        stored_key = bucket_key(rule.bucket_name(place), rule.counted_by(request, key), self._namespace)
        paid = next((outcome for outcome in decision.outcomes if outcome.bucket.key == stored_key), None)
        if paid is not None:
            if isinstance(rule.limits, BucketConfiguration):
                self._compare(rule, rule.limits, paid.configuration, degraded=paid.probe.degraded)
            return decision
        tokens: Any = rule.cost
        if callable(tokens):
            tokens = yield from answer_of(tokens(request))
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise InvalidArgumentError(f"the cost of a request must be an int of 0 or more; got {brief(tokens)}")
        if tokens == 0:
            return decision
        configuration, version = yield from rule.limits_of(request, key)
        if configuration is None:
            return decision
        if configuration is rule.limits and len(stored_key) <= _LONGEST_KEPT_KEY:
            bucket = self._kept_bucket(self._buckets, stored_key, configuration, version, rule.inheritance)
        else:
            bucket = self._bucket_of(self._buckets, stored_key, configuration, version, rule.inheritance)
        result = yield bucket.verbose.try_consume_and_return_remaining(tokens)
        self._compare(rule, configuration, result.configuration, degraded=result.degraded)
        if recorders:
            record(rule.name, key, admitted=result.value.consumed)
        limits = service_limits(rule, tokens, result)
        outcome = Outcome(rule, key, bucket, tokens, result.value, limits, result.configuration)
        return HttpDecision((*decision.outcomes, outcome), request=request)

    def _compare(
        self, rule: Rule, wanted: BucketConfiguration, stored: BucketConfiguration | None, *, degraded: bool
    ) -> None:
        """Log where a bucket has other limits than its rule; a local bucket that stands in for it has them rightly."""
        if stored is not None and rule.named and not degraded:
            self._other_limits.compare(rule.name, wanted, stored)

    def _bucket_of(
        self,
        manager: ProxyManager | AsyncProxyManager,
        stored_key: Key,
        configuration: BucketConfiguration,
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

    def _refused(self, request: HttpRequest, decision: HttpDecision) -> Steps[None]:
        """Do what a refusal entails: give back what the request has paid, log it, and call the hook."""
        yield from self._give_back(decision)
        refused = decision.refused
        if refused is not None:
            self._refusals.log(refused.rule.name, refused.key, refused.configuration)
        if self._on_refused is not None:
            yield from answer_of(self._on_refused(request, decision))

    def _give_back(self, decision: HttpDecision) -> Steps[None]:
        """Undo what a request has paid that is refused in the end."""
        for outcome in decision.outcomes:
            if not outcome.consumed or outcome.probe.degraded:
                continue
            bucket = outcome.bucket
            if not isinstance(bucket, self._face):  # paid by an async middleware, and refused by a sync view, say
                bucket = self._buckets.bucket(bucket.key, outcome.configuration)
            try:
                yield bucket.give_back(outcome.tokens)
            except RateLimitError as error:  # the refusal is what the client must hear of
                _logger.warning("%d tokens of a refused request could not be given back: %s", outcome.tokens, error)


class Limiter(_Limiter):
    """Rules, and the buckets that they are kept in, for one request after the other.

    :param rules: looked at in this order; limits alone stand for a rule for all requests, by the peer's address. After
        a refusal nothing more is asked, and what the request has paid for the rules before is given back.
    :param manager: has the buckets; or its URL, or None for that of the variable ``RATELIMIT_URL``, or localhost.
    :param settings: those of every limiter, see :class:`LimiterSettings`.
    """

    _face = Bucket

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        manager: ProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        super().__init__(rules, manager, **settings)
        self._manager = manager if isinstance(manager, str | None) else manager_of(manager)

    @property
    def _buckets(self) -> ProxyManager:
        return manager_of(self._manager)

    def decide(self, request: HttpRequest, place: str = "") -> HttpDecision:
        """Decide whether a request may go on; what it has paid for already, it does not pay for again.

        :param place: where the rules stand: the route or view that rules without a name count for; empty for a whole
            application.
        :raises RateLimitError: where the store fails, and the policy is to raise.
        """
        return run(self._decide(request, place))


class AsyncLimiter(_Limiter):
    """The same as :class:`Limiter`, for asyncio."""

    _face = AsyncBucket

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        manager: AsyncProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        super().__init__(rules, manager, **settings)
        self._manager = manager if isinstance(manager, str | None) else async_manager_of(manager)

    @property
    def _buckets(self) -> AsyncProxyManager:
        return async_manager_of(self._manager)

    async def decide(self, request: HttpRequest, place: str = "") -> HttpDecision:
        """See :meth:`Limiter.decide`."""
        return await arun(self._decide(request, place))


def decision_about(request: HttpRequest) -> HttpDecision:
    """What has been decided about a request so far."""
    return decision_in(request.notes)


def decision_in(notes: Mapping[Any, Any]) -> HttpDecision:
    """The same, from what is kept with the request."""
    decision = notes.get(NOTE)
    return decision if isinstance(decision, HttpDecision) else _NOTHING_DECIDED


def fields_for(request: HttpRequest, answers: Answers) -> Headers:
    """The fields of an answer to a request, from all that has been decided about it.

    :param answers: makes them, unless a limiter further in has answers of its own.
    """
    own = request.notes.get(_ANSWERS, answers)
    return own.headers(decision_about(request))  # type: ignore[no-any-return]  # those that a limiter has put there


def _applies(rule: Rule, request: HttpRequest) -> Steps[bool]:
    if rule.when is not None and not (yield from answer_of(rule.when(request))):
        return False
    return rule.exempt is None or not (yield from answer_of(rule.exempt(request)))
