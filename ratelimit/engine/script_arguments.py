"""Turn commands into the arguments of ``lua/decide.lua``, which applies them where the bucket is stored.

The script makes the same transition as ``execute``, to the byte, and replies only with what was stored before: the
answers follow from that. It is given the time, the operations, and what depends on the terms and the expiration alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

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
    ReplaceConfiguration,
    Reserve,
    Reset,
    Synchronize,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.stores.operations import Operation

_EXPIRATIONS: Final = {"none": 0, "fixed": 1, "after_refill": 2, "automatic": 3}

# The number of the operation, how many times it is run, the tokens, and a further number.
_OPERATION: Final = struct.Struct(">BIqq")
_NOW: Final = struct.Struct(">q")
_ONE_OPERATION: Final = struct.Struct(">qBIqq")
# The kind of expiration, its milliseconds, 0 or 1 + inheritance, and the version.
_PLAN: Final = struct.Struct(">BqBq")

# Looking this up in the enumeration would take a tenth of the time of a request.
_TRY_CONSUME: Final = Operation.TRY_CONSUME.value

_MAY_BE_MADE: Final = b"0"
_MUST_EXIST: Final = b"1"

# An operation, its tokens, and what it needs besides them: a number, or the configuration that a replacement puts in
# place.
_Step = tuple[Operation, int, int | BucketConfiguration]


class _UnknownCommandError(Exception):
    """The script does not know the command, or not with these tokens."""


def request(
    command: Command[Any], terms: Terms, expiration: Expiration, now: int, *, must_exist: bool
) -> tuple[bytes, ...] | None:
    """Return the arguments of the script for this command; None where the script does not know the command.

    :param must_exist: whether a missing bucket is left missing, and not made.
    """
    if terms.configuration.algorithm.script is None:
        return None
    replacements: tuple[bytes, ...] = ()
    try:
        if (type(command) is TryConsume or type(command) is TryConsumeAndReturnRemaining) and command.tokens >= 0:
            operations = _ONE_OPERATION.pack(now, _TRY_CONSUME, 1, command.tokens, 0)
        else:
            packed, replacements = _packed(command, now)
            operations = _NOW.pack(now) + packed
        rules, template = _fixed_part(terms, expiration)
        if template is None:
            template = encode(terms.initial(now))
    except (_UnknownCommandError, struct.error):
        # A struct.error is a number of more than 64 bits.
        return None
    if must_exist or replacements:
        return template, rules + operations, _MUST_EXIST if must_exist else _MAY_BE_MADE, *replacements
    return template, rules + operations


def _packed(command: Command[Any], now: int) -> tuple[bytes, tuple[bytes, ...]]:
    """Pack the steps of a command, equal neighbours as one with a count; and the states that replace others."""
    places: dict[BucketConfiguration, int] = {}
    packed = []
    for (operation, tokens, further), equal in groupby(_steps(command)):
        number = places.setdefault(further, len(places)) if isinstance(further, BucketConfiguration) else further
        packed.append(_OPERATION.pack(operation, sum(1 for _ in equal), tokens, number))
    return b"".join(packed), tuple(encode(Terms(limits).initial(now)) for limits in places)


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


# The values in the key are mostly the very objects of the last decision, and a configuration keeps its hash. So finding
# an entry by value takes 0.25 us, of 0.6 us for a request, and would take no less by the id() of the configuration.
@lru_cache(maxsize=1024)
def _fixed_part(terms: Terms, expiration: Expiration) -> tuple[bytes, bytes | None]:
    """Return the packed rules, and the state of a new bucket, None where that depends on the time."""
    configuration, version, inheritance = terms
    wanted = 0 if version is None else 1 + inheritance.value
    rules = _PLAN.pack(_EXPIRATIONS[expiration.kind], expiration.duration_millis, wanted, version or 0)
    adaptive = any(bandwidth.adaptive_initial_tokens for bandwidth in configuration)
    return rules, None if adaptive else encode(terms.initial(0))
