"""What a call about several buckets computes, and what it notes of the buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.core.algorithm import State, encode, out_of_range
from ratelimit.core.commands import execute
from ratelimit.core.several import execute_all
from ratelimit.engine.question import Target
from ratelimit.engine.several.parts import Call


def computed(call: Call, states: Sequence[State | None], now: int) -> tuple[list[State | None], list[Any]]:
    """Return the states to store (None: nothing) and the answers; see :func:`ratelimit.core.several.execute_all`.

    :raises CorruptStateError: where the stored numbers of a bucket make no sense, for that bucket.
    """
    try:
        return execute_all([part.command for part in call], [part.terms for part in call], states, now)
    except ArithmeticError:
        for (target, terms, command), state in zip(call, states, strict=True):
            try:
                execute(command, terms, state, now)
            except ArithmeticError as error:
                raise out_of_range(b"" if state is None else encode(state), target.key) from error
        raise


def note_what_was_made(target: Target, before: State | None, after: State | None) -> None:
    """Note that a bucket was made, or its configuration replaced, if so."""
    if before is None or (after is not None and before.configuration_version != after.configuration_version):
        target.made = True
