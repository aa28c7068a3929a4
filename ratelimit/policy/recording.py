"""Reports each decision of the integrations to recorders, such as the fixtures for tests."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, NamedTuple

from ratelimit.keys import Key


class RecordedDecision(NamedTuple):
    """A decision about a request, a call of a function, or a call of gRPC, by one limit.

    :param name: of the limit; the text of the limits where it has no name.
    :param key: whose tokens were asked for; None where a limit has one bucket for all.
    :param admitted: whether there were enough of them, also where another limit has refused the same request.
    """

    name: str
    key: Key | None
    admitted: bool


recorders: Final[list[Callable[[RecordedDecision], None]]] = []
"""Callables that get each decision. Mostly there are none."""


@contextmanager
def recording() -> Generator[list[RecordedDecision]]:
    """Collect the decisions of all integrations of this process for as long as the block runs."""
    recorded: list[RecordedDecision] = []
    recorders.append(recorded.append)
    try:
        yield recorded
    finally:
        recorders.remove(recorded.append)


def record(name: str, key: Key | None, *, admitted: bool) -> None:
    """Hand a decision to all recorders."""
    for recorder in recorders:
        recorder(RecordedDecision(name, key, admitted))
