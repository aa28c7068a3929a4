"""What a store sends to a server, and what the replies mean: as steps, which both stores run.

A swap is one command: ``SET`` with ``IFEQ`` and ``GET`` where the server knows these, otherwise a script. The first
swap takes along a probe, a ``SET`` with ``IFEQ`` that can change nothing; a server without ``IFEQ`` refuses it. A swap
also takes along a question for the server's time when the estimate of that is a second old. So neither costs a round
trip of its own.

Scripts are called by their SHA-1 where the server should know them. Otherwise their text is sent, after which the
server does know them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.crc import key_slot
from redis.exceptions import NoScriptError, ResponseError

from ratelimit.core.algorithm import LONGEST_STATE
from ratelimit.errors import StoreError, StoreUnavailableError
from ratelimit.runtime.clock import MONOTONIC_IS_FINE
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided, DecidedAll, Lost, Swap, Usual
from ratelimit.stores.redis.channel import Channel, Command
from ratelimit.stores.redis.circuit import CircuitStatus
from ratelimit.stores.redis.errors import translated
from ratelimit.stores.redis.node import Node, is_refused_as_unknown, time_nanos
from ratelimit.stores.redis.scripts import Script, load

_SET_NX: Final = load("set_nx")
_SET_NX_PX: Final = load("set_nx_px")
_COMPARE_AND_SWAP: Final = load("compare_and_swap")
_COMPARE_AND_SWAP_PX: Final = load("compare_and_swap_px")
_DECIDE: Final = load("decide")
_COMPARE_AND_SWAP_ALL: Final = load("compare_and_swap_all")
_DECIDE_ALL: Final = load("decide_all")

_LAST_BYTE_READ: Final = b"%d" % LONGEST_STATE
"""The index of the last byte that is read: one byte more than a state may have, so that no server sends 512 MB."""

# Makes a named tuple without the function that would only name its fields.
_new = tuple.__new__

_TIME: Final = (b"TIME",)
_PROBE: Final = (b"", b"IFEQ", secrets.token_bytes(32), b"GET")
"""The end of the probe, after ``SET`` and the key: no value equals 32 random bytes."""

_LONGEST_TTL_MILLIS: Final = 2**53
"""Servers add it to the present time; they refuse a sum that is too large, or let it overflow."""


class RedisSteps(OfThisProcess):
    """The conversation with the servers of a channel.

    :ivar unique_readings: whether no two readings of the server's time are alike: each is an estimate of this process,
        as fine as the local clock.
    """

    _advice = "make it in each process, over a client of its own, or pickle a manager that from_url has made"
    unique_readings = MONOTONIC_IS_FINE

    def __init__(self, channel: Channel, monotonic: Callable[[], int]) -> None:
        self._channel = channel
        self._monotonic = monotonic
        self._nodes: dict[str, Node] = {}
        self._only = None if channel.spans_nodes else Node()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._channel.server})"

    def known_now(self, key: bytes) -> int | None:
        """Return the estimate of the server's time; None where it is too old for a decision."""
        node = self._only or self._node_of(key)
        return node.time.estimate(self._monotonic())

    def clock_error_nanos(self, key: bytes) -> int | None:
        """Return how far the estimate of the server's time may be behind; None before the first reply."""
        return self._node_of(key).time.error_bound(self._monotonic())

    def slot_of(self, key: bytes) -> int:
        """Return what keys must have in common to be changed together: the slot of a cluster; elsewhere they all do."""
        return key_slot(key) if self._channel.spans_nodes else 0

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the state of the circuit to each server, by node (``host:port``; empty for a single server)."""
        return self._channel.circuits()

    # One verb of a store each

    def _getting(self, key: bytes, deadline: float | None) -> Steps[bytes | None]:
        node = self._node_of(key)
        # A read takes no probe along, because a probe is a write.
        questions = (_TIME,) * (self._monotonic() >= node.time.stale_at)
        command = (b"GETRANGE", key, b"0", _LAST_BYTE_READ)
        # The reply is empty where nothing is stored. An empty value that is stored is found when a swap loses to it.
        return _state((yield from self._accompanied(questions, node, key, command, deadline)), key) or None

    def usual_swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Usual | None:
        """Return the one command that swaps; None where something else has to go along with it."""
        node = self._only or self._node_of(key)
        if self._monotonic() >= node.time.stale_at:
            return None
        if node.swaps_natively:
            return _new(Usual, (_native_swap(key, before, after, ttl_millis), before))
        script, arguments = _scripted_swap(before, after, ttl_millis)
        if node.swaps_natively is None or script.sha not in node.scripts:
            return None
        return _new(Usual, ((*script.call, key, *arguments), 1))

    def swapping(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]:
        """Return the steps of ``swap``, for callers that are steps themselves."""
        usual = self.usual_swap(key, before, after, ttl_millis)
        if usual is None:
            return (yield from self._swapping_unusually(key, before, after, ttl_millis, deadline))
        (reply,) = yield self._channel.send(key, (usual.command,), deadline)
        if reply == usual.done:
            return None
        return (yield from self.swapped(key, before, after, ttl_millis, deadline=deadline, reply=reply))

    def swapped(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None, reply: Any
    ) -> Steps[Lost | None]:
        """Return the steps of ``swap`` from a reply to its usual command on, by which the swap is not done."""
        node = self._only or self._node_of(key)
        # Either another server has taken this one's place, or this one was restarted and has forgotten all scripts. To
        # try each of these would cost a round trip each.
        if is_refused_as_unknown(reply):
            node.swaps_natively = False
        elif isinstance(reply, NoScriptError):
            node.scripts.clear()
        else:
            return Lost(_state(reply, key))
        return (yield from self._swapping_unusually(key, before, after, ttl_millis, deadline))

    def _swapping_unusually(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]:
        """Swap by a command that takes something along, or by one that the server may not know."""
        node = self._only or self._node_of(key)
        if node.swaps_natively:
            command = _native_swap(key, before, after, ttl_millis)
            reply = yield from self._accompanied((_TIME,), node, key, command, deadline)
            if not is_refused_as_unknown(reply):
                return None if reply == before else Lost(_state(reply, key))
            # Another server has taken this one's place, and has no IFEQ.
            node.swaps_natively = False
        script, arguments = _scripted_swap(before, after, ttl_millis)
        reply = yield from self._run(node, script, (key,), arguments, deadline)
        return None if reply == 1 else Lost(_state(reply, key))

    def usual_decision(self, key: bytes, arguments: tuple[bytes, ...]) -> Usual | None:
        """Return the one command that lets the server decide; None where something else has to go along with it."""
        node = self._only or self._node_of(key)
        if node.swaps_natively is None or _DECIDE.sha not in node.scripts or self._monotonic() >= node.time.stale_at:
            return None
        return _new(Usual, ((*_DECIDE.call, key, *arguments), None))

    def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided | int]:
        """Return the steps of ``decide``, for callers that are steps themselves."""
        usual = self.usual_decision(key, arguments)
        if usual is None:
            node = self._only or self._node_of(key)
            reply = yield from self._run(node, _DECIDE, (key,), arguments, deadline)
            return _decided(reply, key)
        (reply,) = yield self._channel.send(key, (usual.command,), deadline)
        return (yield from self.decided(key, arguments, deadline, reply))

    def decided(
        self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None, reply: Any
    ) -> Steps[Decided | int]:
        """Return the steps of ``decide`` from the reply to its usual command on."""
        if isinstance(reply, NoScriptError):
            node = self._only or self._node_of(key)
            node.scripts.clear()
            reply = yield from self._run(node, _DECIDE, (key,), arguments, deadline)
        return _decided(reply, key)

    def send_usual(self, key: bytes, command: Command, deadline: float | None) -> Any:
        """Send a usual command, and return its reply; in sync code."""
        (reply,) = self._channel.send(key, (command,), deadline)
        return reply

    def post_usual(self, key: bytes, command: Command, waiter: Any, deadline: float | None) -> bool:
        """Send a usual command in asyncio code; return False where it cannot leave at once.

        :param waiter: gets the list of its one reply by ``set_result``, or a ``StoreError`` by ``set_exception``.
        """
        post = self._channel.post
        return post is not None and post(key, command, waiter, deadline)

    def _swapping_all(self, swaps: Sequence[Swap], deadline: float | None) -> Steps[list[Lost | None] | None]:
        keys = [swap.key for swap in swaps]
        arguments: list[bytes] = []
        for _, before, after, ttl_millis in swaps:
            ttl = max(0, min(ttl_millis, _LONGEST_TTL_MILLIS))
            arguments += (before or b"", after or b"", b"%d" % ttl)
        node = self._node_of(keys[0])
        reply = yield from self._run(node, _COMPARE_AND_SWAP_ALL, keys, tuple(arguments), deadline)
        if reply == 1:
            return None
        if type(reply) is not list or len(reply) != len(keys):
            raise _senseless(reply, keys[0])
        return [None if found == 1 else Lost(_state(found, key)) for key, found in zip(keys, reply, strict=True)]

    def _deciding_all(
        self, keys: Sequence[bytes], arguments: tuple[bytes, ...], deadline: float | None
    ) -> Steps[DecidedAll]:
        reply = yield from self._run(self._node_of(keys[0]), _DECIDE_ALL, keys, arguments, deadline)
        if type(reply) is not list or len(reply) != len(keys) + 1:
            raise _senseless(reply, keys[0])
        done, *before = reply
        return DecidedAll(done == 1, tuple([_state(found, key) for key, found in zip(keys, before, strict=True)]))

    def _deleting(self, key: bytes, deadline: float | None) -> Steps[None]:
        yield from self._asking(key, (b"DEL", key), deadline)

    def _asking_time(self, key: bytes, deadline: float | None) -> Steps[int]:
        sent = self._monotonic()
        replies = yield self._channel.send(key, (_TIME,), deadline)
        (reply,) = replies
        if isinstance(reply, ResponseError):
            raise _without_time(reply, key) from reply
        self._learn_time(key, reply, sent, replies)
        estimate = self.known_now(key)
        return time_nanos(reply) if estimate is None else estimate

    def _asking(self, key: bytes, command: Command, deadline: float | None) -> Steps[Any]:
        (reply,) = yield self._channel.send(key, (command,), deadline)
        return _checked(reply, key)

    # What they share

    def _run(
        self, node: Node, script: Script, keys: Sequence[bytes], arguments: Command, deadline: float | None
    ) -> Steps[Any]:
        """Run a script: by its SHA-1 where the server should know it, otherwise by its text."""
        key, operands = keys[0], (b"%d" % len(keys), *keys, *arguments)
        if script.sha in node.scripts:
            command: Command = (*script.call[:2], *operands)
            questions = self._questions(node, key)
            if questions:
                reply = yield from self._accompanied(questions, node, key, command, deadline)
            else:
                (reply,) = yield self._channel.send(key, (command,), deadline)
            if not isinstance(reply, NoScriptError):
                return _checked(reply, key)
            # A server that was restarted has forgotten all scripts. To try each of them would cost a round trip each.
            node.scripts.clear()
        reply = yield from self._accompanied(
            self._questions(node, key), node, key, (b"EVAL", script.text, *operands), deadline
        )
        _checked(reply, key)
        node.scripts.add(script.sha)
        return reply

    def _questions(self, node: Node, key: bytes) -> tuple[Command, ...]:
        """Return what a script takes along, which mostly is nothing: a question for the time, and the probe."""
        stale = self._monotonic() >= node.time.stale_at
        if not stale and node.swaps_natively is not None:
            return ()
        return (_TIME,) * stale + ((b"SET", key, *_PROBE),) * (node.swaps_natively is None)

    def _accompanied(
        self, questions: tuple[Command, ...], node: Node, key: bytes, command: Command, deadline: float | None
    ) -> Steps[Any]:
        """Send a command together with questions, learn from their answers, and return the reply to the command."""
        sent = self._monotonic()
        replies = yield self._channel.send(key, (*questions, command), deadline)
        *answers, reply = replies
        for question, answer in zip(questions, answers, strict=True):
            # A command that was carried out does not fail because of an error among the answers.
            if question is not _TIME:
                node.learn_from_probe(answer)
            elif not isinstance(answer, ResponseError):
                self._learn_time(key, answer, sent, replies)
        return reply

    def _learn_time(self, key: bytes, time_reply: Any, sent: int, replies: Any) -> None:
        """Learn the time of the server that has answered, which need not hold the key any more."""
        received = self._monotonic()
        try:
            now = time_nanos(time_reply)
        except (TypeError, ValueError):
            raise _senseless(time_reply, key) from None
        node = self._only or self._node_named(replies.node.name)
        node.time.observe(now, sent, received)

    def _node_of(self, key: bytes) -> Node:
        if self._only is not None:
            return self._only
        return self._node_named(self._channel.node(key))

    def _node_named(self, name: str) -> Node:
        node = self._nodes.get(name)
        return self._nodes.setdefault(name, Node()) if node is None else node


def _native_swap(key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Command:
    condition = (b"NX",) if before is None else (b"IFEQ", before)
    expiry = (b"PX", b"%d" % min(ttl_millis, _LONGEST_TTL_MILLIS)) if ttl_millis > 0 else ()
    return (b"SET", key, after, *condition, b"GET", *expiry)


def _scripted_swap(before: bytes | None, after: bytes, ttl_millis: int) -> tuple[Script, Command]:
    """Return the script that swaps, and its arguments."""
    states = (after,) if before is None else (before, after)
    if ttl_millis > 0:
        script = _SET_NX_PX if before is None else _COMPARE_AND_SWAP_PX
        return script, (*states, b"%d" % min(ttl_millis, _LONGEST_TTL_MILLIS))
    return _SET_NX if before is None else _COMPARE_AND_SWAP, states


def _decided(reply: Any, key: bytes) -> Decided | int:
    """Return what the server has decided, from the reply of its script."""
    if type(reply) is int:
        return reply
    if type(reply) is not list:
        return Decided(True, _state(reply, key))
    if len(reply) != 1:
        raise _senseless(reply, key)
    return Decided(False, _state(reply[0], key))


def _state(reply: Any, key: bytes) -> bytes | None:
    """Return what is stored, from a reply that should be just that."""
    if reply is None or isinstance(reply, bytes):
        return reply
    _checked(reply, key)
    raise _senseless(reply, key)


def _checked(reply: Any, key: bytes) -> Any:
    if isinstance(reply, ResponseError):
        raise translated(reply, key, in_doubt=False) from reply
    return reply


def _without_time(refusal: ResponseError, key: bytes) -> StoreError:
    """Return the error for a server that refuses ``TIME``, with what to do where the server works otherwise."""
    error = translated(refusal, key, in_doubt=False)
    if type(error) is not StoreError:
        # The server is unavailable for a while only, and will then answer.
        return error
    return StoreError(key, f"Redis refuses TIME; give the manager a clock, as clock=SystemClock(): {error.message}")


def _senseless(reply: Any, key: bytes) -> StoreUnavailableError:
    """Return the error for a reply that does not answer the command, which may have been carried out all the same."""
    kind = type(reply).__name__
    return StoreUnavailableError(key, f"Redis sent a reply of a kind that was not asked for ({kind})", in_doubt=True)
