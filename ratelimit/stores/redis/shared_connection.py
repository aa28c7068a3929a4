"""One connection to a server, which all tasks of an event loop share.

The commands of one turn of the loop leave in one write, and replies come back in the order of the commands. redis-py
connects, with all that belongs to it (TLS, authentication, RESP3, database, Sentinel). Once it has connected, its
transport is taken over, and so is its parser, which may already hold the beginning of the next reply.

Nothing is ever sent twice. A connection on which anything goes wrong is given up, and a new one takes its place when
the next command comes.

From the outside to the inside: :class:`SharedConnection` is what a channel uses. It has a :class:`_Link` for each event
loop, which is one connection from its beginning to its end. A link has a :class:`_Waiter` for each caller whose replies
have not come yet. :class:`_Receiver` and :class:`_Turns` are the two ways in which bytes reach a link.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import weakref
from asyncio import AbstractEventLoop, Future, StreamWriter
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

from redis import exceptions
from redis._parsers import _AsyncHiredisParser
from redis._parsers.hiredis import NOT_ENOUGH_DATA

from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.channel import (
    Command,
    PushNotification,
    Replies,
    check_time_left,
    is_outdated,
    pack,
    pack_one,
)
from ratelimit.stores.redis.circuit import Circuit
from ratelimit.stores.redis.connecting import CONNECTS_ONCE
from ratelimit.stores.redis.errors import translated

# Makes a named tuple without the function that would only name its fields.
_new = tuple.__new__

_CLOSED: Final = "the server closed the connection"
_CLOSED_HERE: Final = "the store was closed"

_LONGEST_FAILURE: Final = 1.0  # seconds
_SHORTEST_SILENCE: Final = 0.1  # seconds

MakeConnection = Callable[[], Any]
"""Returns a connection of ``redis.asyncio`` that is not connected yet, and that nobody else uses."""


class SharedConnection:
    """Sends commands to one server, over one connection for each event loop in which it is used.

    A command may take as long as the ``socket_timeout`` of the connection, from the moment it is handed in. Where it
    has to wait for the connection first, it may wait for the ``socket_connect_timeout`` as well, and its time begins
    once there is a connection.

    :param longest_connecting: seconds that connecting may take where the client has no timeouts for its steps.
    """

    def __init__(
        self, make_connection: MakeConnection, circuit: Circuit | None = None, *, longest_connecting: float = 10.0
    ) -> None:
        self._make_connection = make_connection
        self._longest_connecting = longest_connecting
        self.circuit = Circuit(None) if circuit is None else circuit
        self._links: dict[AbstractEventLoop, _Link] = {}
        self._process_id = os.getpid()
        fork_safety.call_in_child(self._forget)

    def _forget(self) -> None:
        """Make other connections in a forked process, also in a loop that the parent has made.

        A connection of the parent is left as it is, because closing it would remove it from the parent's loop.
        """
        self._process_id = os.getpid()
        fork_safety.leave(self._links)
        self._links = {}

    def __del__(self) -> None:
        """Let each connection end in its own loop, which would keep it until a timeout has passed."""
        try:
            if self._process_id != os.getpid():
                # This process was forked unnoticed, and the connections are its parent's.
                fork_safety.leave(self._links)
                return
            for link in self._links.values():
                # Where the loop is closed, so is the connection.
                with contextlib.suppress(RuntimeError):
                    link.loop.call_soon_threadsafe(link.retire)
        except Exception:  # noqa: BLE001, S110  # modules may be gone when the interpreter ends
            pass

    def send(
        self, key: bytes, commands: Sequence[Command], deadline: float | None = None, *, admitted: bool = False
    ) -> Future[Replies]:
        """Send commands one right after the other; to be awaited for their replies.

        :param key: the bucket that errors name.
        :param deadline: on the clock of ``time.monotonic``; it counts where it comes before the connection's timeouts.
        :param admitted: whether the circuit has let the commands through already.
        """
        now = check_time_left(key, deadline)
        if self.circuit.is_open and not admitted:
            self.circuit.admit(key, deadline)
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None or not link.usable:
            link = self._links[loop] = _Link(loop, self._made(key), link, self.circuit, self._longest_connecting)
            for known in list(self._links):
                if known.is_closed() and (left := self._links.pop(known, None)) is not None:
                    left.leave_closed_loop()
        return link.send(key, commands, math.inf if deadline is None else deadline, now)

    def post(self, key: bytes, command: Command, waiter: _Waits, deadline: float | None = None) -> bool:
        """Send a command, whose reply goes to a waiter of the caller's own, as it would to a future.

        :returns: False where the command cannot leave in this turn of the loop; it was not sent then.
        """
        link = self._links.get(asyncio.get_running_loop())
        if link is None or not link.usable or link.transport is None or self.circuit.is_open:
            return False
        now = monotonic()
        if deadline is None:
            deadline = math.inf
        elif now >= deadline:
            check_time_left(key, deadline)
        link.post(pack_one(command), _new(_Waiter, (waiter, key, 1, now, deadline)))
        return True

    def _made(self, key: bytes) -> Any:
        try:
            return self._make_connection()
        except Exception as error:
            raise translated(error, key, in_doubt=False) from error

    def retire(self) -> None:
        """Close each connection once all callers that wait for a reply have got it."""
        links, self._links = self._links, {}
        for last in links.values():
            for link in (*last.retired, last):
                link.retire()

    def close(self) -> None:
        """Close the connections, with an error for callers that wait for a reply; a later command connects again."""
        fork_safety.check()
        links, self._links = self._links, {}
        for last in links.values():
            for link in (*last.retired, last):
                link.close()


class _Waits(Protocol):
    """The part of a future that a link needs."""

    def done(self) -> bool: ...
    def set_result(self, result: Replies, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class _Waiter(NamedTuple):
    """A caller that waits for replies.

    :ivar since: when its time began: once there was a connection, where it had to wait for that.
    :ivar deadline: the caller's own; infinite where it has none.
    """

    future: _Waits
    key: bytes
    replies: int
    since: float
    deadline: float


class _Transport(Protocol):
    """The part of ``asyncio.WriteTransport`` that also connections without streams can offer."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...


