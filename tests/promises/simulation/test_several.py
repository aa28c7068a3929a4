"""Schedules of decisions about several buckets, and proofs that their rules would notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ratelimit.core.commands import GiveBack, Settle
from ratelimit.core.several import execute_all
from ratelimit.engine.several import attempt, deciding
from ratelimit.engine.several.attempt import Attempt, Held
from ratelimit.errors import StoreError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Lost, Swap
from tests.promises.simulation.network import FAULTS
from tests.promises.simulation.several import Decision, Server, simulate
from tests.promises.simulation.world import ViolationError

SCHEDULES = 10_000
PART = 2_500

Mutant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("first", range(0, SCHEDULES, PART))
def test_every_rule_is_kept_whatever_happens(first: int) -> None:
    for seed in range(first, first + PART):
        try:
            simulate(seed)
        except ViolationError as error:
            pytest.fail(f"seed {seed}: {error}")


def test_everything_does_go_wrong() -> None:
    told = "\n".join(line for seed in range(300) for line in simulate(seed, tracing=True).lines)
    for fault in FAULTS:
        assert f", {fault}" in told
    for event in ("is interrupted", "ContentionError", "StoreTimeoutError", "nobody waits", ": decide", ": swap"):
        assert event in told


def a_server_that_stores_some_of_them(patch: pytest.MonkeyPatch) -> None:
    swap_all = Server.swap_all

    def some(self: Server, swaps: Sequence[Swap], decision: Decision) -> Any:
        return swap_all(self, swaps[:1], decision)

    patch.setattr(Server, "swap_all", some)


def a_client_that_takes_a_lost_reply_for_a_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deciding, "_was_not_changed", lambda *_: True)
    patch.setattr(deciding, "_cannot_be_as_before", lambda *_: True)


def a_client_that_takes_any_bytes_for_its_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deciding, "_holds_our_bytes", lambda _held, loss, _now: loss is not None)


def a_client_that_trusts_a_coarse_clock(patch: pytest.MonkeyPatch) -> None:
    made = Attempt.__init__

    def trusting(self: Attempt, requests: Any, *arguments: Any, **keywords: Any) -> None:
        requests.unique_readings = True
        made(self, requests, *arguments, **keywords)

    patch.setattr(Attempt, "__init__", trusting)


def a_client_that_tells_no_doubt(patch: pytest.MonkeyPatch) -> None:
    repeated = deciding._repeated

    def repeat(*arguments: Any) -> Steps[Any]:
        try:
            return (yield from repeated(*arguments))
        except StoreError as error:
            error.in_doubt = False
            raise

    patch.setattr(deciding, "_repeated", repeat)


def a_client_that_begins_again_where_a_reply_is_lost(patch: pytest.MonkeyPatch) -> None:
    def repeat(attempt: Attempt, failure: BaseException) -> Steps[Sequence[Lost | None] | None]:
        if not isinstance(failure, StoreError):
            raise failure
        for held in attempt.held.values():
            held.after = None
        return (yield attempt.ask()) or [None for _ in attempt.held]

    patch.setattr(deciding, "_repeated", repeat)


def a_client_that_does_not_swap_what_it_has_charged(patch: pytest.MonkeyPatch) -> None:
    swap = Held.swap

    def forgetful(self: Held) -> Swap:
        made = swap(self)
        return made._replace(after=None) if made.key == b"user 1" else made

    patch.setattr(Held, "swap", forgetful)


def a_script_that_is_never_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deciding, "request_for", lambda *_: None)


def a_pure_part_that_charges_those_that_have_tokens(patch: pytest.MonkeyPatch) -> None:
    def each_by_itself(call: Any, states: Any, now: int) -> Any:
        outcomes = [
            execute_all([part.command], [part.terms], [state], now) for part, state in zip(call, states, strict=True)
        ]
        return [afters[0] for afters, _ in outcomes], [answers[0] for _, answers in outcomes]

    patch.setattr(attempt, "computed", each_by_itself)


def a_settlement_that_forgives_an_excess(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Settle, "correction", property(lambda settlement: GiveBack(settlement.rest)))


MUTANTS: list[tuple[Mutant, str]] = [
    (a_server_that_stores_some_of_them, "is told"),
    (a_client_that_takes_a_lost_reply_for_a_loss, "is charged"),
    (a_client_that_takes_any_bytes_for_its_own, "is told"),
    (a_client_that_trusts_a_coarse_clock, "is told"),
    (a_client_that_tells_no_doubt, "is told"),
    (a_client_that_begins_again_where_a_reply_is_lost, "is charged"),
    (a_client_that_does_not_swap_what_it_has_charged, "is told"),
    (a_script_that_is_never_asked, "round trips"),
    (a_pure_part_that_charges_those_that_have_tokens, "is told"),
    (a_settlement_that_forgives_an_excess, "is told"),
]


@pytest.mark.parametrize(("mutant", "violation"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_a_mutant_is_caught(mutant: Mutant, violation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(ViolationError, match=violation):
        for seed in range(5_000):
            simulate(seed)
