"""Take the tokens of one bucket after the other, and give them back where a later one refuses.

This is for buckets that cannot be changed together, as those of a cluster whose keys have different slots. Each bucket
is asked as it is by itself, with all of its layers: its own ``on_error``, listener, optimization and coalescing.

No bucket ever admits beyond its own limits, as each request is an ordinary consumption. A caller that is admitted has
been charged in all buckets; one that is refused in none, once the tokens are back. Until then others may be refused for
want of tokens that are given back later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ratelimit.core.commands import Command, GiveBack, Verbose
from ratelimit.core.results import VerboseResult
from ratelimit.core.several import consumption_of, looking, probe_in
from ratelimit.engine.cancellation import uninterrupted
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Course, Question
from ratelimit.engine.reserving import probe_of
from ratelimit.engine.several.parts import Courses
from ratelimit.errors import RateLimitError
from ratelimit.runtime.steps import Steps

_logger = logging.getLogger("ratelimit")


class OneByOne:
    """Asks buckets in their order."""

    def __init__(self, shares: Sequence[tuple[BucketProxy, int]]) -> None:
        self._shares = shares

    def answers(self, commands: Sequence[Command[Any]], deadline: float, courses: Courses) -> Steps[list[Any]]:
        """Return an answer for each bucket; where one of them has refused, all that were charged have been undone."""
        course = courses.whole
        answers: list[Any] = []
        taken: list[tuple[int, Course]] = []
        refused = False
        try:
            for number, wanted in enumerate(commands):
                own, command = courses.parts[number], looking(wanted) if refused else wanted
                try:
                    answer = yield from self._asked(number, command, deadline, own)
                finally:
                    course.round_trips += own.round_trips
                answers.append(answer)
                if consumption_of(command) is None:
                    continue
                if probe_in(answer).consumed:
                    taken.append((number, own))
                    continue
                refused = True
                while taken:
                    back, its_course = taken.pop()
                    after = yield from uninterrupted(self._undone(back, its_course), course)
                    if after is not None:
                        answers[back] = _with_its_tokens(answers[back], after)
        except BaseException as error:
            # A generator that is being closed must not yield.
            if not isinstance(error, GeneratorExit):
                for back, its_course in reversed(taken):
                    yield from uninterrupted(self._undone(back, its_course), course)
            raise
        if course.interruption is not None:
            raise course.interruption
        return answers

    def _asked(self, number: int, command: Command[Any], deadline: float, course: Course) -> Steps[Any]:
        proxy, _ = self._shares[number]
        question = Question.of(proxy.target, proxy.terms, command, deadline, course=course)  # type: ignore[arg-type]  # a layer looks the terms up
        return proxy.layer(question)

    def _undone(self, number: int, course: Course) -> Steps[VerboseResult[None] | None]:
        """Give back what a bucket was charged, within a time of its own: the deadline may have passed.

        Return the bucket after that; None where the store has given back nothing.
        """
        proxy, tokens = self._shares[number]
        if not course.charged:
            return None
        if course.degraded:
            proxy.pipeline.local_buckets.give_back(proxy.target, tokens)
            return None
        try:
            deadline = proxy.pipeline.own_deadline(proxy.timeout)
            after: VerboseResult[None] = yield from self._asked(number, Verbose(GiveBack(tokens)), deadline, Course())
        except RateLimitError as error:
            _logger.warning("%d tokens of a call that was refused could not be given back: %s", tokens, error)
            return None
        return None if after.degraded else after


def _with_its_tokens(answer: Any, after: VerboseResult[None]) -> Any:
    """Return the answer of a bucket that has been given back what it was charged, and has its tokens."""
    probe = probe_of(after, 0, consumed=True)
    return replace(after, value=probe) if isinstance(answer, VerboseResult) else probe  # type: ignore[arg-type]  # its value is the probe now
