"""The core of all that limits HTTP requests. It depends on no framework.

A :class:`Rule` says which requests are limited, by which key and to what; a :class:`Limiter`, or :class:`AsyncLimiter`,
decides about a request by rules; :class:`Answers` makes header fields and refusals from its decision. The modules next
to this package do that for one framework each.
"""

from ratelimit.integrations.http.answers import Answers, Headers, HttpAnswer
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.integrations.http.keys import (
    RequestKey,
    api_key,
    client_ip,
    combined,
    first_of,
    header,
    method,
    route,
    user,
)
from ratelimit.integrations.http.limiter import AsyncLimiter, Limiter, LimiterSettings, OnRefused, decision_about
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.response import HttpResponse
from ratelimit.integrations.http.rules import Rule, RuleSettings
from ratelimit.policy import Assigned, Missing, Outcome, Plans, Policy, ServiceLimit
from ratelimit.policy.callables import name_of

__all__ = [
    "Answers",
    "Assigned",
    "AsyncLimiter",
    "Headers",
    "HttpAnswer",
    "HttpDecision",
    "HttpRequest",
    "HttpResponse",
    "Limiter",
    "LimiterSettings",
    "Missing",
    "OnRefused",
    "Outcome",
    "Plans",
    "Policy",
    "RequestKey",
    "Rule",
    "RuleSettings",
    "ServiceLimit",
    "api_key",
    "client_ip",
    "combined",
    "decision_about",
    "first_of",
    "header",
    "method",
    "name_of",
    "route",
    "user",
]
