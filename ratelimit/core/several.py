"""Decide about several buckets at one time: each of them is charged, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.core.algorithm import State
from ratelimit.core.commands import (
    Command,
    ProbeConsumption,
    Terms,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
)
from ratelimit.core.results import ConsumptionProbe, VerboseResult


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
        refused = refused or (consumption_of(command) is not None and not probe_in(answer).consumed)
        afters.append(after)
        answers.append(answer)
    if not refused:
        return afters, answers
    return execute_all([looking(command) for command in commands], terms, states, now)


def consumption_of(command: Command[Any]) -> TryConsumeAndReturnRemaining | None:
    """Return the consumption that a command asks for, whether it shows the bucket or not; None for other commands."""
    inner: Command[Any] = command.command if type(command) is Verbose else command
    return inner if type(inner) is TryConsumeAndReturnRemaining else None


def looking(command: Command[Any]) -> Command[Any]:
    """Return a command that shows whether the tokens are there and consumes none, in the place of a consumption."""
    consumption = consumption_of(command)
    if consumption is None:
        return command
    look = ProbeConsumption(consumption.tokens)
    return look if consumption is command else Verbose(look)


def probe_in(answer: ConsumptionProbe | VerboseResult[ConsumptionProbe]) -> ConsumptionProbe:
    """Return the probe of an answer, whether it shows the bucket or not."""
    return answer.value if isinstance(answer, VerboseResult) else answer
