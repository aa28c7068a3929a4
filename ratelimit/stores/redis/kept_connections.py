"""The connections that a store keeps between requests, although they belong to the pool of a client of redis-py.

To take a connection from redis-py's pool and to give it back costs as much as the request itself. Yet the pool does
what a connection needs: it connects, renews credentials, and finds the master again. So a connection is kept for a
second at most, and goes back at once where somebody waits for the pool and the pool is empty. What was used last is
used next, so that the connections that a smaller crowd does not need grow old.

The handler of a signal may raise between any two steps of a caller, also inside a ``finally``, and so may an exception
that another thread sets on the caller's thread. No connection is lost by that, because no step holds one:

- Only threads of the store's own ask the pool and give back to it
  (:func:`~ratelimit.stores.redis.deadlines.within`).
  An interruption inside redis-py's pool would lose a connection, or leave the pool's lock locked.
- ``_out`` has a lease for each connection that is not in the pool, whatever the caller does with it. A caller that has
  finished appends the lease to ``_ended``. A caller that is interrupted appends nothing, but drops its
  ``KeptConnection``; then the interpreter itself appends the lease. Either is a single step. The next thread that asks
  the pool gives back first what has ended.
- A connection is given back as it is where its caller has marked it as whole. Any other one is closed first, since
  somebody else would read the reply that is outstanding on it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import redis
from redis import exceptions

from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.connecting import CONNECTS_ONCE, limit_retries, shorten_timeouts
from ratelimit.stores.redis.deadlines import within
from ratelimit.stores.redis.errors import UnexpectedError, client_errors
from ratelimit.stores.redis.kept_connection import SHORTEST_TIMEOUT, KeptConnection, Lease

_MOST_CONNECTING: Final = 1_000  # threads
_LONGEST_RELEASE: Final = 0.05  # seconds


class KeptConnections:
    """The connections of one pool that are kept, in use, or on their way back.

    :param most: how many connections are kept at most.
    :param monotonic: the clock of deadlines, by which connections are kept; for tests.
    """

    def __init__(self, pool: Any, most: float, monotonic: Callable[[], float] = monotonic) -> None:
        self.pool = pool
        self.monotonic = monotonic
        self._most = most
        self._process_id = os.getpid()
        self._kept: list[KeptConnection] = []
        self._out: set[Lease] = set()
        self._ended: list[Lease] = []
        # Threads that ask the pool, also those whose callers have given up waiting for them.
        self._connecting = 0
        # How often this was closed.
        self._closed = 0
        # Only the store's own threads take the lock.
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self.forget)

    def take(self, now: float, deadline: float | None) -> KeptConnection:
        """Return a connection that is ready for a request."""
        try:
            kept = self._kept.pop()
        except IndexError:
            return self._from_pool(deadline)
        if kept.is_usable(now):
            return kept
        self._end(kept)
        self._end_old(now)
        return self._from_pool(deadline)

    def give_back(self, kept: KeptConnection, *, broken: bool = False) -> None:
        """Take a connection back after its request.

        :param broken: whether a reply may be outstanding on the connection.
        """
        if broken or len(self._kept) >= self._most:
            self._end(kept, whole=not broken)
            self._release()
            return
        kept.used_at = self.monotonic()
        self._kept.append(kept)
        # This thread looks for those that wait only now, since they look for kept connections last.
        if self._connecting and _is_exhausted(self.pool):
            self._end_all()
            threads.beside(self._release_ended)

    def clear(self) -> None:
        """Give everything that is kept back to the pool."""
        self._end_all()
        if self._ended:
            self._release()

    def close(self) -> None:
        """Give everything back to the pool, and close the connections that are still being made, once they are."""
        fork_safety.check()
        self._closed += 1
        self.clear()

    def __del__(self) -> None:
        try:
            # The weak reference by which forget is called after a fork may already be gone.
            if self._process_id == os.getpid():
                self.clear()
        except Exception:  # noqa: BLE001, S110  # modules may be gone when the interpreter ends
            pass

    def forget(self) -> None:
        """Forget the connections of the parent in a forked process; the pool notices the fork by itself."""
        self._process_id = os.getpid()
        self._kept, self._out, self._ended = [], set(), []
        self._connecting = 0

    def _end(self, kept: KeptConnection, *, whole: bool = True) -> None:
        """Let a connection go back as soon as the pool is asked or :meth:`_release` is called."""
        if whole:
            kept.restore()
            kept.lease.whole = True
        self._ended.append(kept.lease)

    def _end_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._end(self._kept.pop())

    def _end_old(self, now: float) -> None:
        """Let connections go that were kept for as long as allowed, and that nobody has used of late."""
        for kept in [kept for kept in self._kept if kept.is_old(now)]:
            # Another thread may just have taken it.
            with contextlib.suppress(ValueError):
                self._kept.remove(kept)
                self._end(kept)

    def _release(self) -> None:
        """Give back what has ended, and wait a moment for that: others may ask for it once the caller is answered."""
        threads.beside(self._release_ended, _LONGEST_RELEASE)

    def _from_pool(self, deadline: float | None) -> KeptConnection:
        if self._connecting >= _MOST_CONNECTING:
            raise exceptions.ConnectionError(f"No connection available, and {self._connecting} are waited for")
        try:
            work = partial(self._connect, deadline)
            late = partial(self._take_back, self._closed)
            kept: KeptConnection = within(deadline, work, late=late, at_end=self._connect_at_end)
        except TimeoutError as error:
            if isinstance(self.pool, redis.BlockingConnectionPool) and _is_exhausted(self.pool):
                raise exceptions.TimeoutError("No connection available") from error
            raise exceptions.TimeoutError("no connection by the deadline") from error
        return kept

    # All that follows runs in threads of the store's own, or in greenlets.

    def _connect(self, deadline: float | None) -> KeptConnection:
        with self._lock:
            self._connecting += 1
        once = CONNECTS_ONCE.set(True)
        try:
            with client_errors():
                limit_retries(self.pool)
                self._await_room(deadline)
                return self._leased(self._connected())
        finally:
            CONNECTS_ONCE.reset(once)
            with self._lock:
                self._connecting -= 1

    def _await_room(self, deadline: float | None) -> None:
        """Give the pool what it can have back; wait here where the pool's own wait would stop all greenlets."""
        while True:
            self._release_ended()
            if not _is_exhausted(self.pool):
                return
            # Perhaps the pool lacks what is kept here.
            self._end_all()
            self._release_ended()
            if not self._stops_greenlets():
                return
            if deadline is not None and self.monotonic() >= deadline:
                raise TimeoutError
            threads.pause()

    def _stops_greenlets(self) -> bool:
        """Return whether to ask the pool for a connection now would stop all greenlets."""
        return (
            isinstance(self.pool, redis.BlockingConnectionPool)
            and _is_exhausted(self.pool)
            and threads.block_greenlets()
        )

    def _connected(self) -> Any:
        try:
            return self.pool.get_connection()
        except exceptions.RedisError:
            raise
        except Exception:
            # The error broke off the handshake; perhaps a credential provider has raised it. redis-py has put the open
            # connection back into the pool, where it would be used without a password and in database 0.
            _disconnect_idle(self.pool)
            raise

    def _connect_at_end(self, deadline: float) -> KeptConnection:
        """Connect in this thread, with timeouts for each step, when the interpreter is about to end.

        The shortened timeouts stay, because the process ends.
        """
        shorten_timeouts(self.pool, max(deadline - self.monotonic(), SHORTEST_TIMEOUT))
        try:
            return self._connect(deadline)
        except UnexpectedError as error:
            # redis-py imports modules while it connects, which fails once the interpreter takes them apart.
            raise exceptions.ConnectionError("the interpreter is about to end") from error

    def _leased(self, connection: Any) -> KeptConnection:
        try:
            kept = KeptConnection(connection, self.monotonic)
        except BaseException:
            connection.disconnect()
            self.pool.release(connection)
            raise
        kept.lease = lease = Lease(kept, self._ended.append)
        lease.connection, lease.whole = connection, False
        self._out.add(lease)
        return kept

    def _take_back(self, closed: int, kept: KeptConnection) -> None:
        """Give a connection back that comes when its caller has given up waiting for it."""
        self._end(kept, whole=closed == self._closed)
        threads.beside(self._release_ended)

    def _release_ended(self) -> None:
        """Give back what has ended; a lease that was appended more than once is given back once."""
        with threads.taken(self._lock), client_errors():
            while self._ended:
                lease = self._ended.pop()
                if lease in self._out:
                    self._out.discard(lease)
                    try:
                        if not lease.whole:
                            lease.connection.disconnect()
                    finally:
                        self.pool.release(lease.connection)


def _disconnect_idle(pool: Any) -> None:
    """Close the connections of a pool that nobody uses."""
    if not isinstance(pool, redis.BlockingConnectionPool):
        pool.disconnect(inuse_connections=False)
        return
    # redis-py 5 and 6 can only close all connections of such a pool.
    for connection in list(pool.pool.queue):
        if connection is not None:
            connection.disconnect()


def _is_exhausted(pool: Any) -> bool:
    """Return whether a pool has nothing left to give, as far as can be seen.

    As long as the pool has something, nothing that is kept may go back to it for a caller that asks the pool. Otherwise
    other callers would have to ask the pool as well, and make still others ask, until nobody kept anything.
    """
    if isinstance(pool, redis.BlockingConnectionPool):
        # The method of the queue would take a lock that may be locked in a forked process until the pool notices.
        return not pool.pool.queue
    made, most = getattr(pool, "_created_connections", math.inf), getattr(pool, "max_connections", 0)
    return not getattr(pool, "_available_connections", ()) and bool(made >= most)
