"""The limiters of HTTP requests. They keep a decision with its request; :class:`Answers` makes the answer from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, TypeAlias, TypedDict, Unpack

from ratelimit import policy
from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.integrations.http.answers import Answers, Headers
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.response import HttpResponse
from ratelimit.integrations.http.rules import Rule, RuleLimits
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.policy.callables import answer_of
from ratelimit.policy.decision import settling
from ratelimit.policy.limiter import BaseLimiter
from ratelimit.runtime.steps import Steps, arun, run

OnRefused: TypeAlias = Callable[[HttpRequest, HttpDecision], Awaitable[object] | object]
"""Is called for each request that is refused; what it returns is dropped. May be async where the limiter is."""


class LimiterSettings(TypedDict, total=False):
    """What limiters and integrations take besides their rules and their manager."""

    answers: Answers | None
    """Makes what clients are sent; ``Answers()`` by default."""
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

# The name under which an inner limiter keeps its answers, for the outer limiter that adds the fields to the answer.
_ANSWERS: Final = "ratelimit.answers"

_NOTHING_DECIDED: Final = HttpDecision()


class _HttpLimiter(BaseLimiter[HttpRequest]):
    """What a limiter of either face does about an HTTP request besides deciding."""

    _rule_type = Rule

    def __init__(
        self,
        *rules: Any,
        manager: Any,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
        **settings: Any,
    ) -> None:
        has_policy = isinstance(manager, ProxyManager | AsyncProxyManager) and manager.has_error_policy
        # A denial is answered with 503; an error would be a 500, and a traceback for each request.
        on_error = OnError.DENY if on_error is None and not has_policy else on_error
        super().__init__(*rules, manager=manager, on_error=on_error, **settings)
        self.answers = Answers() if answers is None else answers
        self._has_own_answers = answers is not None

    def _decided_before(self, request: HttpRequest) -> HttpDecision:
        return decision_about(request)

    def _keep(self, request: HttpRequest, decision: policy.Decision[HttpRequest]) -> None:
        request.notes[NOTE] = decision
        if self._has_own_answers:
            request.notes[_ANSWERS] = self.answers

    def _deducted(
        self, request: HttpRequest, respond: Callable[[], HttpResponse], rules: Collection[Rule] | None
    ) -> Steps[None]:
        response: HttpResponse | None = None
        for outcome in decision_about(request).outcomes:
            deduct_when = outcome.rule.deduct_when  # type: ignore[attr-defined]  # it is a rule for HTTP
            if deduct_when is None or not outcome.is_open or (rules is not None and outcome.rule not in rules):
                continue
            response = respond() if response is None else response
            if not (yield from answer_of(deduct_when(response))) and outcome.claim():
                yield from settling(outcome, 0, self._own(outcome))


class Limiter(_HttpLimiter, policy.Limiter[HttpRequest]):
    """Decides about requests, one after another, by rules whose buckets a manager has.

    :param rules: limits alone stand for a rule for all requests, by the peer's address. All rules that are about a
        request are one decision: it pays for each of their buckets, or for none.
    :param manager: the manager of the buckets, or its URL; None: that of the variable ``RATELIMIT_URL``, or localhost.
    :param settings: those of every limiter, see :class:`LimiterSettings`.
    """

    rules: tuple[Rule, ...]

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        manager: ProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        super().__init__(*rules, manager=manager, **settings)

    def decide(self, request: HttpRequest, place: str = "") -> HttpDecision:
        """Decide whether a request may go on; what it has paid for already, it does not pay for again.

        :param place: where the rules stand: the route or view that rules without a name count for; empty for a whole
            application.
        :raises RateLimitError: where the store fails, and the policy is to raise.
        """
        return run(self._decide(request, place))  # type: ignore[return-value]  # of the class that it began with

    def deduct(
        self, request: HttpRequest, respond: Callable[[], HttpResponse], rules: Collection[Rule] | None = None
    ) -> None:
        """Give back what a request has paid, where ``deduct_when`` of a rule says so of the response.

        :param respond: makes the response as rules see it, where one of them looks at it.
        :param rules: those that are to look at it; None: all that the request has paid for.
        """
        run(self._deducted(request, respond, rules))


class AsyncLimiter(_HttpLimiter, policy.AsyncLimiter[HttpRequest]):
    """A :class:`Limiter` for asyncio, whose callables may be ``async``."""

    rules: tuple[Rule, ...]

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        manager: AsyncProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        super().__init__(*rules, manager=manager, **settings)

    async def decide(self, request: HttpRequest, place: str = "") -> HttpDecision:
        """See :meth:`Limiter.decide`."""
        return await arun(self._decide(request, place))  # type: ignore[arg-type]  # of the class that it began with

    async def deduct(
        self, request: HttpRequest, respond: Callable[[], HttpResponse], rules: Collection[Rule] | None = None
    ) -> None:
        """See :meth:`Limiter.deduct`."""
        await arun(self._deducted(request, respond, rules))


def decision_about(request: HttpRequest) -> HttpDecision:
    """Return what has been decided about a request so far."""
    return decision_in(request.notes)


def decision_in(notes: Mapping[Any, Any]) -> HttpDecision:
    """Return what has been decided about the request that these notes are kept with."""
    decision = notes.get(NOTE)
    return decision if isinstance(decision, HttpDecision) else _NOTHING_DECIDED


def fields_for(request: HttpRequest, answers: Answers) -> Headers:
    """Return the fields of an answer to a request, from all that has been decided about it.

    :param answers: makes them, unless an inner limiter has answers of its own.
    """
    own = request.notes.get(_ANSWERS, answers)
    return own.headers(decision_about(request))  # type: ignore[no-any-return]  # those that a limiter has put there
