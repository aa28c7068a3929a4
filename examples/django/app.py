"""Ten requests an hour for each client, whichever instance it asks; a project of Django in a single file.

RATELIMIT_URL=redis://localhost:6379/0 gunicorn app:wsgi --workers 2 --bind localhost:8001
RATELIMIT_URL=redis://localhost:6379/0 uvicorn app:asgi --no-proxy-headers --port 8002
"""

from __future__ import annotations

import os

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from ratelimit.integrations.http import Rule

settings.configure(
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    MIDDLEWARE=["ratelimit.integrations.django.RateLimitMiddleware"],
    RATELIMIT={"RULES": [Rule(os.environ.get("RATELIMIT_LIMIT", "10/hour"), name="django-example")]},
    ROOT_URLCONF=__name__,
    SECRET_KEY="a secret for examples only",
)


def hello(_request: HttpRequest) -> JsonResponse:
    return JsonResponse({"hello": "world"})


urlpatterns = [path("", hello)]

wsgi = get_wsgi_application()
asgi = get_asgi_application()
