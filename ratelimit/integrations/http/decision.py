"""What was decided about an HTTP request."""

from __future__ import annotations

from dataclasses import dataclass

from ratelimit.integrations.http.request import HttpRequest
from ratelimit.policy import Decision
from ratelimit.policy.decision import whole_seconds


@dataclass(frozen=True, slots=True)
class HttpDecision(Decision[HttpRequest]):
    """What was decided about a request, by all rules that have looked at it so far; true where it may go on.

    :param outcomes: one for each bucket, in the order of the rules; after a refusal there are no more.
    :param missing: the rule whose key the request does not have, where that is an error.
    :param request: the request, so that an answer can be in its language; None where no rule has looked at it.
    :param fault: says what is wrong with the key, where it is not missing but ambiguous.
    """

    @property
    def retry_after(self) -> int | None:
        """Whole seconds, rounded up, 1 at least, until a refused request may be sent again; None for never."""
        refused = self.refused
        return None if refused is None else whole_seconds(max(1, refused.probe.nanos_to_wait_for_refill))
