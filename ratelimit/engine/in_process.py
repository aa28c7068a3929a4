"""The layer over a store in this process, which carries out commands itself: there is nothing to swap or to await."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ratelimit.core.commands import Command, Terms, execute
from ratelimit.engine.question import Question, Target
from ratelimit.errors import BucketNotFoundError, CorruptStateError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import UpdatingStore


class InProcess:
    """Decides at once.

    :param now: gives the time for a stored key; None: the store has a time of its own.
    :ivar check: is called where a decision begins; once the manager is closed, it raises.
    """

    def __init__(self, store: UpdatingStore, now: Callable[[bytes], int] | None) -> None:
        self.check: Callable[[], Any] = fork_safety.check
        self._update = store.update
        self._now = now

    def decide(self, question: Question) -> Steps[Any]:
        """Answer a question without a step: the layer."""
        yield from ()
        ((target, terms, command),) = question.parts
        return self.decided(target, terms, command)

    def decided(self, target: Target, terms: Terms, command: Command[Any]) -> Any:
        """Return the answer to a command."""
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
        # The store makes nothing where the bucket must exist.
        if done is None:
            raise BucketNotFoundError(target.key)
        answer, made = done
        if made:
            target.made = True
        return answer
