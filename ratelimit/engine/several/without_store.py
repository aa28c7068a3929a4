"""What several buckets answer together where the store fails, by the ``on_error`` of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.core.commands import Settle
from ratelimit.core.several import consumption_of, looking, probe_in
from ratelimit.engine.fallback import degraded
from ratelimit.engine.on_error import RETRY_NANOS, OnError
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Course, Question
from ratelimit.errors import RateLimitError


def answers_without_store(
    proxies: Sequence[BucketProxy], question: Question, error: RateLimitError, courses: Sequence[Course]
) -> list[Any]:
    """Return an answer for each part of a question, or raise the error.

    A part that says DENY refuses for all. Otherwise a part that says RAISE raises the error; and else each part answers
    by itself: those that say ALLOW have their tokens, and local buckets are all charged, or none.

    :param courses: those of the parts, where it is noted whether each of them was charged.
    """
    parts = question.parts
    if not all(part.command.is_decision for part in parts):
        raise error
    chosen = [proxy.pipeline.fallback.chosen(proxy.manner.on_error, proxy.target.key, error) for proxy in proxies]
    in_doubt = bool(getattr(error, "in_doubt", False))
    for course, one in zip(courses, chosen, strict=True):
        course.degraded = True
        course.charged = one.kind == "local" and not in_doubt
    if OnError.DENY in chosen:
        answers = [
            part.command.answer_refused(RETRY_NANOS) if one == OnError.DENY else part.command.answer_without_limit()
            for part, one in zip(parts, chosen, strict=True)
        ]
    elif OnError.RAISE in chosen:
        raise error
    else:
        answers = _decided_locally(proxies, question, chosen, in_doubt=in_doubt)
    for proxy, one in zip(proxies, chosen, strict=True):
        proxy.pipeline.fallback.note_failure(proxy.target.key, one, error)
    return [degraded(answer) for answer in answers]


def settled_without_store(
    proxies: Sequence[BucketProxy], question: Question, error: RateLimitError, courses: Sequence[Course]
) -> list[Any]:
    """Return an answer for each part of a settlement, or raise the error.

    The error is raised where a part says RAISE, or says DENY and has used more than was reserved. Otherwise each part
    is settled in its local bucket, or stays as it is charged.
    """
    settlements: list[Settle] = [part.command.command for part in question.parts]  # type: ignore[attr-defined]  # each of them is verbose
    chosen = [proxy.pipeline.fallback.chosen(proxy.manner.on_error, proxy.target.key, error) for proxy in proxies]
    for one, settlement in zip(chosen, settlements, strict=True):
        if one == OnError.RAISE or (one == OnError.DENY and settlement.excess):
            raise error
    return [
        proxy.pipeline.fallback.answer(one, question._replace(parts=(part,), course=course), error)
        for proxy, part, one, course in zip(proxies, question.parts, chosen, courses, strict=True)
    ]


def _decided_locally(
    proxies: Sequence[BucketProxy], question: Question, chosen: Sequence[OnError], *, in_doubt: bool
) -> list[Any]:
    """Return the answers of local buckets, of which all are charged, or none."""

    def answers_to(commands: Sequence[Any]) -> list[Any]:
        answers = []
        for proxy, part, command, one in zip(proxies, question.parts, commands, chosen, strict=True):
            if one.kind == "local":
                asked = question._replace(parts=(part._replace(command=command),))
                answers.append(proxy.pipeline.local_buckets.decide(asked, one.share, in_doubt=in_doubt))
            else:
                answers.append(command.answer_without_limit())
        # Nobody waits for these answers under a shield.
        question.course.local_answer = None
        return answers

    commands: list[Any] = [part.command for part in question.parts]
    looked = answers_to([looking(command) for command in commands])
    consumptions = [consumption_of(command) for command in commands]
    if None in consumptions or not all(probe_in(answer).consumed for answer in looked):
        return looked
    answers = answers_to(commands)
    if not all(probe_in(answer).consumed for answer in answers):
        # Another thread has taken the tokens in between.
        for proxy, consumption, one, answer in zip(proxies, consumptions, chosen, answers, strict=True):
            if one.kind == "local" and probe_in(answer).consumed:
                proxy.pipeline.local_buckets.give_back(proxy.target, consumption.tokens)  # type: ignore[union-attr]  # it is there
    return answers
