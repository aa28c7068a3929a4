"""How questions about several buckets are answered: all of them are charged at one time, or none.

- ``buckets`` is what an ``all_of`` asks; it looks up terms, reports to listeners and answers as ``on_error`` says;
- ``coalescing`` lets one question at a time through for each place, and carries those that arrive meanwhile together;
- ``deciding`` asks the store: the loop that swaps under several keys, with the rules of ``engine.swapping``;
- ``in_process`` takes the place of these two over a store in this process;
- ``one_by_one`` takes the tokens of one bucket after the other, where the store cannot change them together;
- ``reserving`` takes the tokens of reservations, and settles them;
- ``turns`` is the queue of those that wait for tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ratelimit.engine.question import Question
from ratelimit.engine.several.coalescing import TasksTogether, ThreadsTogether
from ratelimit.engine.several.deciding import Deciding
from ratelimit.engine.several.in_process import InProcessTogether
from ratelimit.engine.several.turns import Turns
from ratelimit.engine.store_requests import now_of
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import AtomicUpdatingStore


class Several:
    """What decides about several buckets, for all questions whose last bucket belongs to one pipeline.

    :ivar decide: takes the place and the question, and returns the steps to an answer for each part; None where the
        store cannot change several keys together.
    :ivar coalescing: lets one question at a time through for each place; None where questions do not go together.
    :ivar turns: the queues of those that wait for tokens.
    """

    def __init__(self, pipeline: Any) -> None:
        self.turns = Turns(pipeline.face)
        self.coalescing: ThreadsTogether | TasksTogether | None = None
        self.decide: Callable[[bytes, Question], Steps[list[Any]]] | None = None
        if isinstance(pipeline.store, AtomicUpdatingStore):
            now = None if pipeline.clock is None else now_of(pipeline.clock)
            self.decide = InProcessTogether(pipeline.store, now).decide
        elif pipeline.requests.swap_all is not None:
            deciding = Deciding(pipeline.requests)
            if not pipeline.coalesces:
                self.decide = deciding.decide
            else:
                kind = TasksTogether if pipeline.face.asynchronous else ThreadsTogether
                self.coalescing = kind(deciding, pipeline.monotonic)
                self.decide = self.coalescing.decide_at
