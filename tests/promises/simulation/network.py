"""The store as a client sees it, and what can become of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ratelimit.errors import StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided, Lost, Usual
from tests.promises.simulation.bucket import Bucket
from tests.promises.simulation.ledger import Decision
from tests.promises.simulation.server import Server
from tests.promises.simulation.world import MILLISECOND, SECOND, World

SOCKET_TIMEOUT: Final = 20 * MILLISECOND
_SHORTEST, _LONGEST = 20_000, 300_000  # nanoseconds, one way
_LATEST: Final = 3 * SOCKET_TIMEOUT  # of requests that take too long


Faults = Mapping[str, float]
"""How probable each of these is for a request:

- refused: it is not sent, and the client knows that;
- lost: it does not arrive;
- reply lost: it is carried out, and the reply does not arrive;
- broken: the connection breaks while the request is under way, one way or the other;
- late: it arrives late, perhaps when nobody waits for the reply any more;
- doubled: the reply arrives twice.
"""

FAULTS: Final = ("refused", "lost", "reply lost", "broken", "late", "doubled")


@dataclass(slots=True, eq=False)
class Request:
    """What a client waits for, once it is sent.

    :ivar settled: whether nobody waits for the reply any more.
    :ivar shown: the bucket right after it was carried out.
    """

    name: str
    key: bytes
    deadline: float | None
    carry_out: Callable[[Decision], Any]
    decision: Decision | None = None
    answer: Callable[[Any, BaseException | None], None] | None = None
    settled: bool = False
    shown: Bucket | None = None

    def settle(self, value: Any, failure: BaseException | None) -> None:
        self.settled = True
        assert self.answer is not None
        self.answer(value, failure)


class SimulatedStore:
    """The surface of a ``DecidingStore``: what is asked for is a request, which the scheduler sends and answers."""

    def __init__(self, server: Server, known_now: Callable[[], int | None]) -> None:
        self._server = server
        self._known_now = known_now

    def known_now(self, key: bytes) -> int | None:
        return self._known_now()

    def get(self, key: bytes, *, deadline: float | None = None) -> Any:
        return Request("get", key, deadline, self._server.get)

    def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Any:
        return Request("swap", key, deadline, lambda decision: self._server.swap(decision, before, after, ttl_millis))

    def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Any:
        return Request("decide", key, deadline, lambda decision: self._server.decide(decision, arguments))

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> Any:
        return Request("time", key, deadline, self._server.now_nanos)

    def swapping(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]:
        return (yield self.swap(key, before, after, ttl_millis, deadline=deadline))  # type: ignore[no-any-return]  # as the server answers

    def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided | int]:
        return (yield self.decide(key, arguments, deadline=deadline))  # type: ignore[no-any-return]  # the same

    def usual_swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Usual | None:
        return Usual(self.swap(key, before, after, ttl_millis))

    def usual_decision(self, key: bytes, arguments: tuple[bytes, ...]) -> Usual | None:
        return Usual(Request("decide", key, None, lambda decision: _raw(self._server.decide(decision, arguments))))

    def swapped(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None, reply: Any
    ) -> Steps[Lost | None]:
        yield from ()
        return reply  # type: ignore[no-any-return]  # as the server answers

    def decided(
        self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None, reply: Any
    ) -> Steps[Decided | int]:
        yield from ()
        return Decided(False, reply[0]) if isinstance(reply, list) else Decided(True, reply)

    def send_usual(self, key: bytes, command: Any, deadline: float | None) -> Any:
        raise NotImplementedError

    def post_usual(self, key: bytes, command: Any, waiter: Any, deadline: float | None) -> bool:
        raise NotImplementedError

    def delete(self, key: bytes, *, deadline: float | None = None) -> Any:
        return Request("delete", key, deadline, self._server.delete)

    def close(self) -> None:
        raise NotImplementedError


def _raw(decided: Decided | int) -> Any:
    """Return the reply of the script, as servers send it."""
    if isinstance(decided, int):
        return decided
    return decided.before if decided.done else [decided.before]


class Network:
    """Carries requests to the server, and replies back, as well as the faults let it."""

    def __init__(self, world: World, server: Server, faults: Faults) -> None:
        self.world = world
        self.server = server
        self.faults = faults

    def send(self, request: Request) -> None:
        world, deadline = self.world, request.deadline
        fate = self._fate()
        there, back = world.random.randint(_SHORTEST, _LONGEST), world.random.randint(_SHORTEST, _LONGEST)
        timeout = SOCKET_TIMEOUT
        if deadline is not None:
            timeout = min(timeout, round((deadline - world.monotonic()) * SECOND))
        if timeout <= 0:
            world.after(0, self._fail, request, StoreTimeoutError(request.key, "no time left"))
            return
        if fate == "refused":
            world.after(there, self._fail, request, StoreUnavailableError(request.key, "refused"))
            return
        assert request.decision is not None
        request.decision.trips += 1
        if fate == "late":
            there = world.random.randint(_SHORTEST, _LATEST)
        if fate == "broken":
            world.after(world.random.randint(0, there + back), self._fail, request, _broken(request.key))
        if fate != "lost":
            world.after(there, self._arrive, request, self.server.term, back, fate)
        if fate in ("lost", "reply lost") or there + back >= timeout:
            self._time_out(request, timeout)
        if world.tracing:
            world.note(f"{request.decision}: {request.name}{f', {fate}' if fate else ''}")

    def _fate(self) -> str:
        chance = self.world.random.random()
        for name, probability in self.faults.items():
            chance -= probability
            if chance < 0:
                return name
        return ""

    def _arrive(self, request: Request, term: int, back: int, fate: str) -> None:
        if term != self.server.term:  # it was for the master that is gone
            self.world.after(back, self._fail, request, _broken(request.key))
            return
        assert request.decision is not None
        reply = request.carry_out(request.decision)
        request.shown = self.server.bucket(request.key)
        if self.world.tracing:
            self.world.note(f"{request.decision}: {request.name} arrives, {_shown(request, reply)}")
        if fate != "reply lost":
            self.world.after(back, self._reply, request, reply)
        if fate == "doubled":
            self.world.after(2 * back, self._reply, request, reply)

    def _reply(self, request: Request, reply: Any) -> None:
        if request.settled:
            if self.world.tracing:
                self.world.note(f"{request.decision}: nobody waits for the reply to {request.name}")
            return
        assert request.decision is not None
        request.decision.shown = request.shown
        request.settle(reply, None)

    def _time_out(self, request: Request, nanos: int) -> None:
        self.world.after(nanos, self._fail, request, StoreTimeoutError(request.key, "late", in_doubt=True))

    def _fail(self, request: Request, error: StoreError) -> None:
        if request.settled:
            return
        assert request.decision is not None
        request.decision.unanswered += error.in_doubt
        if self.world.tracing:
            self.world.note(f"{request.decision}: {request.name} fails, {error}")
        request.settle(None, error)


def _broken(key: bytes) -> StoreError:
    return StoreUnavailableError(key, "broken", in_doubt=True)


def _shown(request: Request, reply: Any) -> str:
    if request.name == "get":
        return "and finds nothing" if reply is None else "and finds a bucket"
    match reply:
        case Lost():
            return "and has lost"
        case Decided():
            return "and is decided" if reply.done else "and is not decided"
        case None:
            return "and is done"
    return "and is answered"
