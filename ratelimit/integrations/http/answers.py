"""What clients are sent: header fields of every answer, and the answer to a request that is refused.

The fields are those of draft-ietf-httpapi-ratelimit-headers-11, ``Retry-After`` is that of RFC 9110, and the body is a
problem of RFC 9457.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal, NamedTuple

from ratelimit.checks import refusal
from ratelimit.errors import InvalidConfigurationError
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.policy import Policy, ServiceLimit
from ratelimit.policy.callables import name_of

QUOTA_EXCEEDED: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"
TEMPORARY_REDUCED_CAPACITY: Final = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"

Headers = list[tuple[str, str]]


def _wall_clock() -> float:
    # Looked up at each call, because tests that freeze time replace it.
    return time.time()


class HttpAnswer(NamedTuple):
    """An answer in place of the application's."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Answers:
    """Makes the answers; to change one, override its method.

    A method sees the request as ``decision.request``, an :class:`HttpRequest`: its ``header("accept-language")``, say.

    :param standard: whether the fields ``RateLimit-Policy`` and ``RateLimit`` are sent.
    :param x_ratelimit: whether ``X-RateLimit-Limit``, ``-Remaining`` and ``-Reset`` are sent, and what the last one
        says: the time at which the bucket is full again in seconds since 1970 (``epoch``), or how many seconds that
        will take (``delta``). They are about the policy that is closest to its end.
    :param clock: a callable that returns the seconds since 1970.
    """

    standard: bool = True
    x_ratelimit: Literal["epoch", "delta"] | None = None
    clock: Callable[[], float] = _wall_clock

    def __post_init__(self) -> None:
        if self.x_ratelimit not in (None, "epoch", "delta"):
            raise refusal("x_ratelimit", "None, 'epoch' or 'delta'", self.x_ratelimit, InvalidConfigurationError)

    def headers(self, decision: HttpDecision) -> Headers:
        """Return the fields of an answer to a request, refused or not.

        There are none where no limit was looked at. The fields of a refusal say when to come back, and name only the
        limits that refused: a client waits for the latest of all times that it is given.
        """
        headers: Headers = []
        if decision.retry_after is not None:
            headers.append(("Retry-After", str(decision.retry_after)))
        limits = [limit for outcome in decision.outcomes for limit in outcome.limits]
        shown = [limit for limit in limits if limit.violated] or limits
        if self.standard and limits:
            headers.append(("RateLimit-Policy", ", ".join([_policy(limit.policy) for limit in limits])))
            headers.append(("RateLimit", ", ".join([_limit(limit) for limit in shown])))
        if self.x_ratelimit is not None and limits:
            closest = min(shown, key=lambda limit: (limit.remaining, -limit.reset_after))
            at = closest.reset_after + (int(self.clock()) if self.x_ratelimit == "epoch" else 0)
            headers.append(("X-RateLimit-Limit", str(closest.policy.quota)))
            headers.append(("X-RateLimit-Remaining", str(closest.remaining)))
            headers.append(("X-RateLimit-Reset", str(at)))
        return headers

    def refusal(self, decision: HttpDecision) -> HttpAnswer:
        """Return the answer to a request that is refused, with all its fields."""
        problem = self.problem(decision)
        body = self.body(problem)
        about_body: Headers = [("Content-Type", self.content_type), ("Content-Length", str(len(body)))]
        return HttpAnswer(problem["status"], about_body + self.headers(decision), body)

    content_type = "application/problem+json"

    def body(self, problem: dict[str, Any]) -> bytes:
        """Return the bytes that the problem is sent as; their type is ``content_type``."""
        return json.dumps(problem).encode()

    def problem(self, decision: HttpDecision) -> dict[str, Any]:
        """Return what is wrong, and as ``status`` the status of the answer.

        429 for a limit that is exceeded, 503 for a store that fails, and 400 for a request without a key.
        """
        if decision.missing is not None:
            return {
                "type": "about:blank",
                "title": HTTPStatus.BAD_REQUEST.phrase,
                "status": HTTPStatus.BAD_REQUEST.value,
                "detail": decision.fault
                or f"The request has no {name_of(decision.missing.key)}, by which it would be limited.",
            }
        refused = decision.refused
        if refused is None:
            raise ValueError("there is no problem with a request that may go on")
        # A bucket of the process that stands in for the shared one has limits of its own, and refuses by them.
        if refused.probe.degraded and not refused.limits:
            return {
                "type": TEMPORARY_REDUCED_CAPACITY,
                "title": "Request cannot be satisfied due to temporary server capacity constraints",
                "status": HTTPStatus.SERVICE_UNAVAILABLE.value,
                "violated-policies": decision.violated_policies,
            }
        return {
            "type": QUOTA_EXCEEDED,
            "title": "Request cannot be satisfied as assigned quota has been exceeded",
            "status": HTTPStatus.TOO_MANY_REQUESTS.value,
            "violated-policies": decision.violated_policies,
        }


def _string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _policy(policy: Policy) -> str:
    return f"{_string(policy.name)};q={policy.quota};w={policy.window}"


def _limit(limit: ServiceLimit) -> str:
    window = "" if limit.effective_window is None else f";t={limit.effective_window}"
    return f"{_string(limit.policy.name)};r={limit.remaining}{window}"
