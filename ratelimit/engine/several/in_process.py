"""What decides about several buckets over a store in this process: nothing is swapped or awaited."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ratelimit.core.algorithm import State
from ratelimit.engine.question import Question
from ratelimit.engine.several.computing import computed, note_what_was_made
from ratelimit.engine.several.parts import Call
from ratelimit.errors import BucketNotFoundError, CorruptStateError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import AtomicUpdatingStore


class InProcessTogether:
    """Decides at once, under the lock of the store.

    :param now: gives the time for a stored key; None: the store has a time of its own.
    """

    def __init__(self, store: AtomicUpdatingStore, now: Callable[[bytes], int] | None) -> None:
        self._update_all = store.update_all
        self._now = now

    def decide(self, _place: bytes, question: Question) -> Steps[list[Any]]:
        """Answer a question without a step."""
        yield from ()
        call, now = question.parts, self._now
        keys = [part.target.stored_key for part in call]
        try:
            return self._update_all(
                keys,
                partial(_transition, call),
                [part.target.expiration for part in call],
                None if now is None else now(keys[0]),
            )
        except CorruptStateError as error:
            error.key = next((part.target.key for part in call if part.target.stored_key == error.key), error.key)
            raise


def _transition(call: Call, states: list[State | None], now: int) -> tuple[list[State | None], list[Any]]:
    for part, state in zip(call, states, strict=True):
        if state is None and part.target.must_exist_once_made and part.target.made:
            raise BucketNotFoundError(part.target.key)
    afters, answers = computed(call, states, now)
    for part, state, after in zip(call, states, afters, strict=True):
        note_what_was_made(part.target, state, after)
    return afters, answers
