"""Remember what one server can do, and estimate its time."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError

from ratelimit.core.numbers import NANOS_PER_SECOND
from ratelimit.stores.redis.server_time import ServerTime


class Node:
    """What a store knows of a server.

    :ivar time: the estimate of the server's time.
    :ivar scripts: the SHA-1 of each script that the server should know.
    :ivar swaps_natively: whether the server knows ``SET`` with ``IFEQ``; None: this was not tried yet.
    """

    __slots__ = ("scripts", "swaps_natively", "time")

    def __init__(self) -> None:
        self.time = ServerTime()
        self.scripts: set[str] = set()
        self.swaps_natively: bool | None = None

    def learn_from_probe(self, answer: Any) -> None:
        """Learn from the answer to a ``SET`` with ``IFEQ`` whether the server swaps natively."""
        if not isinstance(answer, ResponseError):
            self.swaps_natively = True
        elif is_refused_as_unknown(answer):
            self.swaps_natively = False


def is_refused_as_unknown(reply: Any) -> bool:
    """Return whether a server has refused a command because it does not know the command's options."""
    return isinstance(reply, ResponseError) and "syntax error" in str(reply)


def time_nanos(time_reply: Any) -> int:
    """Return the nanoseconds since the epoch from a reply to ``TIME``."""
    seconds, microseconds = time_reply
    return int(seconds) * NANOS_PER_SECOND + int(microseconds) * 1_000