class _Link:
    """One connection from its beginning to its end.

    A waiter stays in its place until its replies have come, also when nobody waits for them any more.

    A deadline that passes fails that waiter alone, and connecting goes on even without waiters. The link is retired
    where nothing at all was heard for as long as the timeout of the connection, or where nobody was answered in time
    for a second: it gets no more commands, and ends when the last waiter is done.

    All times are on the clock of ``time.monotonic``. The clock of the event loop is the same one or moves along with
    it, except in tests that freeze the loop's.

    :param before: the link whose place this one takes.
    :ivar transport: carries the commands; None until there is a connection.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        connection: Any,
        before: _Link | None,
        circuit: Circuit,
        longest_connecting: float,
    ) -> None:
        self.usable = True
        self.ended = False
        self._closed_here = False
        self.retired: list[_Link] = (
            [] if before is None else [link for link in (*before.retired, before) if not link.ended]
        )
        self.loop = loop
        self._circuit = circuit
        self._timeout: float = connection.socket_timeout or math.inf
        # How long a waiter that comes now may wait.
        self._patience = self._timeout + (connection.socket_connect_timeout or self._timeout)
        self._waiters: deque[_Waiter] = deque()
        # The commands of the last waiters, one entry for each of these.
        self._unsent: list[bytes] = []
        # The replies to the first waiter that have come so far, and among them an error that redis-py treats as an
        # error of the connection.
        self._replies: Replies = []
        self._refusal: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        # When the timer goes off, when the server was last heard, and since when nobody was answered in time.
        self._due = math.inf
        self._heard = monotonic()
        self._fails_since = math.inf
        self.transport: _Transport | None = None
        self._parser: Any = None
        self._end_of_loop: AsyncGenerator[None, None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        # An eager task may end before it is assigned, and looks at the attribute.
        self._connecting = loop.create_task(self._connect(connection, longest_connecting))

    def leave_closed_loop(self) -> None:
        """Break off connecting in a loop that was closed, beginning with the outermost coroutine.

        The garbage collector would begin anywhere, and print what redis-py raises outside of a loop.
        """
        task = self._connecting
        if task is not None and not task.done():
            # asyncio.gather does this as well.
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
            with contextlib.suppress(RuntimeError):
                cast("Coroutine[Any, Any, None]", task.get_coro()).close()

    def send(self, key: bytes, commands: Sequence[Command], deadline: float, now: float) -> Future[Replies]:
        future: Future[Replies] = self.loop.create_future()
        self.post(pack(commands), _new(_Waiter, (future, key, len(commands), now, deadline)))
        return future

    def post(self, packed: bytes, waiter: _Waiter) -> None:
        if not self._unsent and self.transport is not None:
            self.loop.call_soon(self._flush)
        self._unsent.append(packed)
        self._waiters.append(waiter)
        _, _, _, now, deadline = waiter
        due = min(now + self._patience, deadline)
        if now >= self._due and self._timer is not None and self._timer.when() > self.loop.time():
            # A test has frozen the loop's clock, by which the timer is not due. A timer that is merely late goes off by
            # itself, after the loop has read the replies that have come meanwhile.
            self._watch(math.inf, now)
            self._on_deadline()
        elif due < self._due:
            self._watch(due, now)

    def _watch(self, due: float, now: float) -> None:
        """Set the timer to look after the waiters at that time."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = None if due == math.inf else self.loop.call_later(due - now, self._on_deadline)

    def _flush(self) -> None:
        if self.transport is not None and self._unsent:
            packed, self._unsent = b"".join(self._unsent), []
            self.transport.write(packed)

    async def _connect(self, connection: Any, longest_connecting: float) -> None:
        # The setting is visible in this task only.
        CONNECTS_ONCE.set(True)
        is_bounded = connection.socket_timeout and connection.socket_connect_timeout
        try:
            async with asyncio.timeout(None if is_bounded else longest_connecting):
                await connection.connect()
            await self._take_over(connection)
        except Exception as error:  # noqa: BLE001  # a credential provider may raise anything
            # A loop that was closed has forgotten its tasks, and nobody waits any more.
            if not self.loop.is_closed():
                self.end(error)
        except asyncio.CancelledError:
            self._closed_here = True
            self.end(exceptions.ConnectionError(_CLOSED_HERE))
            raise
        finally:
            if self.ended:
                # The loop may have been closed without an end to its tasks.
                with contextlib.suppress(RuntimeError):
                    await connection.disconnect(nowait=True)

    async def _take_over(self, connection: Any) -> None:
        stream, writer, parser = connection._reader, connection._writer, connection._parser  # noqa: SLF001
        if isinstance(writer, StreamWriter) and isinstance(parser, _AsyncHiredisParser):
            # redis-py would otherwise report them as left open.
            connection._reader = connection._writer = None  # noqa: SLF001
            writer.transport.set_protocol(_Receiver(self))
            self._parser = parser._reader  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            self.transport = writer.transport
        else:
            self.transport = _Turns(self, connection)
        self._end_of_loop = _aborted_with_its_loop(self.transport, writer)
        await anext(self._end_of_loop)
        if self._parser is not None:
            # Nobody reads the stream any more.
            self.received(bytes(stream._buffer))  # noqa: SLF001
            if stream.at_eof() or writer.is_closing():
                raise exceptions.ConnectionError(_CLOSED)
        self._begin()

    def _begin(self) -> None:
        """Send the commands that have waited for the connection; the time for their replies begins now."""
        waiting = [both for both in zip(self._waiters, self._unsent, strict=True) if not both[0].future.done()]
        if not (self.usable or waiting):
            self.end(exceptions.ConnectionError(_CLOSED_HERE))
            return
        self._heard = now = monotonic()
        self._fails_since = math.inf
        self._patience = self._timeout
        self._waiters = deque(waiter._replace(since=now) for waiter, _ in waiting)
        self._unsent = [packed for _, packed in waiting]
        self._watch(min([self._due_of(waiter) for waiter in self._waiters], default=math.inf), now)
        self._flush()

    def _due_of(self, waiter: _Waiter) -> float:
        return min(waiter.deadline, waiter.since + self._patience)

    def received(self, data: bytes) -> None:
        self._heard = monotonic()
        if self._circuit.failures:
            self._circuit.succeeded()
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets(False)) is not NOT_ENOUGH_DATA:
                if type(reply) is not PushNotification:
                    self.take(reply)
        except Exception as error:  # noqa: BLE001  # what follows cannot be parsed
            self.end(error)

    def take(self, reply: Any) -> None:
        """Give a reply to the waiter that it belongs to; raise where it belongs to none."""
        waiters = self._waiters
        if len(waiters) <= len(self._unsent):
            raise exceptions.ConnectionError("the server sent a reply that nobody had asked for")
        if isinstance(reply, Exception):
            self._look_at(reply)
        future, key, count, _, _ = waiters[0]
        if count == 1:
            replies = [reply]
        else:
            replies = self._replies
            replies.append(reply)
            if len(replies) < count:
                return
            self._replies = []
        waiters.popleft()
        if future.done():
            # As long as others wait, the server has not caught up: each reply may come just too late.
            if not waiters:
                self._fails_since = math.inf
        else:
            self._fails_since = math.inf
            if self._refusal is None:
                future.set_result(replies)
            else:
                _fail(future, self._refusal, key, in_doubt=False)
        self._refusal = None
        if not (self.usable or waiters):
            self.end(exceptions.ConnectionError(_CLOSED))

    def _look_at(self, error: Exception) -> None:
        """Note what an error among the replies says of the connection."""
        if is_outdated(error):
            self.usable = False
        if not isinstance(error, exceptions.ResponseError):
            self._refusal = error

    @property
    def awaits_replies(self) -> bool:
        return len(self._waiters) > len(self._unsent)

    def _on_deadline(self) -> None:
        """Fail the waiters whose time is over, and set the timer for the next ones."""
        now = monotonic()
        self._timer, self._due = None, math.inf
        sent = len(self._waiters) - len(self._unsent)
        next_due, failure = math.inf, None
        for place, waiter in enumerate(self._waiters):
            in_doubt = place < sent
            due = self._due_of(waiter)
            if not waiter.future.done() and due > now:
                next_due = min(next_due, due)
                continue
            if in_doubt and max(self._heard, waiter.since) + self._timeout <= now:
                self.usable = False
            elif in_doubt:
                # Nobody waits for this reply any more, but its absence shows whether the server is silent.
                next_due = min(next_due, max(self._heard, waiter.since) + self._timeout)
            if not waiter.future.done():
                missing = "connection" if self.transport is None else "reply"
                # Connecting has timeouts of its own, and goes on for callers that come later.
                self._fails_since = min(self._fails_since, waiter.since if in_doubt else math.inf)
                failure = exceptions.TimeoutError(f"no {missing} within {due - waiter.since:.3g} s")
                _fail(waiter.future, failure, waiter.key, in_doubt=in_doubt)
        # A server that was heard a moment ago answers callers that can wait longer.
        if failure is not None and now - self._heard >= _SHORTEST_SILENCE:
            self._circuit.failed(failure)
        if self._fails_since + _LONGEST_FAILURE <= now:
            self.usable = False
        else:
            next_due = min(next_due, self._fails_since + _LONGEST_FAILURE)
        if next_due < math.inf:
            self._watch(next_due, now)
        if not (self.usable or any(not waiter.future.done() for waiter in self._waiters)):
            self.end(exceptions.ConnectionError(_CLOSED))

    def lost(self, error: Exception | None) -> None:
        """End this link after the connection was closed from outside."""
        self.end(exceptions.ConnectionError(_CLOSED if error is None else f"{_CLOSED}: {error}"))

    def retire(self) -> None:
        """Take no more commands, and close the connection after the last reply that somebody waits for."""
        self.usable = False
        if self.loop is not asyncio.get_running_loop() or all(waiter.future.done() for waiter in self._waiters):
            self.close()

    def close(self) -> None:
        """Close the connection, which may belong to a loop other than the running one."""
        error = exceptions.ConnectionError(_CLOSED_HERE)
        self._closed_here = True
        if self.loop is asyncio.get_running_loop():
            self.end(error)
        else:
            # Where that loop is closed, so is the connection.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.end, error)

    def end(self, error: Exception) -> None:
        """Give the connection up, and fail all waiters."""
        if self.ended:
            return
        self.usable, self.ended = False, True
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:
            self.transport.abort()
        elif self._connecting not in (None, asyncio.current_task()):
            self._connecting.cancel()
        if self._end_of_loop is not None:
            _run_to_the_end(self._end_of_loop)
        sent = len(self._waiters) - len(self._unsent)
        waiting = [(place, waiter) for place, waiter in enumerate(self._waiters) if not waiter.future.done()]
        if waiting and not self._closed_here:
            self._circuit.failed(error)
        for place, waiter in waiting:
            _fail(waiter.future, error, waiter.key, in_doubt=place < sent)
        self._waiters.clear()
        self._unsent.clear()


