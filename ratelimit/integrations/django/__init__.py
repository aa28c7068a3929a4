"""For Django: a middleware and a decorator for views, both for sync and async code, and the setting ``RATELIMIT``.

What Django REST framework has of its own is in :mod:`ratelimit.integrations.rest_framework`.
"""

from ratelimit.integrations.extras import needing

with needing("django"):
    from ratelimit.integrations.django.decorators import exempt, rate_limit
    from ratelimit.integrations.django.keys import user_or_client
    from ratelimit.integrations.django.middleware import RateLimitMiddleware

__all__ = ["RateLimitMiddleware", "exempt", "rate_limit", "user_or_client"]
