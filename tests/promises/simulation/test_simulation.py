"""Schedules in which everything goes wrong, and proofs that the simulation would notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ratelimit.core.algorithm import decode
from ratelimit.core.commands import GiveBack, Settle, TryConsume, execute
from ratelimit.core.expiration import Expiration
from ratelimit.core.sliding_window.state import SlidingWindowState
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine import lost_reply, preparing, swapping
from ratelimit.engine.attempt import Attempt
from ratelimit.engine.express import Express
from ratelimit.engine.last_seen import NOTHING_SEEN, Sighting
from ratelimit.engine.local_decisions import LocalDecisions
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Question
from ratelimit.engine.store_requests import Requests
from ratelimit.engine.swapping import Swapping
from ratelimit.errors import StoreError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided, Lost
from tests.promises.simulation import clients, script
from tests.promises.simulation.bucket import Limits
from tests.promises.simulation.clients import Process
from tests.promises.simulation.ledger import Decision
from tests.promises.simulation.network import FAULTS, Network, Request
from tests.promises.simulation.schedules import LIMITS, SLIDING, WINDOWS, simulate
from tests.promises.simulation.server import Server
from tests.promises.simulation.world import MILLISECOND, ViolationError
from tests.support.fixed_window import WindowState

SCHEDULES = 20_000
PART = 2_500
SCHEDULES_OVER_WINDOWS = 5_000

Mutant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("first", range(0, SCHEDULES, PART))
def test_every_rule_is_kept_whatever_happens(first: int) -> None:
    for seed in range(first, first + PART):
        try:
            simulate(seed)
        except ViolationError as error:
            pytest.fail(f"{error}\nreplay it: python -m tests.promises.simulation --seed {seed} --replay")


@pytest.mark.parametrize("first", range(0, SCHEDULES_OVER_WINDOWS, PART))
@pytest.mark.parametrize(("limits", "option"), [(WINDOWS, "--windows"), (SLIDING, "--sliding")])
def test_every_rule_is_kept_over_other_algorithms(first: int, limits: tuple[Limits, ...], option: str) -> None:
    for seed in range(first, first + PART):
        try:
            simulate(seed, limits)
        except ViolationError as error:
            pytest.fail(f"{error}\nreplay it: python -m tests.promises.simulation --seed {seed} --replay {option}")


def test_a_seed_stands_for_one_schedule() -> None:
    for seed in range(30):
        assert simulate(seed, tracing=True).lines == simulate(seed, tracing=True).lines


@pytest.mark.parametrize("limits", [LIMITS, WINDOWS, SLIDING], ids=["token buckets", "windows", "sliding windows"])
def test_everything_does_go_wrong(limits: tuple[Limits, ...]) -> None:
    told = "\n".join(line for seed in range(400) for line in simulate(seed, limits, tracing=True).lines)
    for fault in FAULTS:
        assert f", {fault}" in told
    for event in (
        *("and has lost", "and is done", "is stopped", "is interrupted", "expires", "fails over", "Cancel(", "Settle("),
        *("ContentionError", "BucketNotFoundError", "StoreTimeoutError", "no time left", "nobody waits"),
    ):
        assert event in told
    # A server decides only about what it has a script for.
    assert ("and is decided" in told) is (": decide" in told) is (limits is LIMITS)


# Mutants: each breaks one thing, and is to be noticed soon.


def a_store_that_swaps_whatever_is_there(patch: pytest.MonkeyPatch) -> None:
    def swap(self: Server, decision: Decision, _before: bytes | None, after: bytes, ttl_millis: int) -> None:
        self.bucket(decision.key)
        self._write(decision, after, ttl_millis)

    patch.setattr(Server, "swap", swap)


def a_store_whose_bytes_are_cut_off(patch: pytest.MonkeyPatch) -> None:
    decide = script.decide

    def cut_off(before: bytes | None, arguments: tuple[bytes, ...]) -> script.Decision:
        decided = decide(before, arguments)
        return decided if decided.after is None else decided._replace(after=decided.after[:-1])

    patch.setattr(script, "decide", cut_off)


def a_store_that_lets_clients_wait(patch: pytest.MonkeyPatch) -> None:
    send = Network.send

    def send_without_deadline(self: Network, request: Request) -> None:
        request.deadline = None
        send(self, request)

    patch.setattr(Network, "send", send_without_deadline)


def a_script_that_is_repeated_when_its_reply_is_lost(patch: pytest.MonkeyPatch) -> None:
    def repeating(requests: Requests) -> Swapping:
        decide: Any = requests.decide

        def deciding(key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided]:
            try:
                return (yield decide(key, arguments, deadline=deadline))  # type: ignore[no-any-return]
            except StoreError as error:
                if not error.in_doubt:
                    raise
            return (yield decide(key, arguments, deadline=deadline))  # type: ignore[no-any-return]

        requests.deciding = deciding
        return Swapping(requests)

    patch.setattr(clients, "Swapping", repeating)


def a_script_that_runs_a_strict_request_at_any_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(script, "STRICT", 0)


def a_script_that_grants_a_strict_request_in_part(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(script, "all", lambda _: True, raising=False)


def a_script_that_is_never_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preparing, "form_of", lambda *_: None)


def a_clock_that_is_ahead(patch: pytest.MonkeyPatch) -> None:
    known_now = Process._known_now

    def ahead(self: Process) -> int | None:
        now = known_now(self)
        if now is None:
            return None
        assert self._running is not None
        now += 5 * MILLISECOND
        if self._running.decision is not None:
            self._running.decision.reading = now
        return now

    patch.setattr(Process, "_known_now", ahead)


def a_client_that_admits_from_memory(patch: pytest.MonkeyPatch) -> None:
    decide = clients.by_express

    def admit(express: Express, question: Question) -> Steps[Any]:
        ((target, terms, command),) = question.parts
        requests = express.requests
        seen, now = requests.last_seen(target.stored_key, NOTHING_SEEN), requests.now(target.stored_key)
        if seen.stored is not None and isinstance(command, TryConsume):
            after, answer = execute(command, terms, seen.state or decode(seen.stored), now)
            if answer:
                requests.remember(target.stored_key, Sighting(seen.stored, after))
                return answer
        return (yield from decide(express, question))

    patch.setattr(clients, "by_express", admit)


def _repeating(patch: pytest.MonkeyPatch, repeat: Callable[..., Steps[Lost | None]]) -> None:
    """Put something else in the place of what follows a swap whose reply was lost."""
    patch.setattr(swapping, "repeated", repeat)


def a_client_that_takes_any_bytes_for_its_own(patch: pytest.MonkeyPatch) -> None:
    repeated = lost_reply.repeated

    def repeat(*arguments: Any) -> Steps[Lost | None]:
        try:
            return (yield from repeated(*arguments))
        except StoreError as error:
            if "a reply of the store was lost" not in error.message:
                raise
        return None

    _repeating(patch, repeat)


def a_client_that_ignores_that_others_write_the_same_bytes(patch: pytest.MonkeyPatch) -> None:
    for state in (BucketState, WindowState, SlidingWindowState):
        patch.setattr(state, "shows", lambda *_: True)


def a_state_that_claims_to_show_a_reading_and_does_not(patch: pytest.MonkeyPatch) -> None:
    refilled = WindowState.refilled

    def unchanged(state: WindowState, now: int) -> WindowState:
        return refilled(state, now)._replace(changed_at=state.changed_at)

    patch.setattr(WindowState, "refilled", unchanged)
    patch.setattr(WindowState, "shows", lambda *_: True)


def a_client_that_trusts_a_coarse_clock(patch: pytest.MonkeyPatch) -> None:
    decide = clients.by_express

    def trust(express: Express, question: Question) -> Steps[Any]:
        express.requests.unique_readings = True
        return (yield from decide(express, question))

    patch.setattr(clients, "by_express", trust)


def a_client_that_begins_anew_when_a_reply_is_lost(patch: pytest.MonkeyPatch) -> None:
    def repeat(attempt: Attempt, failure: BaseException) -> Steps[Lost | None]:
        if not isinstance(failure, StoreError) or not failure.in_doubt:
            raise failure
        return Lost((yield attempt.requests.get(attempt.target.stored_key, deadline=attempt.question.deadline)))

    _repeating(patch, repeat)


def a_client_that_tells_no_doubt(patch: pytest.MonkeyPatch) -> None:
    repeated = lost_reply.repeated

    def repeat(*arguments: Any) -> Steps[Lost | None]:
        try:
            return (yield from repeated(*arguments))
        except StoreError as error:
            error.in_doubt = False
            raise

    _repeating(patch, repeat)


def a_client_that_gives_nothing_back(patch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> Steps[None]:
        return
        yield

    patch.setattr(BucketProxy, "_cancel", nothing)


def a_wait_that_is_cancelled_at_the_expense_of_those_behind_it(patch: pytest.MonkeyPatch) -> None:
    for state in (BucketState, WindowState):
        patch.setattr(state, "cancelled", lambda state, tokens, *_: state.given_back(tokens))


def a_wait_under_several_limits_during_which_the_others_recover(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BucketState, "reserved", lambda state, tokens, *_: (state.consumed(tokens), ()))


def a_wait_that_leaves_the_tokens_of_earlier_windows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowState, "reserved", lambda state, tokens, *_: (state.consumed(tokens), ()))


def a_sliding_wait_that_counts_from_its_beginning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlidingWindowState, "reserved", lambda state, tokens, *_: (state.consumed(tokens), ((state.at, 0),)))


def a_sliding_wait_that_is_cancelled_at_the_expense_of_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlidingWindowState, "cancelled", lambda state, tokens, *_: state.given_back(tokens))


def an_expiration_that_is_too_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Expiration, "ttl_millis", lambda *_: 1)


def a_client_that_forgets_what_it_could_not_book(patch: pytest.MonkeyPatch) -> None:
    failed = LocalDecisions._failed

    def forget(self: LocalDecisions, begun: Any, error: BaseException) -> None:
        failed(self, begun, error)
        begun.entry.pending -= begun.carried

    patch.setattr(LocalDecisions, "_failed", forget)


def a_settlement_that_forgives_an_excess(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Settle, "correction", property(lambda settlement: GiveBack(settlement.rest)))


MUTANTS: list[tuple[Mutant, str]] = [
    (a_settlement_that_forgives_an_excess, "is told|has stored"),
    (a_store_that_swaps_whatever_is_there, "has stored"),
    (a_store_whose_bytes_are_cut_off, "cannot be read"),
    (a_store_that_lets_clients_wait, "after its deadline"),
    (a_script_that_runs_a_strict_request_at_any_time, "is stored twice|is charged"),
    (a_script_that_grants_a_strict_request_in_part, "is told|is stored twice|is charged"),
    (a_script_that_is_repeated_when_its_reply_is_lost, "is stored twice|is charged"),
    (a_script_that_is_never_asked, "round trips"),
    (a_clock_that_is_ahead, "is told|has stored"),
    (a_client_that_admits_from_memory, "is told"),
    (a_client_that_takes_any_bytes_for_its_own, "is told"),
    (a_client_that_ignores_that_others_write_the_same_bytes, "is told"),
    (a_client_that_trusts_a_coarse_clock, "is told"),
    (a_client_that_begins_anew_when_a_reply_is_lost, "is stored twice|is charged"),
    (a_client_that_tells_no_doubt, "tells no doubt"),
    (a_client_that_gives_nothing_back, "are not given back"),
    (a_wait_that_is_cancelled_at_the_expense_of_those_behind_it, "has stored"),
    (a_wait_under_several_limits_during_which_the_others_recover, "has stored"),
    (a_client_that_forgets_what_it_could_not_book, "has handed out"),
    (an_expiration_that_is_too_short, "tokens missing"),
]


@pytest.mark.parametrize(("mutant", "violation"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_a_mutant_is_caught(mutant: Mutant, violation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(ViolationError, match=violation):
        for seed in range(5_000):
            simulate(seed)


MUTANTS_OVER_WINDOWS: list[tuple[Mutant, str]] = [
    (a_state_that_claims_to_show_a_reading_and_does_not, "is told"),
    (a_store_that_swaps_whatever_is_there, "has stored"),
    (a_client_that_admits_from_memory, "is told"),
    (a_client_that_takes_any_bytes_for_its_own, "is told"),
    (a_client_that_ignores_that_others_write_the_same_bytes, "is told"),
    (a_client_that_trusts_a_coarse_clock, "is told"),
    (a_client_that_begins_anew_when_a_reply_is_lost, "is stored twice|is charged"),
    (a_client_that_gives_nothing_back, "are not given back"),
    (a_wait_that_is_cancelled_at_the_expense_of_those_behind_it, "has stored"),
    (a_wait_that_leaves_the_tokens_of_earlier_windows, "has stored"),
    (a_client_that_forgets_what_it_could_not_book, "has handed out"),
    (an_expiration_that_is_too_short, "tokens missing"),
]


@pytest.mark.parametrize(
    ("mutant", "violation"), MUTANTS_OVER_WINDOWS, ids=[mutant.__name__ for mutant, _ in MUTANTS_OVER_WINDOWS]
)
def test_a_mutant_is_caught_over_a_second_algorithm(
    mutant: Mutant, violation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(ViolationError, match=violation):
        for seed in range(2_000):
            simulate(seed, WINDOWS)


MUTANTS_OVER_SLIDING_WINDOWS: list[tuple[Mutant, str]] = [
    (a_store_that_swaps_whatever_is_there, "has stored"),
    (a_client_that_admits_from_memory, "is told"),
    (a_client_that_ignores_that_others_write_the_same_bytes, "is told"),
    (a_client_that_begins_anew_when_a_reply_is_lost, "is stored twice|is charged"),
    (a_client_that_gives_nothing_back, "are not given back"),
    (a_sliding_wait_that_counts_from_its_beginning, "has stored|is told"),
    (a_sliding_wait_that_is_cancelled_at_the_expense_of_others, "has stored"),
    (an_expiration_that_is_too_short, "tokens missing"),
]


@pytest.mark.parametrize(
    ("mutant", "violation"),
    MUTANTS_OVER_SLIDING_WINDOWS,
    ids=[mutant.__name__ for mutant, _ in MUTANTS_OVER_SLIDING_WINDOWS],
)
def test_a_mutant_is_caught_over_sliding_windows(
    mutant: Mutant, violation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(ViolationError, match=violation):
        for seed in range(3_000):
            simulate(seed, SLIDING)
