"""Commands are turned into the arguments of the script that decides."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from ratelimit import Bandwidth, BucketConfiguration, Expiration
from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Book,
    Cancel,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    HoldBack,
    ReplaceConfiguration,
    Reserve,
    Reset,
    Settle,
    Synchronize,
    TakeSnapshot,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.script_arguments import COUNTING, STRICT, form_of, plain_consumption
from ratelimit.stores.operations import Operation
from tests.support.script_requests import request

NOW = 1_700_000_000_000_000_000
CONFIGURATION = BucketConfiguration.parse("10/second; 100/hour")
AUTOMATIC = Expiration.automatic()
TEMPLATE = codec.encode(BucketState.initial(CONFIGURATION, None, 0))
OTHERS = [BucketConfiguration.parse(text) for text in ("5/minute", "7/minute id a")]

Packed = tuple[int, int, int, int]


class Unpacked(NamedTuple):
    """The parts of a request."""

    now: int
    flags: int
    expiration: int
    wanted: int
    operations: list[Packed]
    millis: int
    version: int
    template: bytes


def unpacked(arguments: tuple[bytes, ...] | None) -> Unpacked:
    assert arguments is not None
    request = arguments[0]
    now, flags, expiration, wanted, count = struct.unpack_from(">qBBBH", request)
    packed, rest = request[13 : 13 + 21 * count], request[13 + 21 * count :]
    millis, version = struct.unpack_from(">qq", rest)
    operations: list[Any] = list(struct.iter_unpack(">BIqq", packed))
    return Unpacked(now, flags, expiration, wanted, operations, millis, version, rest[16:])


def operations(command: Command[Any]) -> list[Packed] | None:
    """Unpack the number, times, tokens and further number of each operation."""
    arguments = request(command, Terms(CONFIGURATION), AUTOMATIC, NOW, must_exist=False)
    if arguments is None:
        return None
    parts = unpacked(arguments)
    assert (parts.now, parts.template) == (NOW, TEMPLATE)
    return parts.operations


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (TryConsume(3), (Operation.TRY_CONSUME, 1, 3, 0)),
        (TryConsumeAndReturnRemaining(3), (Operation.TRY_CONSUME, 1, 3, 0)),
        (ConsumeAsMuchAsPossible(), (Operation.CONSUME_AS_MUCH_AS_POSSIBLE, 1, MAX, 0)),
        (Reserve(3, 5), (Operation.RESERVE, 1, 3, 5)),
        (ConsumeIgnoringRateLimits(3), (Operation.CONSUME_IGNORING_RATE_LIMITS, 1, 3, 0)),
        (GiveBack(3), (Operation.GIVE_BACK, 1, 3, 0)),
        (Settle(5, 2), (Operation.GIVE_BACK, 1, 3, 0)),
        (Settle(5, 9), (Operation.CONSUME_IGNORING_RATE_LIMITS, 1, 4, 0)),
        (Cancel(3, -9), (Operation.CANCEL, 1, 3, -9)),
        (AddTokens(3), (Operation.ADD, 1, 3, 0)),
        (ForceAddTokens(3), (Operation.FORCE_ADD, 1, 3, 0)),
        (Reset(), (Operation.RESET, 1, 0, 0)),
        (Book(3), (Operation.BOOK, 1, 3, 0)),
        (HoldBack(3), (Operation.HOLD_BACK, 1, 3, 0)),
        *((ReplaceConfiguration(OTHERS[0], one), (Operation.REPLACE, 1, one.value, 0)) for one in TokensInheritance),
    ],
)
def test_each_command_is_an_operation(command: Command[Any], expected: Packed) -> None:
    assert operations(command) == [expected]
    assert operations(Verbose(command)) == [expected]
    assert operations(Batch((command,))) == [expected]


def test_what_was_taken_beside_the_tokens_follows_their_cancellation() -> None:
    assert operations(Cancel(3, 9, ((5, 0), (5, 0), (0, 7)))) == [
        (Operation.CANCEL, 1, 3, 9),
        (Operation.RAISE, 2, 5, 0),
        (Operation.RAISE, 1, 0, 7),
    ]


@pytest.mark.parametrize("command", [GetAvailableTokens(), EstimateAbilityToConsume(1), TakeSnapshot()])
def test_what_only_reads_leaves_no_trace(command: Command[Any]) -> None:
    assert operations(command) == []
    assert operations(Verbose(command)) == []
    assert operations(Batch((command,))) == []
    assert operations(Batch((TryConsume(1), Verbose(command), TryConsume(1)))) == [(Operation.TRY_CONSUME, 2, 1, 0)]


def test_tokens_are_booked_before_what_is_done_besides() -> None:
    assert operations(Synchronize(3, Verbose(TryConsume(1)), booking=True)) == [
        (Operation.BOOK, 1, 3, 0),
        (Operation.TRY_CONSUME, 1, 1, 0),
    ]
    assert operations(Synchronize(3, TakeSnapshot(), booking=True)) == [(Operation.BOOK, 1, 3, 0)]
    assert operations(Synchronize(0, TryConsume(1), booking=True)) == [(Operation.TRY_CONSUME, 1, 1, 0)]
    assert operations(Synchronize(3, TakeSnapshot(), booking=False)) == []


def every_command(of: type[Command[Any]] = Command) -> Iterator[type[Command[Any]]]:
    for command in of.__subclasses__():
        module = sys.modules[command.__module__]
        # A class with slots has an earlier class of its name beside it, which is none of the module's.
        if getattr(module, command.__name__, None) is command:
            if module.__name__.startswith("ratelimit."):
                yield command
            yield from every_command(command)


LEFT_TO_SWAPS: frozenset[type[Command[Any]]] = frozenset()
"""Commands that the script does not know, on purpose."""

EXAMPLES: dict[type[Command[Any]], tuple[Any, ...]] = {
    EstimateAbilityToConsume: (1,),
    Cancel: (1, 1, ((1, 1),)),
    HoldBack: (1,),
    Settle: (2, 1),
    ReplaceConfiguration: (OTHERS[0], TokensInheritance.AS_IS),
    Batch: ((Reset(), GetAvailableTokens()),),
    Verbose: (Reset(),),
    Synchronize: (1, Reset()),
    Reset: (),
    GetAvailableTokens: (),
    TakeSnapshot: (),
}
"""Arguments of the commands that take others than a number of tokens."""


def example(kind: type[Command[Any]]) -> Command[Any]:
    keywords = {"booking": True} if kind is Synchronize else {}
    return kind(*EXAMPLES.get(kind, (1,)), **keywords)


@pytest.mark.parametrize("kind", list(every_command()))
def test_every_command_only_reads_or_is_an_operation_or_is_left_to_swaps(kind: type[Command[Any]]) -> None:
    command = example(kind)
    packed = operations(command)
    if kind in LEFT_TO_SWAPS:
        assert packed is None
        return
    assert packed is not None, "give it an operation and a function in lua/, or name it among those left to swaps"
    assert bool(packed) is not command.only_reads
    assert operations(Batch((Verbose(command), TryConsume(1)))) is not None


def test_every_operation_is_used_by_a_command() -> None:
    used = {number for kind in every_command() for number, *_ in operations(example(kind)) or ()}
    assert used == set(Operation)


def test_the_limits_that_replace_others_go_along_once_each() -> None:
    first, second = (ReplaceConfiguration(limits, TokensInheritance.ADDITIVE) for limits in OTHERS)
    batch = Batch((first, TryConsume(1), second, second, first, first))
    arguments = request(batch, Terms(CONFIGURATION), AUTOMATIC, NOW, must_exist=False)
    assert arguments is not None
    _, *states = arguments
    assert states == [codec.encode(BucketState.initial(limits, None, NOW)) for limits in OTHERS]
    assert operations(batch) == [
        (Operation.REPLACE, 1, 3, 0),
        (Operation.TRY_CONSUME, 1, 1, 0),
        (Operation.REPLACE, 2, 3, 1),
        (Operation.REPLACE, 2, 3, 0),
    ]


class TryConsumeTwice(TryConsume):
    """What a subclass does is unknown."""


@pytest.mark.parametrize(
    "command",
    [
        *(TryConsumeTwice(1), TryConsume(-1), Reserve(-1), HoldBack(-1), TryConsume(MAX + 1), Reserve(1, MAX + 1)),
        HoldBack(MAX + 1),
    ],
)
def test_an_unknown_command_is_no_request_wherever_it_stands(command: Command[Any]) -> None:
    assert operations(command) is None
    assert operations(Verbose(command)) is None
    assert operations(Batch((TryConsume(1), Batch((Verbose(command),))))) is None


def test_equal_neighbours_are_one_operation_with_a_count() -> None:
    batch = Batch((*(TryConsume(1),) * 999, Batch((Verbose(TryConsumeAndReturnRemaining(1)), Reset())), TryConsume(1)))
    assert operations(batch) == [
        (Operation.TRY_CONSUME, 1000, 1, 0),
        (Operation.RESET, 1, 0, 0),
        (Operation.TRY_CONSUME, 1, 1, 0),
    ]
    assert operations(Batch(())) == []


@pytest.mark.parametrize(
    ("expiration", "version", "inheritance", "expected"),
    [
        (Expiration.none(), None, TokensInheritance.ADDITIVE, (0, 0, 0, 0)),
        (Expiration.fixed(2), 7, TokensInheritance.PROPORTIONALLY, (1, 2000, 1, 7)),
        (Expiration.after_refill(3), -1, TokensInheritance.RESET, (2, 3000, 3, -1)),
        (Expiration.after_refill(3), -1, TokensInheritance.AS_IS, (2, 3000, 2, -1)),
        (AUTOMATIC, 0, TokensInheritance.ADDITIVE, (3, 0, 4, 0)),
    ],
)
def test_the_expiration_and_the_wanted_version(
    expiration: Expiration, version: int | None, inheritance: TokensInheritance, expected: tuple[int, ...]
) -> None:
    for _ in range(2):  # the second time from the cache
        terms = Terms(CONFIGURATION, version, inheritance)
        arguments = request(TryConsume(1), terms, expiration, NOW, must_exist=False)
        parts = unpacked(arguments)
        assert (parts.expiration, parts.millis, parts.wanted, parts.version) == expected


def test_a_new_bucket_is_made_from_a_template_without_the_time() -> None:
    terms = Terms(CONFIGURATION, 7)
    arguments = [request(TryConsume(1), terms, AUTOMATIC, now, must_exist=False) for now in (NOW, NOW + 1)]
    templates = {unpacked(each).template for each in arguments}
    assert templates == {codec.encode(BucketState.initial(CONFIGURATION, 7, 0))}


def test_initial_tokens_that_adapt_to_the_time_are_those_of_this_time() -> None:
    adaptive = Bandwidth(
        capacity=10,
        refill_tokens=10,
        refill_period_nanos=10**9,
        refill_intervally=True,
        first_refill_millis=NOW // 10**6,
        adaptive_initial_tokens=True,
    )
    configuration = BucketConfiguration(adaptive)
    for now in (NOW - 10**9, NOW - 10**8):
        arguments = request(TryConsume(1), Terms(configuration), AUTOMATIC, now, must_exist=False)
        assert unpacked(arguments).template == codec.encode(BucketState.initial(configuration, None, now))


def test_a_bucket_that_must_exist_is_said_to() -> None:
    for flags, sent in ((0, 4), (STRICT, 5), (STRICT | COUNTING, 7)):
        arguments = request(TryConsume(1), Terms(CONFIGURATION), AUTOMATIC, NOW, must_exist=True, flags=flags)
        assert unpacked(arguments).flags == sent


def test_what_only_consumes_is_known() -> None:
    one, other, shown = TryConsume(3), TryConsume(4), TryConsumeAndReturnRemaining(3)
    assert plain_consumption(one) == (3, 1, False)
    assert plain_consumption(shown) == (3, 1, True)
    assert plain_consumption(Batch((one, TryConsume(3), one))) == (3, 3, False)
    for command in (Reserve(3), TryConsume(0), TryConsumeTwice(3), Batch(()), Batch((one, other)), Batch((one, shown))):
        assert plain_consumption(command) is None
    assert plain_consumption(Batch((Batch((one, one)),))) is None


def test_numbers_of_more_than_64_bits_are_no_request() -> None:
    for terms, expiration, now in (
        (Terms(CONFIGURATION, MAX + 1), AUTOMATIC, NOW),
        (Terms(CONFIGURATION), Expiration("fixed", MAX + 1), NOW),
        (Terms(CONFIGURATION), AUTOMATIC, MAX + 1),
    ):
        assert request(TryConsume(1), terms, expiration, now, must_exist=False) is None
        assert request(Reset(), terms, expiration, now, must_exist=False) is None


def test_plans_are_told_apart_however_many_there_are() -> None:
    seen = set()
    cached = form_of.cache_info
    most = cached().maxsize
    assert most is not None
    for capacity in range(1, 2 * most):
        terms = Terms(BucketConfiguration(Bandwidth.greedy(capacity, 1)))
        arguments = request(TryConsume(1), terms, AUTOMATIC, NOW, must_exist=False)
        assert arguments is not None
        seen.add(arguments[0])
        assert cached().currsize <= most
    assert len(seen) == 2 * most - 1


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ("10/second", 10),
        ("10/second; 5/minute", 5),
        ("10/second burst 50 initial 7", 7),
        ("10/second intervally", 0),
        ("10/second intervally; 5/minute", 0),
        ("10/second; 5/minute intervally", 5),
    ],
)
def test_what_a_new_bucket_has_leaves_a_trace_where_tokens_come_back_continuously(limits: str, tokens: int) -> None:
    form = form_of(Terms(BucketConfiguration.parse(limits)), AUTOMATIC)
    assert form is not None
    assert form.traceable_tokens == tokens
