"""The permissions that a user of Redis needs for the limiter, and a user that has some of them."""

from __future__ import annotations

from urllib.parse import quote

import redis

from tests.support.servers import RedisServer
from tests.support.verbs import PREFIX

PASSWORD = "open sesame"

ACL_COMMANDS = ("eval", "evalsha", "getrange", "set", "del", "time")
"""What the library sends to a server, or runs there in a script."""

ACL_COMMANDS_FOR_A_DATABASE = ("select",)
"""What redis-py sends besides, where the database is not 0."""

ACL_COMMANDS_FOR_A_CLUSTER = ("cluster|slots", "asking")
"""What is sent besides to a cluster."""


def allow(admin: redis.Redis, *commands: str) -> None:
    """Make the user ``limiter``, or change it, so that it may send these commands, about keys with the prefix."""
    allowed = [f"+{command}" for command in commands]
    rules = ["reset", "on", f">{PASSWORD}", f"~{PREFIX}*", "resetchannels", "-@all", *allowed]
    admin.execute_command("ACL SETUSER", "limiter", *rules)


def limited_url(server: RedisServer, password: str = PASSWORD, database: int = 0) -> str:
    """Return the URL by which the user ``limiter`` connects."""
    return f"redis://limiter:{quote(password)}@{server.host}:{server.port}/{database}"
