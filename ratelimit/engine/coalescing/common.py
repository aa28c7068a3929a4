"""Which questions can go together, and what those hear that cannot be carried."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Final

from ratelimit.core.commands import Batch, Command
from ratelimit.engine.question import Part, Question
from ratelimit.errors import CorruptStateError, StoreError, StoreTimeoutError
from ratelimit.keys import Key

_MOST_STEPS: Final = 256
"""Different commands in a row, times bandwidths, that one question carries: a server that decides them is busy with
them for about a millisecond, or for ten if all of them hold back. Not less than the most bandwidths of a
configuration."""


def count_together(queue: Iterable[Part]) -> int:
    """Return how many from the head of a queue one question is to carry, which is one at least."""
    first: Part | None = None
    previous: Command[Any] | None = None
    room = count = 0
    for part in queue:
        if first is None:
            first, room = part, _MOST_STEPS // len(part.terms.configuration)
        if part.target is not first.target and not _go_together(part, first):
            break
        command = part.command
        # Commands that are asked for over and over are one object, and one step.
        if command is not previous:
            steps = len(command.commands) if type(command) is Batch else 1
            if count and room < steps:
                break
            room -= steps
            previous = command
        count += 1
    return count


def _go_together(one: Part, other: Part) -> bool:
    mine, its = one.target, other.target
    return (
        one.terms == other.terms
        and mine.expiration == its.expiration
        and (mine.must_exist_once_made and mine.made) == (its.must_exist_once_made and its.made)
    )


def latest_deadline(questions: Iterable[Question]) -> float | None:
    """Return the last deadline of questions that go together; None where one of them has none."""
    deadlines = [question.deadline for question in questions]
    return None if None in deadlines else max(deadlines)  # type: ignore[type-var]  # there is no None


def copied(error: Exception, key: Key) -> Exception:
    """Return the error for another caller, which adds a traceback to it; it names the key as that caller gave it."""
    try:
        another = copy.copy(error)
    except Exception:  # noqa: BLE001  # an exception of the caller's clock or store, made in a way of its own
        return error
    another.__cause__ = error.__cause__
    if isinstance(another, (StoreError, CorruptStateError)):
        another.key = key
    return another


def too_late(key: Key, *, in_doubt: bool) -> StoreTimeoutError:
    """Return the error for a caller whose deadline has passed while it waited."""
    waited_for = "an answer" if in_doubt else "those who came before"
    return StoreTimeoutError(key, f"there was no time left to wait for {waited_for}", in_doubt)
