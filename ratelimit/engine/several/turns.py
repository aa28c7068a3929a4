"""The queues of those that wait for tokens: of all that wait for one bucket, only the first asks for them.

A caller waits in one queue at most, that of the bucket that it has to wait for the longest. It holds nothing while it
waits. A caller that is interrupted leaves its place to the next one; where even that is cut short, the place ends with
the caller, and those behind it notice within a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final
from weakref import ref

from ratelimit.engine.face import Face
from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import Steps

# Seconds, after which a thread that waits looks whether the one before it is still there.
_LONGEST_SLEEP: Final = 0.05

_Where = tuple[Any, bytes]


class Turn:
    """The place of a caller in a queue.

    :ivar left: whether the caller has left it.
    """

    __slots__ = ("__weakref__", "key", "left", "waiting", "where")

    def __init__(self, key: bytes, where: _Where) -> None:
        self.key = key
        self.where = where
        self.waiting: Any = None
        self.left = False


class Turns:
    """The queues of a manager, by the stored key of the bucket that is waited for."""

    def __init__(self, face: Face) -> None:
        self._asynchronous = face.asynchronous
        self._queues: dict[_Where, list[ref[Turn]]] = {}
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._forget)

    def _forget(self) -> None:
        """Begin without queues in a forked process, where those that wait are missing."""
        self._queues.clear()

    def first_queue_of(self, keys: Iterable[bytes]) -> Turn | None:
        """Join the queue of the first of these keys that callers wait for already; None where there is none."""
        if self._queues:
            for key in keys:
                if self._where(key) in self._queues:
                    return self.join(key)
        return None

    def join(self, key: bytes) -> Turn:
        """Join the queue of a key, as the last."""
        where = self._where(key)
        turn = Turn(key, where)
        with self._lock:
            self._queues.setdefault(where, []).append(ref(turn))
        return turn

    def leave(self, turn: Turn) -> None:
        """Leave the queue, and wake the one that is the first then."""
        turn.left = True
        self._first(turn.where)

    def is_first(self, turn: Turn) -> bool:
        """Return whether a caller is the first of its queue."""
        return self._first(turn.where) is turn

    def wait(self, turn: Turn, seconds: float | None) -> Steps[bool]:
        """Wait to be the first of the queue; return False where that takes longer than ``seconds``."""
        deadline = None if seconds is None else monotonic() + seconds
        while not self.is_first(turn):
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return False
            if self._asynchronous:
                turn.waiting = asyncio.get_running_loop().create_future()
                # Between two steps no other task runs, so that nobody has left in between.
                yield asyncio.wait((turn.waiting,), timeout=left)
            else:
                turn.waiting = threads.event()
                if not self.is_first(turn):
                    turn.waiting.wait(_LONGEST_SLEEP if left is None else min(left, _LONGEST_SLEEP))
        return True

    def _where(self, key: bytes) -> _Where:
        return (asyncio.get_running_loop() if self._asynchronous else None), key

    def _first(self, where: _Where) -> Turn | None:
        """Return who is the first of a queue, and wake it; drop those that have left."""
        with self._lock:
            queue = self._queues.get(where, [])
            first = None
            while queue and (first is None or first.left):
                first = queue[0]()
                if first is None or first.left:
                    del queue[0]
                    first = None
            if not queue:
                self._queues.pop(where, None)
        if first is not None and (waiting := first.waiting) is not None:
            first.waiting = None
            if not self._asynchronous:
                waiting.set()
            elif not waiting.done():
                waiting.set_result(None)
        return first
