"""Commands as the arguments of ``lua/decide.lua``, which applies them where the bucket is stored.

The script makes the same transition as ``execute``, to the byte, and replies only with what was stored before: the
answers follow from that. It is given the time, the operations, and what depends on the plan and the expiration alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple

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
    Plan,
    ReplaceConfiguration,
    Reserve,
    Reset,
    Synchronize,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.core.token_bucket.state import BucketState

_TRY_CONSUME: Final = 1
_CONSUME_AS_MUCH_AS_POSSIBLE: Final = 2
_RESERVE: Final = 3
_GIVE_BACK: Final = 4
_ADD: Final = 5
_FORCE_ADD: Final = 6
_RESET: Final = 7
_BOOK: Final = 8
_HOLD_BACK: Final = 9
_REPLACE: Final = 10
_CANCEL: Final = 11
_RAISE: Final = 12
_CONSUME_IGNORING_RATE_LIMITS: Final = 13

_EXPIRATIONS: Final = {"none": 0, "fixed": 1, "after_refill": 2, "automatic": 3}

_OPERATION: Final = struct.Struct(">BIqq")  # verb, times, tokens, a further number
_NOW: Final = struct.Struct(">q")
_ONE_OPERATION: Final = struct.Struct(">qBIqq")
# The kind of expiration, its milliseconds, 0 or 1 + inheritance, and the version.
_PLAN: Final = struct.Struct(">BqBq")

_MAY_BE_MADE: Final = b"0"
_MUST_EXIST: Final = b"1"

# Verb, tokens, and what the verb needs besides; of a replacement what it puts there.
_Operation = tuple[int, int, int | BucketConfiguration]


class _UnknownCommandError(Exception):
    """The script does not know the command."""


def request(
    command: Command[Any], plan: Plan, expiration: Expiration, now: int, *, must_exist: bool
) -> tuple[bytes, ...] | None:
    """The arguments of the script for this command; None where it does not know the command.

    :param must_exist: a missing bucket is not made.
    """
    replacements: tuple[bytes, ...] = ()
    try:
        if (type(command) is TryConsume or type(command) is TryConsumeAndReturnRemaining) and command.tokens >= 0:
            operations = _ONE_OPERATION.pack(now, _TRY_CONSUME, 1, command.tokens, 0)
        else:
            packed, replacements = _packed(command, now)
            operations = _NOW.pack(now) + packed
        rules, template = _fixed_part(plan, expiration)
        if template is None:
            template = codec.encode(BucketState.initial(plan.configuration, plan.version, now))
    except (_UnknownCommandError, struct.error):  # struct.error: a number of more than 64 bits
        return None
    if must_exist or replacements:
        return template, rules + operations, _MUST_EXIST if must_exist else _MAY_BE_MADE, *replacements
    return template, rules + operations


def _packed(command: Command[Any], now: int) -> tuple[bytes, tuple[bytes, ...]]:
    """Pack the operations of a command, equal neighbours as one with a count; and the states that replace others."""
    places: dict[BucketConfiguration, int] = {}
    packed = []
    for (verb, tokens, further), equal in groupby(_operations(command)):
        last = places.setdefault(further, len(places)) if isinstance(further, BucketConfiguration) else further
        packed.append(_OPERATION.pack(verb, sum(1 for _ in equal), tokens, last))
    return b"".join(packed), tuple(codec.encode(BucketState.initial(limits, None, now)) for limits in places)


def _operations(command: Command[Any]) -> Iterator[_Operation]:
    """One after another, as the parts of a batch are run; those that only read leave no trace."""
    # By exact type, as below: of a subclass nobody knows what it does.
    if type(command) is Batch:
        for part in command.commands:
            yield from _operations(part)
    elif type(command) is Verbose:
        yield from _operations(command.command)
    elif type(command) is Synchronize and command.booking:
        if command.tokens:
            yield _BOOK, _at_least_0(command.tokens), 0
        yield from _operations(command.command)
    elif type(command) is Cancel:
        yield _CANCEL, _at_least_0(command.tokens), command.noted
        for tokens, unfinished in command.surplus:
            yield _RAISE, tokens, unfinished
    elif not command.only_reads:
        yield _operation(command)


def _operation(command: Command[Any]) -> _Operation:
    if type(command) is Reset:
        return _RESET, 0, 0
    if type(command) is ConsumeAsMuchAsPossible:
        return _CONSUME_AS_MUCH_AS_POSSIBLE, _at_least_0(command.limit), 0
    if type(command) is Reserve:
        return _RESERVE, _at_least_0(command.tokens), command.longest_wait_nanos
    if type(command) is HoldBack:
        return _HOLD_BACK, _at_least_0(command.nanos), 0
    if type(command) is ReplaceConfiguration:
        return _REPLACE, command.inheritance.value, command.configuration
    verb = _VERBS.get(type(command))
    if verb is None:
        raise _UnknownCommandError
    return verb, _at_least_0(command.tokens), 0  # type: ignore[attr-defined]  # all of _VERBS have them


_VERBS: Final[dict[type[Command[Any]], int]] = {
    TryConsume: _TRY_CONSUME,
    TryConsumeAndReturnRemaining: _TRY_CONSUME,
    ConsumeIgnoringRateLimits: _CONSUME_IGNORING_RATE_LIMITS,
    GiveBack: _GIVE_BACK,
    AddTokens: _ADD,
    ForceAddTokens: _FORCE_ADD,
    Book: _BOOK,
}


def _at_least_0(tokens: int) -> int:
    if tokens < 0:  # no bucket asks for it
        raise _UnknownCommandError
    return tokens


class _Fixed(NamedTuple):
    configuration: BucketConfiguration  # kept, so that its id stays its own
    rules: bytes
    template: bytes | None  # of a new bucket; None: it depends on the time


_FIXED_LIMIT: Final = 1024
_fixed: Final[dict[tuple[int, int | None, int, str, int], _Fixed]] = {}


def _fixed_part(plan: Plan, expiration: Expiration) -> tuple[bytes, bytes | None]:
    """What does not depend on the time: by identity, as the hash of a configuration takes longer than all the rest."""
    configuration, version, inheritance = plan
    key = (id(configuration), version, id(inheritance), expiration.kind, expiration.duration_millis)
    found = _fixed.get(key)
    if found is None:
        wanted = 0 if version is None else 1 + inheritance.value
        rules = _PLAN.pack(_EXPIRATIONS[expiration.kind], expiration.duration_millis, wanted, version or 0)
        adaptive = any(bandwidth.adaptive_initial_tokens for bandwidth in configuration)
        template = None if adaptive else codec.encode(BucketState.initial(configuration, version, 0))
        if len(_fixed) >= _FIXED_LIMIT:
            _fixed.clear()
        found = _fixed[key] = _Fixed(configuration, rules, template)
    return found.rules, found.template
