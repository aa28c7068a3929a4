"""What a question about several buckets knows of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ratelimit.core.commands import Terms, terms_of
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.limits import configuration_of
from ratelimit.engine.on_error import ErrorPolicy
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.question import Course, Part
from ratelimit.keys import Key
from ratelimit.runtime.steps import Steps


class Manner(NamedTuple):
    """How a bucket answers questions, for what asks it together with others.

    :param on_error: what it answers where the store fails.
    :param optimization: what may be decided without the store; None: nothing.
    :param find_terms: finds the terms of its key, or None for a key that is not limited; None: the bucket has its own.
    """

    on_error: ErrorPolicy
    optimization: Optimization | None
    find_terms: Callable[[Key], Steps[Terms | None]] | None


class Courses(NamedTuple):
    """What happens to a question about several buckets on the way to its answer.

    :param whole: what has happened to the question.
    :param parts: for each bucket, whether it was charged, and whether ``on_error`` has answered for it.
    :param holds: whether an interruption of sync code has to wait until a request that is in flight has ended.
    """

    whole: Course
    parts: Sequence[Course]
    holds: bool

    @classmethod
    def of(cls, buckets: int, *, holds: bool = False) -> Courses:
        """Return the courses of a question about so many buckets."""
        return cls(Course(), [Course() for _ in range(buckets)], holds)


def terms_of_key(
    limits: Callable[[Any], Any], version: int | None, inheritance: TokensInheritance, key: Key
) -> Steps[Terms | None]:
    """Return the steps that ask a callable for the limits of a key; None where the key is not limited."""
    found = yield limits(key)
    return None if found is None else terms_of(configuration_of(found), version, inheritance)


def hash_tag(key: bytes) -> bytes | None:
    """Return what decides the slot of a key in a cluster, where that is a part of the key in braces."""
    begin = key.find(b"{") + 1
    end = key.find(b"}", begin) if begin else -1
    return key[begin:end] if end > begin else None


def place_of(keys: Sequence[bytes]) -> bytes:
    """Return where questions about these keys meet others: the hash tag that all of them share, or else the last key.

    The place says only which questions go together. Whichever do, the store decides.
    """
    tag = hash_tag(keys[-1])
    if tag is None or any(hash_tag(key) != tag for key in keys):
        return keys[-1]
    return b"{%b}" % tag


Call = tuple[Part, ...]
"""What one caller asks of several buckets, all or none."""
