"""The commands that reach a real Redis, as its own MONITOR shows them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import redis

HANDSHAKE = ("HELLO", "CLIENT", "SELECT", "AUTH")


class Monitor:
    def __init__(self, client: redis.Redis, monitor: Any) -> None:
        self._client = client
        self._monitor = monitor

    def sent(self) -> list[str]:
        """Return what clients have sent since the last call, without the commands of scripts and of handshakes."""
        self._client.echo("up to here")
        commands: list[str] = []
        while True:
            seen = self._monitor.next_command()
            name = seen["command"].split(" ")[0].upper()
            if name == "ECHO":
                return commands
            if seen["client_type"] != "lua" and name not in HANDSHAKE:
                commands.append(name)


@contextmanager
def monitored(url: str) -> Generator[Monitor]:
    with redis.Redis.from_url(url) as client, client.monitor() as monitor:
        yield Monitor(client, monitor)
