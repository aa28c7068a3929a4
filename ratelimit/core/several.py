"""Decide about several buckets at one time: each of them is charged, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.core.algorithm import State
from ratelimit.core.commands import (
    Command,
    GetAvailableTokens,
    ProbeConsumption,
    Settle,
    Terms,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
)
from ratelimit.core.numbers import NEVER
from ratelimit.core.results import ConsumptionProbe, VerboseResult


def execute_all(
    commands: Sequence[Command[Any]], terms: Sequence[Terms], states: Sequence[State | None], now: int
) -> tuple[list[State | None], list[Any]]:
    """Run a command against each bucket at the same time; return the states to store (None: nothing) and the answers.

    Where one of the buckets has too few tokens, or could never pay a debt that is settled, none is changed. Then the
    answers say of each whether it has its own. A bucket that had to be made, or given another configuration, is stored
    all the same.
    """
    afters: list[State | None] = []
    answers: list[Any] = []
    refused = False
    for command, its_terms, state in zip(commands, terms, states, strict=True):
        after, answer = execute(command, its_terms, state, now)
        refused = refused or (consumption_of(command) is not None and not probe_in(answer).consumed)
        refused = refused or is_unpayable(command, answer)
        afters.append(after)
        answers.append(answer)
    if not refused:
        return afters, answers
    afters, looked = [], []
    for command, its_terms, state in zip(commands, terms, states, strict=True):
        after, answer = execute(_only_looking(command), its_terms, state, now)
        afters.append(after)
        looked.append(answer)
    return afters, [
        answer if consumption_of(command) is None else its_look
        for command, answer, its_look in zip(commands, answers, looked, strict=True)
    ]


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


def is_unpayable(command: Command[Any], answer: Any) -> bool:
    """Return whether this is a settlement, and its answer says that the debt could never be paid."""
    if type(command) is Verbose:
        return is_unpayable(command.command, answer.value)
    return type(command) is Settle and bool(answer == NEVER)


def _only_looking(command: Command[Any]) -> Command[Any]:
    """Return a command that changes nothing, in place of one that would."""
    if consumption_of(command) is not None or command.only_reads:
        return looking(command)
    return GetAvailableTokens()
