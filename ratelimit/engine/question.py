"""What is asked, as one value: every layer takes a question, and returns the steps to its answer.

A question never changes. A layer that asks something else of the layer below makes another one, with
:meth:`Question.asking`. What happens on the way is noted in its :class:`Course`, which belongs to one call of a verb.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from ratelimit.core.commands import Command, Terms
from ratelimit.core.expiration import Expiration
from ratelimit.errors import CorruptStateError, StoreError
from ratelimit.keys import Key
from ratelimit.runtime.steps import Steps


@dataclass(slots=True)
class Target:
    """Where a bucket is, and what this process knows of its making.

    :param key: the key as the caller gave it, which errors name.
    :param stored_key: the key as the store has it, with the prefix.
    :param expiration: when the store forgets the bucket.
    :param must_exist_once_made: whether a bucket that is missing after this handle has made it is an error.
    :ivar made: whether this handle has made the bucket, or replaced its configuration.
    """

    key: Key
    stored_key: bytes
    expiration: Expiration
    must_exist_once_made: bool = False
    made: bool = False


class Part(NamedTuple):
    """What is asked of one bucket.

    :param terms: the limits that the bucket is made with where it is missing, and that replace its own where its
        version is lower.
    """

    target: Target
    terms: Terms
    command: Command[Any]


class Course:
    """What has happened to a question so far.

    :ivar interruption: the cancellation that is held back, or the exception that has cut a wait short.
    :ivar round_trips: how often the store was asked.
    :ivar carried: whether another call's question carries the command.
    :ivar failure: the error of the store for which ``on_error`` was asked, whether it has answered or raised.
    :ivar degraded: whether ``on_error`` has given the answer, and not the store.
    :ivar charged: whether tokens of the answer were taken from a bucket, and can be given back.
    :ivar local_answer: the answer of a local bucket that has decided in place of the store.
    :ivar shield: a weak reference to the ``Shield`` that keeps the tokens of a wait in sync code; or None.
    """

    # The class holds the defaults, because each decision makes an object, and most of them set nothing but round_trips.
    interruption: BaseException | None = None
    round_trips: int = 0
    carried: bool = False
    failure: Exception | None = None
    degraded: bool = False
    charged: bool = True
    local_answer: Any = None
    shield: Any = None


class Question(NamedTuple):
    """What is asked of the store.

    :param parts: one for each bucket; as yet a question is about one bucket only.
    :param deadline: by when the answer must be there, in seconds of ``runtime.clock.monotonic``; None: as long as the
        store itself waits.
    :param holds: whether a cancellation has to wait until a request that is in flight has ended, so that its outcome is
        known; the cancellation is then found in the course.
    """

    parts: tuple[Part, ...]
    deadline: float | None
    holds: bool
    course: Course

    @classmethod
    def of(
        cls,
        target: Target,
        terms: Terms,
        command: Command[Any],
        deadline: float | None = None,
        *,
        holds: bool = False,
        course: Course | None = None,
    ) -> Question:
        """Return a question about one bucket."""
        return cls((Part(target, terms, command),), deadline, holds, Course() if course is None else course)

    def asking(self, command: Command[Any]) -> Question:
        """Return this question with another command: the bucket, the deadline and the course stay."""
        (part,) = self.parts
        return self._replace(parts=(part._replace(command=command),))


Layer: TypeAlias = Callable[[Question], Steps[Any]]
"""Takes a question, and returns the steps to its answer."""

new_tuple: Final = tuple.__new__
"""Makes a named tuple from its class and a tuple, faster than the class itself: for what every decision makes."""


@contextmanager
def errors_named(key: Key) -> Generator[None]:
    """Let errors from a store name the key as the caller gave it, and not as it is stored."""
    try:
        yield
    except (StoreError, CorruptStateError) as error:
        error.key = key
        raise
