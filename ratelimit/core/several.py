"""Decide about several buckets at one time: each of them is charged, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.core.algorithm import State
from ratelimit.core.commands import Command, ProbeConsumption, Terms, TryConsumeAndReturnRemaining, execute


def execute_all(
    commands: Sequence[Command[Any]], terms: Sequence[Terms], states: Sequence[State | None], now: int
) -> tuple[list[State | None], list[Any]]:
    """Run a command against each bucket at the same time; return the states to store (None: nothing) and the answers.

    Where one of the buckets has too few tokens, none is charged. Then the answers say of each whether it has its own. A
    bucket that had to be made, or given another configuration, is stored all the same.
    """
    afters: list[State | None] = []
    answers: list[Any] = []
    refused = False
    for command, its_terms, state in zip(commands, terms, states, strict=True):
        after, answer = execute(command, its_terms, state, now)
        refused = refused or (type(command) is TryConsumeAndReturnRemaining and not answer.consumed)
        afters.append(after)
        answers.append(answer)
    if not refused:
        return afters, answers
    looking = [
        ProbeConsumption(command.tokens) if type(command) is TryConsumeAndReturnRemaining else command
        for command in commands
    ]
    return execute_all(looking, terms, states, now)
