"""The layer over a store in this process, which carries out commands itself: there is nothing to swap or to await."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ratelimit.core.commands import execute
from ratelimit.engine.question import Question
from ratelimit.errors import BucketNotFoundError, CorruptStateError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import UpdatingStore


class InProcess:
    """Decides at once.

    :param now: gives the time for a stored key; None: the store has a time of its own.
    """

    def __init__(self, store: UpdatingStore, now: Callable[[bytes], int] | None) -> None:
        self._update = store.update
        self._now = now

    def decide(self, question: Question) -> Steps[Any]:
        """Answer a question without a step: the layer."""
        yield from ()
        return self.ask(question)

    def ask(self, question: Question) -> Any:
        """Answer a question."""
        ((target, terms, command),) = question.parts
        key, now = target.stored_key, self._now
        try:
            done = self._update(
                key,
                partial(execute, command, terms),
                target.expiration,
                None if now is None else now(key),
                must_exist=target.must_exist_once_made and target.made,
            )
        except CorruptStateError as error:
            error.key = target.key
            raise
        if done is None:
            raise BucketNotFoundError(target.key)
        answer, made = done
        if made:
            target.made = True
        return answer
