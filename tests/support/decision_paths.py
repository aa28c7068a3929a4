"""The ways that decisions can go over Redis, and how to send all of them one way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import ratelimit.manager
from ratelimit import OnError
from ratelimit.core.commands import Batch
from ratelimit.engine.proxy import asking_in_steps
from ratelimit.engine.question import Layer, Question
from ratelimit.engine.store_requests import DEFAULT_TUNING, Tuning
from ratelimit.runtime.steps import Steps
from ratelimit.stores.redis.channel import Command as RedisCommand
from ratelimit.stores.redis.channel import Replies
from ratelimit.stores.redis.scripts import load
from tests.support.inside import pipeline_of

_DECIDING = load("decide"), load("decide_all")


class By(Enum):
    """How a decision is made; the values say whether the client may swap, and whether the server may decide."""

    EITHER = (True, True)
    """The client decides by swaps what it knows to be its own, and the server by its script all else."""
    SWAPS = (True, False)
    SCRIPT = (False, True)


class Way(NamedTuple):
    by: By = By.EITHER
    merging: bool = True

    def __str__(self) -> str:
        return f"{self.by.name.lower()}{'' if self.merging else ' unmerged'}"


WAYS = [Way(by, merging) for by in By for merging in (True, False)]


def tuning() -> Tuning:
    """Return how managers decide that are made from now on in this process."""
    return vars(ratelimit.manager)["DEFAULT_TUNING"]  # type: ignore[no-any-return]


def decide_by(by: By) -> None:
    """Let all managers that are made from now on in this process decide so."""
    swaps, delegates = by.value
    decided = DEFAULT_TUNING._replace(swaps=swaps, delegates=delegates)
    manager: Any = ratelimit.manager
    manager.DEFAULT_TUNING = decided


@contextmanager
def deciding_by(by: By, *managers: Any) -> Generator[None]:
    """Let managers that are made in the block decide so, and these for as long as it runs."""
    decide_by(by)
    requests = [pipeline_of(manager).requests for manager in managers]
    for each in requests:
        each.tuning = tuning()
    try:
        yield
    finally:
        decide_by(By.EITHER)
        for each in requests:
            each.tuning = tuning()


def batched(manager: Any) -> None:
    """Let a manager of either face do each command as those that are led do theirs: in a batch."""
    pipeline = manager._pipeline

    def in_batch(layer: Layer) -> Layer:
        def decide(question: Question) -> Steps[Any]:
            ((_, _, command),) = question.parts
            if command.only_reads:
                return (yield from layer(question))
            (answer,) = yield from layer(question.asking(Batch((command,))))
            return answer

        return decide

    pipeline._asking = asking_in_steps
    pipeline._innermost = in_batch(pipeline._innermost)
    pipeline._layers = pipeline._composed(OnError.RAISE, None)


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

    @property
    def post(self) -> Any:
        return None if self._channel.post is None else self._post

    def _post(self, key: bytes, command: RedisCommand, waiter: Any, deadline: float | None) -> bool:
        kind = _kind(command)
        if not self._channel.post(key, command, _TappedWaiter(self, kind, waiter), deadline):
            return False
        # The command leaves at the end of this turn of the loop.
        self.sent.append(kind)
        self.before(kind)
        return True

    async def _awaited(self, kind: str, replies: Awaitable[Replies]) -> Replies:
        answered = await replies
        after = self.after(kind)
        if after is not None:
            await after
        return answered

    def taken(self) -> list[str]:
        """Return what was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent


class _TappedWaiter:
    """Stands between a waiter and its reply, which waits for what a tap does after it."""

    def __init__(self, tap: Tap, kind: str, waiter: Any) -> None:
        self._tap = tap
        self._kind = kind
        self.done = waiter.done
        self.set_exception = waiter.set_exception
        self._set_result = waiter.set_result

    def set_result(self, replies: Replies) -> None:
        after = self._tap.after(self._kind)
        if after is None:
            self._set_result(replies)
        else:
            self._after = asyncio.ensure_future(after)
            self._after.add_done_callback(lambda _: self._set_result(replies))


def _kind(command: RedisCommand) -> str:
    name = command[0].decode()
    if name in ("EVAL", "EVALSHA"):
        decides = any(command[1] in (script.sha.encode(), script.text) for script in _DECIDING)
        return "decide" if decides else "swap"
    return {"SET": "swap", "GETRANGE": "get", "DEL": "delete", "TIME": "time"}[name]
