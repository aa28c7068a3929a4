"""What a forked process must not take over from the threads of its parent, of which only one lives on in it.

A lock that another thread held at that moment would stay locked for ever there, and what another thread had begun would
never end.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_calls: set[weakref.WeakMethod[Callable[[], None]]] = set()


def lock() -> threading.Lock:
    """A lock that nobody holds in a process that has just been forked."""
    made = threading.Lock()
    _locks.add(made)
    return made


def call_in_child(method: Callable[[], None]) -> None:
    """Call a method of an object, if that is still there, in each process that is forked."""
    _calls.add(weakref.WeakMethod(method, _calls.discard))


def _after_fork() -> None:
    for each in list(_locks):
        each._at_fork_reinit()  # noqa: SLF001  # as the standard library does with its own
    for reference in list(_calls):
        if (method := reference()) is not None:
            method()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
