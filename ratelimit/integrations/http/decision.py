"""What was decided about an HTTP request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ratelimit.integrations.http.request import HttpRequest
from ratelimit.policy import Decision
from ratelimit.policy.decision import whole_seconds
from ratelimit.runtime.steps import Steps

FIELDS_AGAIN: Final = "ratelimit.fields_again"
"""The name under which an adapter keeps a function with a request that sets its header fields again.

It is given the request. Only adapters that set the fields before the answer is made need one.
"""


@dataclass(frozen=True, slots=True)
class HttpDecision(Decision[HttpRequest]):
    """What was decided about a request, by all rules that have looked at it so far; true where it may go on.

    :param outcomes: one for each bucket, in the order of the rules. Those of a refusal show what is left.
    :param missing: the rule whose key the request does not have, where that is an error.
    :param request: the request, so that an answer can be in its language; None where no rule has looked at it.
    :param fault: says what is wrong with the key, where it is not missing but ambiguous.
    """

    @property
    def waits_for_response(self) -> bool:
        """Whether a rule says by the response, which it has not seen yet, if the request has cost anything."""
        rules: Any = [outcome.rule for outcome in self.outcomes if outcome.is_open]
        return any(rule.deduct_when is not None for rule in rules)

    @property
    def retry_after(self) -> int | None:
        """Whole seconds, rounded up, 1 at least, until a refused request may be sent again; None for never."""
        return None if self.refused is None else whole_seconds(max(1, self.nanos_to_wait))

    def _settle(self, cost: int, names: tuple[str, ...], *, asynchronous: bool) -> Steps[None]:
        yield from super(HttpDecision, self)._settle(cost, names, asynchronous=asynchronous)
        if self.request is not None and FIELDS_AGAIN in self.request.notes:
            self.request.notes[FIELDS_AGAIN](self.request)
