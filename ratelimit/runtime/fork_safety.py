"""What a forked process must not take over from its parent, whose other threads do not live on in it.

A lock that another thread held at that moment would never be released there, what another thread had begun would never
end, and a connection that both processes use would give each of them replies to requests of the other one. All that is
dropped before anything else happens in the child: by a hook of the interpreter after ``os.fork``, and by :func:`check`
after a fork that the interpreter did not notice, such as that of uWSGI, which is made in C.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

chance: Final = random.SystemRandom()
"""Draws numbers that differ in each process. After a fork in C, any other generator would repeat the parent's."""

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_calls: set[weakref.WeakMethod[Callable[[], None]]] = set()
_left: list[object] = []
_turns: dict[int, threading.Lock] = {}
"""By process id: the lock under which one thread of that process clears up. A new process finds none that is locked."""

_MADV_WIPEONFORK = 18
"""Asks Linux to show zeros to a forked process in a page of memory. The ``mmap`` module does not name this advice."""


class _PageByProcessId:
    """A page whose only byte is 1 in the process that has set it, and 0 in those forked from it."""

    def __init__(self) -> None:
        self[0] = 1

    def __getitem__(self, _: int) -> int:
        return self._process_id == os.getpid()

    def __setitem__(self, _: int, __: int) -> None:
        self._process_id = os.getpid()


def _wiped_on_fork() -> Any:
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError, ValueError):
        # This is another system, or a Linux before 4.14.
        return _PageByProcessId()
    page[0] = 1
    return page


# Reading a byte takes a tenth of the time of os.getpid, which is a system call.
_page: Any = _wiped_on_fork()


def check() -> None:
    """Clear up in a process that was forked unnoticed. Call this before taking any lock or connection.

    In such a process this takes no lock that can be locked already; in all others it takes next to no time.
    """
    if not _page[0]:
        with _turns.setdefault(os.getpid(), threading.Lock()):
            if not _page[0]:
                _after_fork()


def lock() -> threading.Lock:
    """Return a lock that nobody holds in a process that has just been forked."""
    made = threading.Lock()
    _locks.add(made)
    return made


def call_in_child(method: Callable[[], None]) -> None:
    """Call a method of an object, if that is still there, in each process that is forked."""
    _calls.add(weakref.WeakMethod(method, _calls.discard))


def leave(*parents: object) -> None:
    """Keep objects of the parent alive in a forked process, because closing them would disturb the parent."""
    _left.extend(parents)


def _after_fork() -> None:
    for each in list(_locks):
        each._at_fork_reinit()  # noqa: SLF001  # as the standard library does with its own
    for reference in list(_calls):
        if (method := reference()) is not None:
            method()
    # This comes last, so that the next check clears up again if a signal handler has raised an exception before.
    _page[0] = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
