"""The key that Django's and REST framework's users expect."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from ratelimit.integrations.django.conf import current
from ratelimit.integrations.http import HttpRequest, user
from ratelimit.keys import Key

_USER: Final = user()


def client(request: HttpRequest) -> Key | None:
    """Return the address of the client, as the setting ``CLIENT_IP`` says."""
    return current().client_ip(request)


def user_or_client(request: HttpRequest) -> Key | Awaitable[Key | None] | None:
    """Return the user (``user:42``), or for an anonymous request the address (``ip:203.0.113.7``) by ``CLIENT_IP``."""
    found = _USER(request)
    return _later(request, found) if isinstance(found, Awaitable) else _either(request, found)


async def _later(request: HttpRequest, found: Awaitable[str | None]) -> Key | None:
    return _either(request, await found)


def _either(request: HttpRequest, found: str | None) -> Key | None:
    if found is not None:
        return f"user:{found}"
    client = current().client_ip(request)
    return b"ip:" + client if isinstance(client, bytes) else client and f"ip:{client}"
