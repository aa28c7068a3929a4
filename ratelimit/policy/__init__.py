"""Rules, plans, limiters and their decisions, for requests of any type.

A :class:`Rule` says which requests are limited, by which key and to what; a :class:`Limiter`, or :class:`AsyncLimiter`,
decides about a request by rules. The integrations are limiters for the requests of one protocol or framework each.
"""

from ratelimit.policy.decision import Decision, Outcome, Policy, ServiceLimit
from ratelimit.policy.limiter import AsyncLimiter, Limiter, LimiterSettings, OnRefused
from ratelimit.policy.plans import Assigned, Plans
from ratelimit.policy.rule import AmbiguousKeyError, Missing, Rule

__all__ = [
    "AmbiguousKeyError",
    "Assigned",
    "AsyncLimiter",
    "Decision",
    "Limiter",
    "LimiterSettings",
    "Missing",
    "OnRefused",
    "Outcome",
    "Plans",
    "Policy",
    "Rule",
    "ServiceLimit",
]
