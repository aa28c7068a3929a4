"""What a store that decides can do to a bucket."""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class Operation(IntEnum):
    """An operation on a bucket; its value is the number that stands for it in the arguments of the script that decides.

    This is the one list of operations. ``engine/script_arguments.py`` packs the numbers. ``stores/redis/scripts.py``
    makes constants and a table of functions of them when it loads the script, so that each operation needs a function
    of its name, in lower case, in ``lua/``.
    """

    TRY_CONSUME = 1
    CONSUME_AS_MUCH_AS_POSSIBLE = 2
    RESERVE = 3
    GIVE_BACK = 4
    ADD = 5
    FORCE_ADD = 6
    RESET = 7
    BOOK = 8
    HOLD_BACK = 9
    REPLACE = 10
    CANCEL = 11
    RAISE = 12
    CONSUME_IGNORING_RATE_LIMITS = 13
