"""What ``lua/decide.lua`` does, from the very arguments that it is sent."""

from __future__ import annotations

import struct
from dataclasses import replace
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
    GiveBack,
    Reserve,
    Reset,
    TryConsume,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.numbers import wrap
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.script_arguments import COUNTING, MUST_EXIST, STRICT
from ratelimit.stores.operations import Operation

_HEADER: Final = struct.Struct(">qBBBH")  # now, flags, expiration, has a version, number of operations
_TAIL: Final = struct.Struct(">qq")  # milliseconds of the expiration, version
_OPERATION: Final = struct.Struct(">BIqq")  # number, times, tokens, a further number

_EXPIRATIONS: Final = (Expiration.none(), None, None, Expiration.automatic())


class Decision(NamedTuple):
    """Whether the script decides, what it stores (None: nothing) for how long, and what it counts, if it is to."""

    done: bool
    after: bytes | None = None
    ttl_millis: int = 0
    consumed: int | None = None


def decide(before: bytes | None, arguments: tuple[bytes, ...]) -> Decision:
    request, *_ = arguments
    now, flags, kind, _, count = _HEADER.unpack_from(request)
    begin, end = _HEADER.size, _HEADER.size + count * _OPERATION.size
    duration, _ = _TAIL.unpack_from(request, end)
    if before is None and flags & MUST_EXIST:
        return Decision(done=False)
    state = codec.decode(before or request[end + _TAIL.size :])
    if before is None:
        state = _begun(state, now)
    commands: list[Command[Any]] = []
    for number, times, tokens, further in _OPERATION.iter_unpack(request[begin:end]):
        for _ in range(times):
            if number == Operation.RAISE:  # belongs to the one before it
                cancel = commands.pop()
                assert isinstance(cancel, Cancel)
                commands.append(replace(cancel, surplus=(*cancel.surplus, (tokens, further))))
            else:
                commands.append(_command(number, tokens, further))
    if flags & STRICT and before is not None and not _leaves_a_trace(state, now):
        return Decision(done=False)
    refilled = state.refilled(now)
    after, answers = Batch(tuple(commands)).decide(refilled, now)
    if flags & STRICT and any(answers) and not all(answers):
        return Decision(done=False)
    if after is None and before is None:
        after = refilled
    consumed = wrap((after or state).consumed_tokens - state.consumed_tokens) if flags & COUNTING else None
    if after is None:
        return Decision(True, consumed=consumed)
    return Decision(True, encode(after), _expiration(kind, duration).ttl_millis(after, now), consumed)


def _begun(state: BucketState, now: int) -> BucketState:
    pairs = zip(state.configuration, state.bandwidth_states, strict=True)
    begun = [
        one._replace(last_refill_time_nanos=now) if limit.first_refill_millis is None else one for limit, one in pairs
    ]
    return state._replace(bandwidth_states=tuple(begun))


def _leaves_a_trace(state: BucketState, now: int) -> bool:
    limit, level = state.configuration.bandwidths[0], state.bandwidth_states[0]
    return not limit.refill_intervally and level.last_refill_time_nanos < now


def _command(number: int, tokens: int, further: int) -> Command[Any]:
    match number:
        case Operation.TRY_CONSUME:
            return TryConsume(tokens)
        case Operation.CONSUME_AS_MUCH_AS_POSSIBLE:
            return ConsumeAsMuchAsPossible(tokens)
        case Operation.CONSUME_IGNORING_RATE_LIMITS:
            return ConsumeIgnoringRateLimits(tokens)
        case Operation.RESERVE:
            return Reserve(tokens, further)
        case Operation.GIVE_BACK:
            return GiveBack(tokens)
        case Operation.ADD:
            return AddTokens(tokens)
        case Operation.RESET:
            return Reset()
        case Operation.BOOK:
            return Book(tokens)
        case Operation.CANCEL:
            return Cancel(tokens, further)
    raise NotImplementedError(number)


def _expiration(kind: int, duration: int) -> Expiration:
    made = _EXPIRATIONS[kind]
    return Expiration("fixed" if kind == 1 else "after_refill", duration) if made is None else made
