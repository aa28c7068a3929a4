"""What is asked, as one value: every layer takes a question, and gives the steps to its answer.

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

    :param key: as the caller gave it, for errors.
    :param stored_key: as the store has it.
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

    :param terms: what the bucket is made from where it is missing, and replaced by where its version is lower.
    """

    target: Target
    terms: Terms
    command: Command[Any]


class Course:
    """What has happened to a question so far.

    :ivar interruption: the cancellation that is held back, or the exception that has cut a wait short.
    :ivar round_trips: how often the store was asked.
    :ivar carried: whether another call's question carries the command.
    :ivar failure: the error of the store in whose place ``on_error`` has given the answer, or has raised.
    :ivar degraded: whether the answer is that of ``on_error``.
    :ivar charged: whether tokens of the answer were taken from a bucket, and can be given back.
    :ivar local_answer: the answer of a local bucket that has decided in place of the store.
    :ivar shield: refers to the ``Shield`` that keeps the tokens of a wait in sync code; None: there is none.
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

    :param parts: one for each bucket.
    :param deadline: by when the answer must be there, in seconds of ``runtime.clock.monotonic``; None: as long as the
        store itself waits.
    :param holds: whether cancellation is held back: a request that is in flight is seen through, so that its outcome is
        known, and the cancellation is left in the course.
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
        """Return the question whether another command can be carried out on the same bucket, on the same course."""
        (part,) = self.parts
        return self._replace(parts=(part._replace(command=command),))


Layer: TypeAlias = Callable[[Question], Steps[Any]]
"""Gives the steps to the answer of a question."""

new_tuple: Final = tuple.__new__
"""Makes a named tuple without the Python function that would only name its fields: for what every decision makes."""


@contextmanager
def errors_named(key: Key) -> Generator[None]:
    """Let errors from a store name the key as the caller gave it, and not as it is stored."""
    try:
        yield
    except (StoreError, CorruptStateError) as error:
        error.key = key
        raise
