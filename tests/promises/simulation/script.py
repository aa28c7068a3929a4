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
    GiveBack,
    Reserve,
    Reset,
    TryConsume,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.token_bucket import codec
from ratelimit.stores.operations import Operation

_HEADER: Final = struct.Struct(">BqBqq")  # expiration, its milliseconds, has a version, version, now
_OPERATION: Final = struct.Struct(">BIqq")  # number, times, tokens, a further number

_EXPIRATIONS: Final = (Expiration.none(), None, None, Expiration.automatic())


class Decision(NamedTuple):
    """Whether the script decides, and what it stores (None: nothing) for how long."""

    done: bool
    after: bytes | None = None
    ttl_millis: int = 0


def decide(before: bytes | None, arguments: tuple[bytes, ...]) -> Decision:
    template, request, *rest = arguments
    kind, duration, _, _, now = _HEADER.unpack_from(request)
    if before is None and rest == [b"1"]:
        return Decision(done=False)
    state = codec.decode(before or template)
    if before is None:
        pairs = zip(state.configuration, state.bandwidth_states, strict=True)
        begun = [
            one._replace(last_refill_time_nanos=now) if limit.first_refill_millis is None else one
            for limit, one in pairs
        ]
        state = state._replace(bandwidth_states=tuple(begun))
    commands: list[Command[Any]] = []
    for number, times, tokens, further in _OPERATION.iter_unpack(request[_HEADER.size :]):
        for _ in range(times):
            if number == Operation.RAISE:  # belongs to the one before it
                cancel = commands.pop()
                assert isinstance(cancel, Cancel)
                commands.append(replace(cancel, surplus=(*cancel.surplus, (tokens, further))))
            else:
                commands.append(_command(number, tokens, further))
    refilled = state.refilled(now)
    after, _ = Batch(tuple(commands)).decide(refilled, now)
    if after is None and before is None:
        after = refilled
    if after is None:
        return Decision(done=True)
    return Decision(True, encode(after), _expiration(kind, duration).ttl_millis(after, now))


def _command(number: int, tokens: int, further: int) -> Command[Any]:
    match number:
        case Operation.TRY_CONSUME:
            return TryConsume(tokens)
        case Operation.CONSUME_AS_MUCH_AS_POSSIBLE:
            return ConsumeAsMuchAsPossible(tokens)
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
