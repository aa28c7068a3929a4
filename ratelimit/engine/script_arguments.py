"""Turn commands into the arguments of ``lua/decide.lua``, which applies them where the bucket is stored.

The script makes the same transition as ``execute``, to the byte, and replies only with what was stored before: the
answers follow from that. It is given the time, the operations, and what depends on the terms and the expiration alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, Final, NamedTuple

from ratelimit.core.algorithm import encode
from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Book,
    Cancel,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    ForceAddTokens,
    GiveBack,
    HoldBack,
    PeriodicTerms,
    ReplaceConfiguration,
    Reserve,
    Reset,
    Settle,
    Synchronize,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.engine.question import new_tuple
from ratelimit.stores.operations import Operation

_EXPIRATIONS: Final = {"none": 0, "fixed": 1, "after_refill": 2, "automatic": 3}

STRICT: Final = 1
"""The flag of a request whose effect can be seen in the state afterwards; see ``lua/decide.lua``."""

COUNTING: Final = 2
"""The flag of a request to which the number of consumed tokens is answer enough."""

MUST_EXIST: Final = 4
"""The flag of a request that does not make a missing bucket."""

# The time, the flags, the kind of expiration, 0 or 1 + inheritance, and the number of operations.
_HEAD: Final = struct.Struct(">qBBBH")
# The number of the operation, how many times it is run, the tokens, and a further number.
_OPERATION: Final = struct.Struct(">BIqq")
# Both for one operation.
_HEAD_OF_ONE: Final = struct.Struct(">qBBBHBIqq")
# The milliseconds of the expiration, and the version.
_TAIL: Final = struct.Struct(">qq")

# What is added to the number of an inheritance that does not apply where only the period is another one.
_SAME_BUT_FOR_THE_PERIOD: Final = 4

# Looking this up in the enumeration would take a tenth of the time of a request.
_TRY_CONSUME: Final = Operation.TRY_CONSUME.value

# An operation, its tokens, and what it needs besides them: a number, or the configuration that a replacement puts in
# place.
_Step = tuple[Operation, int, int | BucketConfiguration]


class _UnknownCommandError(Exception):
    """The script does not know the command, or not with these tokens."""


class Form(NamedTuple):
    """What all requests about buckets of the same terms have in common.

    :param kind: the number of the kind of expiration.
    :param wanted: 0, or 1 + the number of the inheritance where a version is wanted; 4 more where tokens stay as they
        are if the stored version differs in the number of the period only.
    :param tail: the end of a request.
    :param is_open: whether the state of a new bucket still has to follow, because it depends on the time.
    :param traceable_tokens: the most tokens whose consumption leaves the time in the state, as the last refill's;
        0 where it never does. If a new bucket had too few, the time would be there although nothing was consumed.
    """

    kind: int
    wanted: int
    tail: bytes
    is_open: bool
    traceable_tokens: int

    def request_to_consume(
        self, tokens: int, calls: int, terms: Terms, now: int, flags: int
    ) -> tuple[bytes, ...] | None:
        """Return the arguments of the script for so many calls that consume tokens if they are there."""
        kind, wanted, tail, is_open, _ = self
        try:
            packed = _HEAD_OF_ONE.pack(now, flags, kind, wanted, 1, _TRY_CONSUME, calls, tokens, 0) + tail
        except struct.error:
            # This is a number of more than 64 bits.
            return None
        return (packed + encode(terms.initial(now)) if is_open else packed,)

    def request(self, command: Command[Any], terms: Terms, now: int, flags: int) -> tuple[bytes, ...] | None:
        """Return the arguments of the script for this command; None where the script does not know the command."""
        try:
            operations, replacements = _packed(command, now)
            packed = _HEAD.pack(now, flags, self.kind, self.wanted, len(operations)) + b"".join(operations) + self.tail
        except (_UnknownCommandError, struct.error):
            # A struct.error is a number of more than 64 bits, or more operations than a request may have.
            return None
        return packed + encode(terms.initial(now)) if self.is_open else packed, *replacements


class PeriodicForm(NamedTuple):
    """What requests have in common where limits change with the periods of the calendar; see :class:`Form`."""

    expiration: Expiration
    traceable_tokens: int

    def request_to_consume(
        self, tokens: int, calls: int, terms: Terms, now: int, flags: int
    ) -> tuple[bytes, ...] | None:
        """See :meth:`Form.request_to_consume`."""
        dated = terms.at(now)
        form = _form_in_period(dated, self.expiration)
        return None if form is None else form.request_to_consume(tokens, calls, dated, now, flags)

    def request(self, command: Command[Any], terms: Terms, now: int, flags: int) -> tuple[bytes, ...] | None:
        """See :meth:`Form.request`."""
        dated = terms.at(now)
        form = _form_in_period(dated, self.expiration)
        return None if form is None else form.request(command, dated, now, flags)


# The values in the key are mostly the very objects of the last decision, and a configuration keeps its hash. So finding
# an entry by value takes 0.25 us, and would take no less by the id() of the configuration.
@lru_cache(maxsize=1024)
def form_of(terms: Terms, expiration: Expiration) -> Form | PeriodicForm | None:
    """Return what all requests about such buckets have in common; None where there is no script for them."""
    if terms.configuration.algorithm.script is None:
        return None
    if isinstance(terms, PeriodicTerms):
        return PeriodicForm(expiration, _traceable_tokens(terms))
    return _form_of(terms, expiration)


def _form_of(terms: Terms, expiration: Expiration) -> Form | None:
    configuration, version, inheritance = terms
    wanted = 0 if version is None else 1 + inheritance.value
    try:
        tail = _TAIL.pack(expiration.duration_millis, version or 0)
    except struct.error:
        return None
    is_open = any(bandwidth.adaptive_initial_tokens for bandwidth in configuration.bandwidths)
    if not is_open:
        tail += encode(terms.initial(0))
    return Form(_EXPIRATIONS[expiration.kind], wanted, tail, is_open, _traceable_tokens(terms))


def _traceable_tokens(terms: Terms) -> int:
    bandwidths = terms.configuration.bandwidths
    return 0 if bandwidths[0].refill_intervally else min(bandwidth.initial_tokens for bandwidth in bandwidths)


@lru_cache(maxsize=1024)
def _form_in_period(dated: Terms, expiration: Expiration) -> Form | None:
    form = _form_of(dated, expiration)
    return None if form is None else form._replace(wanted=form.wanted + _SAME_BUT_FOR_THE_PERIOD)


class PlainConsumption(NamedTuple):
    """What a command is that only consumes tokens if they are there.

    :param tokens: the tokens of one call, 1 or more.
    :param calls: how many such calls the command carries.
    :param is_shown: whether the answer shows the bucket.
    """

    tokens: int
    calls: int
    is_shown: bool


def plain_consumption(command: Command[Any]) -> PlainConsumption | None:
    """Return what the command consumes, if it does nothing else."""
    kind: type[Command[Any]] = type(command)
    calls = 1
    if kind is Batch:
        commands: tuple[Command[Any], ...] = command.commands  # type: ignore[attr-defined]  # a batch has them
        command, calls = commands[0] if commands else command, len(commands)
        if commands.count(command) != calls:
            return None
        kind = type(command)
    if (kind is TryConsume or kind is TryConsumeAndReturnRemaining) and command.tokens >= 1:  # type: ignore[attr-defined]  # both have tokens
        return new_tuple(PlainConsumption, (command.tokens, calls, kind is not TryConsume))  # type: ignore[attr-defined]
    return None


def _packed(command: Command[Any], now: int) -> tuple[list[bytes], tuple[bytes, ...]]:
    """Pack the steps of a command, equal neighbours as one with a count; and the states that replace others."""
    places: dict[BucketConfiguration, int] = {}
    packed = []
    for (operation, tokens, further), equal in groupby(_steps(command)):
        number = places.setdefault(further, len(places)) if isinstance(further, BucketConfiguration) else further
        packed.append(_OPERATION.pack(operation, sum(1 for _ in equal), tokens, number))
    return packed, tuple(encode(Terms(limits).initial(now)) for limits in places)


def _steps(command: Command[Any]) -> Iterator[_Step]:
    """Yield one step after another, as the parts of a batch are run; commands that only read leave no trace.

    Commands are told apart by their exact type, since a subclass may do anything.
    """
    if type(command) is Batch:
        for part in command.commands:
            yield from _steps(part)
    elif type(command) is Verbose:
        yield from _steps(command.command)
    elif type(command) is Synchronize and command.booking:
        if command.tokens:
            yield Operation.BOOK, _at_least_0(command.tokens), 0
        yield from _steps(command.command)
    elif type(command) is Settle:
        yield from _steps(command.correction)
    elif type(command) is Cancel:
        yield Operation.CANCEL, _at_least_0(command.tokens), command.noted
        for tokens, unfinished in command.surplus:
            yield Operation.RAISE, tokens, unfinished
    elif not command.only_reads:
        yield _step(command)


def _step(command: Command[Any]) -> _Step:
    """Return the one step that a command is."""
    if type(command) is Reset:
        return Operation.RESET, 0, 0
    if type(command) is ConsumeAsMuchAsPossible:
        return Operation.CONSUME_AS_MUCH_AS_POSSIBLE, _at_least_0(command.limit), 0
    if type(command) is Reserve:
        return Operation.RESERVE, _at_least_0(command.tokens), command.longest_wait_nanos
    if type(command) is HoldBack:
        return Operation.HOLD_BACK, _at_least_0(command.nanos), 0
    if type(command) is ReplaceConfiguration and isinstance(command.configuration, BucketConfiguration):
        return Operation.REPLACE, command.inheritance.value, command.configuration
    operation = _WITH_TOKENS_ONLY.get(type(command))
    if operation is None:
        raise _UnknownCommandError
    return operation, _at_least_0(command.tokens), 0  # type: ignore[attr-defined]  # all of _WITH_TOKENS_ONLY have them


_WITH_TOKENS_ONLY: Final[dict[type[Command[Any]], Operation]] = {
    TryConsume: Operation.TRY_CONSUME,
    TryConsumeAndReturnRemaining: Operation.TRY_CONSUME,
    ConsumeIgnoringRateLimits: Operation.CONSUME_IGNORING_RATE_LIMITS,
    GiveBack: Operation.GIVE_BACK,
    AddTokens: Operation.ADD,
    ForceAddTokens: Operation.FORCE_ADD,
    Book: Operation.BOOK,
}


def _at_least_0(tokens: int) -> int:
    """Return these tokens, of which the script takes 0 or more; no bucket asks for fewer."""
    if tokens < 0:
        raise _UnknownCommandError
    return tokens
