"""Turn calls into the arguments of ``lua/decide_all.lua``, which decides them where the buckets are stored.

The script makes the same transition as ``execute_all``, to the byte, and replies with what was stored before: the
answers follow from that.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from ratelimit.core.several import consumption_of
from ratelimit.engine.script_arguments import MUST_EXIST, form_of
from ratelimit.engine.several.attempt import Held
from ratelimit.engine.several.parts import Call

MOST_BUCKETS: Final = 64
"""Buckets that one request may be about, counted by their bandwidths: a server is busy with them for less than a
millisecond."""

_COUNT: Final = struct.Struct(">B")
# The place of a key among the keys, 1 for the first, and the tokens.
_CONSUMPTION: Final = struct.Struct(">Bq")


def request_for(calls: Sequence[Call], held: Mapping[bytes, Held], now: int) -> tuple[bytes, ...] | None:
    """Return the arguments of the script for these calls; None where the script does not know them.

    :param held: what is known of each bucket, in the order of the keys.
    """
    places = {key: place for place, key in enumerate(held, start=1)}
    rules: dict[bytes, bytes] = {}
    consumptions = []
    for call in calls:
        consumptions.append(_COUNT.pack(len(call)))
        for target, terms, command in call:
            key = target.stored_key
            consumption = consumption_of(command)
            if consumption is None:
                return None
            consumptions.append(_CONSUMPTION.pack(places[key], consumption.tokens))
            if key not in rules:
                form = form_of(terms, target.expiration)
                flags = MUST_EXIST if held[key].must_exist else 0
                request = None if form is None else form.request_to_consume(consumption.tokens, 1, terms, now, flags)
                if request is None:
                    return None
                (rules[key],) = request
    return *(rules[key] for key in held), b"".join(consumptions)
