"""Decides about requests by rules, for both faces: steps that a face drives."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.copies import OfThisProcess
from ratelimit.core.bandwidth import BucketConfiguration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.drive import Steps, adrive, drive
from ratelimit.errors import InvalidArgumentError, Key, RateLimitError, brief
from ratelimit.integrations.http.answers import Answers, Headers
from ratelimit.integrations.http.callables import answer_of
from ratelimit.integrations.http.decision import HttpDecision, Outcome, service_limits
from ratelimit.integrations.http.keys import Missing
from ratelimit.integrations.http.plans import PlanLimits, Plans
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule, RuleLimits, checked_rules
from ratelimit.integrations.managers import async_manager_of, manager_of
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.on_error import ErrorPolicy, OnError

NOTE: Final = "ratelimit"
"""The name under which the decision about a request is kept with it."""

_ANSWERS: Final = "ratelimit.answers"  # the same for those that make the fields of its answer

_NOTHING_DECIDED: Final = HttpDecision()
_KEPT_BUCKETS: Final = 10_000  # handles, which take a while to make
_LONGEST_KEPT_KEY: Final = 1_024

_logger = logging.getLogger("ratelimit")


class _Limiter(OfThisProcess):
    """What both faces share."""

    _advice = "pickle its rules, and make it in each process"

    _face: ClassVar[type[Bucket | AsyncBucket]]

    def __init__(
        self,
        rules: Collection[Rule | RuleLimits],
        manager: ProxyManager | AsyncProxyManager | str | None,
        answers: Answers | None,
        on_error: ErrorPolicy | None,
    ) -> None:
        self.rules = checked_rules(rules)
        self.answers = Answers() if answers is None else answers
        self._has_own_answers = answers is not None
        if on_error is None and not isinstance(manager, ProxyManager | AsyncProxyManager):
            on_error = OnError.DENY  # which is a 503; an error would be a 500, and a traceback for each request
        self._on_error = on_error
        self._kept_bucket = lru_cache(_KEPT_BUCKETS)(self._bucket)

    @property
    def _buckets(self) -> ProxyManager | AsyncProxyManager:
        raise NotImplementedError

    def _decide(self, request: HttpRequest) -> Steps[HttpDecision]:
        """Ask one rule after the other, until one refuses: then what the request has paid so far is given back."""
        decision = decision_about(request)
        for rule in self.rules:
            if not decision:
                break
            if not rule.is_about(request) or not (yield from _applies(rule, request)):
                continue
            key: Any = yield from answer_of(rule.key(request))
            if key is None and rule.missing is Missing.ERROR:
                decision = HttpDecision(decision.outcomes, missing=rule)
            elif key is not None:
                decision = yield from self._decided_by(rule, key, request, decision)
            if not decision:
                yield from self._give_back(decision)
        request.notes[NOTE] = decision
        if self._has_own_answers:
            request.notes[_ANSWERS] = self.answers
        return decision

    def _decided_by(self, rule: Rule, key: Key, request: HttpRequest, decision: HttpDecision) -> Steps[HttpDecision]:
        """The decision as it is after one rule more."""
        stored_key = rule.stored_key(key)
        if any(outcome.bucket.key == stored_key for outcome in decision.outcomes):
            return decision  # paid already
        tokens: Any = rule.cost
        if callable(tokens):
            tokens = yield from answer_of(tokens(request))
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise InvalidArgumentError(f"the cost of a request must be an int of 0 or more, not {brief(tokens)}")
        if tokens == 0:
            return decision
        configuration, version = yield from _limits(rule, request, key)
        if configuration is None:
            return decision
        if configuration is rule.limits and len(stored_key) <= _LONGEST_KEPT_KEY:
            bucket = self._kept_bucket(stored_key, configuration)
        else:
            inheritance = rule.limits.inheritance if isinstance(rule.limits, Plans) else None
            bucket = self._bucket(stored_key, configuration, version, inheritance)
        result = yield bucket.verbose.try_consume_and_return_remaining(tokens)
        limits = service_limits(rule, tokens, result)
        outcome = Outcome(rule, key, bucket, tokens, result.value, limits, result.configuration)
        return HttpDecision((*decision.outcomes, outcome))

    def _bucket(
        self,
        stored_key: Key,
        configuration: BucketConfiguration,
        version: int | None = None,
        inheritance: TokensInheritance | None = None,
    ) -> Bucket | AsyncBucket:
        return self._buckets.bucket(
            stored_key,
            configuration,
            configuration_version=version,
            inheritance=inheritance,
            on_error=self._on_error,
        )

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
    :param answers: what clients are told.
    :param on_error: what is decided where the store fails. None: as a manager of the caller's says, else
        :attr:`OnError.DENY`, which is answered with 503.
    """

    _face = Bucket

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        manager: ProxyManager | str | None = None,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
    ) -> None:
        super().__init__(rules, manager, answers, on_error)
        self._manager = manager if isinstance(manager, str | None) else manager_of(manager)

    @property
    def _buckets(self) -> ProxyManager:
        return manager_of(self._manager)

    def decide(self, request: HttpRequest) -> HttpDecision:
        """Whether a request may go on; what it has paid for already, it does not pay for again.

        :raises RateLimitError: where the store fails, and the policy is to raise.
        """
        return drive(self._decide(request))


class AsyncLimiter(_Limiter):
    """The same as :class:`Limiter`, for asyncio."""

    _face = AsyncBucket

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        manager: AsyncProxyManager | str | None = None,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
    ) -> None:
        super().__init__(rules, manager, answers, on_error)
        self._manager = manager if isinstance(manager, str | None) else async_manager_of(manager)

    @property
    def _buckets(self) -> AsyncProxyManager:
        return async_manager_of(self._manager)

    async def decide(self, request: HttpRequest) -> HttpDecision:
        """See :meth:`Limiter.decide`."""
        return await adrive(self._decide(request))


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


def _limits(rule: Rule, request: HttpRequest, key: Key) -> Steps[PlanLimits]:
    if isinstance(rule.limits, BucketConfiguration):
        return PlanLimits(rule.limits, None)
    if isinstance(rule.limits, Plans):
        return (yield from rule.limits.limits_of(request, key))
    limits: Any = yield from answer_of(rule.limits(key))
    return PlanLimits(None if limits is None else BucketConfiguration.of(limits), None)