def _fail(future: _Waits, error: Exception, key: bytes, *, in_doubt: bool) -> None:
    ours = translated(error, key, in_doubt=in_doubt)
    # The error may have been the answer to another waiter, for which nothing is in doubt.
    ours.in_doubt = in_doubt
    ours.__cause__ = error
    future.set_exception(ours)


async def _aborted_with_its_loop(transport: _Transport, _writer: object) -> AsyncGenerator[None, None]:
    """Close a connection when its loop is shut down, or when its link is garbage, and this generator with it.

    An event loop ends the asynchronous generators that were begun in it, in its own thread, when it is shut down or
    when they are collected.

    :param _writer: is kept alive here, because it would otherwise complain of an open transport.
    """
    try:
        yield
    finally:
        transport.abort()


def _run_to_the_end(generator: AsyncGenerator[None, None]) -> None:
    with contextlib.suppress(StopIteration):
        # A single step is enough, since the generator awaits nothing.
        generator.aclose().send(None)


class _Receiver(asyncio.Protocol):
    """Passes what the server sends on to a link, which it does not keep alive."""

    def __init__(self, link: _Link) -> None:
        self._link = weakref.ref(link)

    def data_received(self, data: bytes) -> None:
        if (link := self._link()) is not None:
            link.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if (link := self._link()) is not None:
            link.lost(exc)


class _Turns:
    """Replaces the transport where a connection is not made of streams and hiredis, as fakeredis's are not.

    The methods of the connection itself write commands and read replies, one after the other.
    """

    def __init__(self, link: _Link, connection: Any) -> None:
        self._link = weakref.ref(link)
        self._connection = connection
        self._packed: list[bytes] = []
        self._turns: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        self._packed.append(data)
        link = self._link()
        if link is not None and (self._turns is None or self._turns.done()):
            self._turns = asyncio.create_task(self._take_turns(link))

    def abort(self) -> None:
        if self._turns is not None and self._turns is not asyncio.current_task():
            self._turns.cancel()
        # All other methods that close it must be awaited.
        self._connection._close()  # noqa: SLF001

    async def _take_turns(self, link: _Link) -> None:
        connection = self._connection
        try:
            while link.awaits_replies:
                if self._packed:
                    packed, self._packed = b"".join(self._packed), []
                    await connection.send_packed_command(packed, check_health=False)
                try:
                    reply = await connection.read_response(disable_decoding=True)
                except exceptions.ResponseError as error:
                    reply = error
                link.take(reply)
        except Exception as error:  # noqa: BLE001  # all waiters get it, whatever it is
            link.end(error)
