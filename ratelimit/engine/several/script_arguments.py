"""Turn calls into the arguments of ``lua/decide_all.lua``, which decides them where the buckets are stored.

The script makes the same transition as ``execute_all``, to the byte, and replies with what was stored before: the
answers follow from that.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ratelimit.core.commands import Command, ConsumeIgnoringRateLimits, Settle, TryConsumeAndReturnRemaining, Verbose
from ratelimit.engine.script_arguments import MUST_EXIST, form_of
from ratelimit.engine.several.attempt import Held
from ratelimit.engine.several.parts import Call
from ratelimit.stores.operations import Operation

MOST_BUCKETS: Final = 64
"""Buckets that one request may be about, counted by their bandwidths: a server is busy with them for less than a
millisecond."""

_COUNT: Final = struct.Struct(">B")
# The number of the operation, the place of a key among the keys, 1 for the first, and the tokens.
_OPERATION: Final = struct.Struct(">BBq")


def request_for(calls: Sequence[Call], held: Mapping[bytes, Held], now: int) -> tuple[bytes, ...] | None:
    """Return the arguments of the script for these calls; None where the script does not know them.

    :param held: what is known of each bucket, in the order of the keys.
    """
    places = {key: place for place, key in enumerate(held, start=1)}
    rules: dict[bytes, bytes] = {}
    operations = []
    for call in calls:
        operations.append(_COUNT.pack(len(call)))
        for target, terms, command in call:
            key = target.stored_key
            operation = _operation(command)
            if operation is None:
                return None
            number, tokens = operation
            operations.append(_OPERATION.pack(number, places[key], tokens))
            if key not in rules:
                form = form_of(terms, target.expiration)
                flags = MUST_EXIST if held[key].must_exist else 0
                request = None if form is None else form.request_to_consume(1, 1, terms, now, flags)
                if request is None:
                    return None
                (rules[key],) = request
    return *(rules[key] for key in held), b"".join(operations)


def _operation(command: Command[Any]) -> tuple[int, int] | None:
    """Return the number of an operation and its tokens; None where the script does not know the command."""
    if type(command) is TryConsumeAndReturnRemaining:
        return Operation.TRY_CONSUME, command.tokens
    if type(command) is Verbose:
        return _operation(command.command)
    if type(command) is not Settle:
        return None
    correction = command.correction
    if type(correction) is ConsumeIgnoringRateLimits:
        return Operation.CONSUME_IGNORING_RATE_LIMITS, correction.tokens
    return Operation.GIVE_BACK, correction.tokens
