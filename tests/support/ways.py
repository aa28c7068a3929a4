"""The ways that decisions can go over Redis, and how to send all of them one way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import ratelimit.engine.swapping
from ratelimit.core.commands import Batch, Command
from ratelimit.stores.redis.channels import Command as RedisCommand
from ratelimit.stores.redis.channels import Replies
from ratelimit.stores.redis.scripts import load

_NEVER = 2**63
_DECIDE = load("decide")


class By(Enum):
    """Who decides; the values are swaps lost, and round trips of one decision, before the server does."""

    EITHER = (ratelimit.engine.swapping._LOST_BEFORE_DELEGATION, ratelimit.engine.swapping._TRIPS_BEFORE_DELEGATION)
    """As it comes: the client by swaps, and the server by its script once a bucket is contended."""
    SWAPS = (_NEVER, _NEVER)
    SCRIPT = (0, 0)


class Way(NamedTuple):
    by: By = By.EITHER
    merging: bool = True

    def __str__(self) -> str:
        return f"{self.by.name.lower()}{'' if self.merging else ' unmerged'}"


WAYS = [Way(by, merging) for by in By for merging in (True, False)]


def decide_by(by: By) -> None:
    """From now on, in this process."""
    lost, trips = by.value
    for name, value in (("_LOST_BEFORE_DELEGATION", lost), ("_TRIPS_BEFORE_DELEGATION", trips)):
        setattr(ratelimit.engine.swapping, name, value)


@contextmanager
def deciding_by(by: By) -> Generator[None]:
    decide_by(by)
    try:
        yield
    finally:
        decide_by(By.EITHER)


def batched(manager: Any) -> None:
    """Let a manager of either face do each command as those that are led do theirs: in a batch."""
    exchange = manager._exchange

    def exchange_batch(backend: Any, target: Any, plan: Any, command: Command[Any], call: Any) -> Any:
        if command.only_reads:
            return (yield from exchange(backend, target, plan, command, call))
        (answer,) = yield from exchange(backend, target, plan, Batch((command,)), call)
        return answer

    manager._exchange = exchange_batch


class Tap:
    """Between a store and its channel: takes note of what is sent, and lets others come before it or after it.

    :ivar sent: one of "get", "swap", "decide", "delete" and "time" for each round trip.
    :ivar before: called before each, with what it is.
    :ivar after: called, or awaited where there is something to await, when the replies are there.
    """

    def __init__(self, store: Any) -> None:
        self.sent: list[str] = []
        self.before: Callable[[str], None] = lambda _: None
        self.after: Callable[[str], Awaitable[None] | None] = lambda _: None
        self._channel = store._channel
        store._channel = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def send(self, key: bytes, commands: Sequence[RedisCommand], deadline: float | None) -> Any:
        kind = _kind(commands[-1])
        self.sent.append(kind)
        self.before(kind)
        replies = self._channel.send(key, commands, deadline)
        if isinstance(replies, Awaitable):
            return self._awaited(kind, replies)
        self.after(kind)
        return replies

    async def _awaited(self, kind: str, replies: Awaitable[Replies]) -> Replies:
        answered = await replies
        after = self.after(kind)
        if after is not None:
            await after
        return answered

    def taken(self) -> list[str]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent


def _kind(command: RedisCommand) -> str:
    name = command[0].decode()
    if name in ("EVAL", "EVALSHA"):
        return "decide" if command[1] in (_DECIDE.sha.encode(), _DECIDE.text) else "swap"
    return {"SET": "swap", "GETRANGE": "get", "DEL": "delete", "TIME": "time"}[name]
