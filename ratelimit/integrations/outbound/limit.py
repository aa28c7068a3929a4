"""One limit of somebody else's API: waiting for a turn under it, and learning from the answers.

A turn is a reservation in the bucket, so that whoever comes first is served first, in whichever process. Where the
server says that it has had enough, the bucket is held back, so that nobody gets a token before the time that the server
named. The bucket no longer knows the callers that reserved before that and still sleep: those of this process find the
hold when they wake up. The token that they were due falls into the time of the hold and is void; they reserve again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Final, SupportsIndex, TypeAlias
from urllib.parse import urlsplit

from ratelimit.bucket import AsyncBucket, Bucket, reserving
from ratelimit.checks import duration_nanos, instance, max_wait_nanos
from ratelimit.core.algorithm import Configuration
from ratelimit.core.limits import Limits, configuration_of
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, Duration, to_seconds
from ratelimit.core.results import ConsumptionProbe
from ratelimit.engine.reserving import probe_of
from ratelimit.errors import InvalidArgumentError, RateLimitError, RateLimitExceeded
from ratelimit.integrations.outbound.answers import TOO_MANY_REQUESTS, fields_of, nanos_to_hold
from ratelimit.keys import Key, shown
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.policy.callables import answered_cost, checked_cost
from ratelimit.policy.managers import async_manager_of, manager_of
from ratelimit.policy.switch import is_enabled
from ratelimit.policy.waiting import consumed
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import Clock, MonotonicSleep, steady_clock
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run

RequestKey: TypeAlias = Key | Callable[[Any], Key | None]
RequestCost: TypeAlias = int | Callable[[Any], int]

_SHORTEST_DEFAULT_HOLD: Final = NANOS_PER_SECOND
_LONGEST_DEFAULT_HOLD: Final = 60 * NANOS_PER_SECOND
_LONGEST_JITTER: Final = 10 * NANOS_PER_SECOND

_random: Final = fork_safety.chance.random

_logger = logging.getLogger("ratelimit")


class _MachineClock(MonotonicSleep):
    """A clock that begins at the wall time and goes on by the monotonic clock."""

    def __init__(self) -> None:
        self._now = steady_clock()

    def now_nanos(self) -> int:
        return self._now()


@dataclass(slots=True, eq=False)
class _Hold:
    """A time until which no caller of this process may go, and whether the bucket is held back as well."""

    until: int
    shared: bool = False


class OutboundLimit(OfThisProcess):
    """A limit of an API that is called by many workers, which share its bucket.

    Give the same one to all transports of a process that call the API: it serves sync code and asyncio. For a client
    library without a transport of this package, put :meth:`acquire` before each call and :meth:`learn` after it.

    A copy is the limit itself. It can be pickled if its arguments can, with a session for example; the manager must be
    a URL then, or made by one.

    :param limits: text, a ``BucketConfiguration``, or a list of limits; None: those of the manager.
    :param key: of the bucket: whatever names what the provider counts by, a host or an account. Or a callable that is
        given each request (as its library has it) and answers with a key, or with None for one that is not limited.
    :param cost: tokens of a request, an int of 1 or more, or a callable that is given the request; for 0 it is free.
    :param max_wait: the longest wait for a turn that is accepted, a ``timedelta`` or seconds: a call that would have to
        wait for longer is refused at once. 0: no call waits. None: calls wait as long as it takes.
    :param max_hold: the longest time that a server may hold the fleet back; the jitter comes on top of it.
    :param default_hold: for how long a 429 that names no time holds the fleet back; by default the
        shortest period of the limits, at least a second and at most a minute.
    :param prefix: stands before the key in the store, so that the bucket is not shared with a client that calls you.
    :param manager: a ``ProxyManager`` for sync code, an ``AsyncProxyManager`` for asyncio; or the URL of a store that
        the process shares, by default that in the variable ``RATELIMIT_URL``, or on this machine.
    :param clock: measures the holds that this process knows of, and sleeps until they end; the machine's by default.
    :param enabled: False: no call waits, as where ``RATELIMIT_ENABLED`` is ``false``.
    :param jitter: returns numbers from 0 to 1. A hold gets longer by this part of its tenth, or of ten seconds if that
        is less.
    :raises InvalidConfigurationError: for limits that are not valid.
    :raises InvalidArgumentError: for another argument that is not valid.
    """

    def __init__(
        self,
        limits: Limits | None,
        *,
        key: RequestKey,
        cost: RequestCost = 1,
        max_wait: Duration | None = 60,
        max_hold: Duration = 3600,
        default_hold: Duration | None = None,
        prefix: str = "outbound:",
        manager: ProxyManager | AsyncProxyManager | str | None = None,
        clock: Clock | None = None,
        enabled: bool = True,
        jitter: Callable[[], float] = _random,
    ) -> None:
        arguments: dict[str, Any] = {
            "key": key,
            "cost": cost,
            "max_wait": max_wait,
            "max_hold": max_hold,
            "default_hold": default_hold,
            "prefix": prefix,
            "manager": manager,
            "clock": clock,
            "enabled": enabled,
        }
        # The default cannot be pickled.
        if jitter is not _random:
            arguments["jitter"] = jitter
        self._made_by = partial(type(self), **arguments), (limits,)
        if not callable(key):
            _checked_key(key)
        if manager is not None:
            instance(manager, (ProxyManager, AsyncProxyManager, str), "manager", "a manager, a URL or None")
        self._limits = None if limits is None else configuration_of(limits)
        self._key = key
        self._cost = checked_cost(cost)
        self._max_wait = None if max_wait is None else max_wait_nanos(max_wait)
        self._max_hold = duration_nanos(max_hold, "max_hold")
        self._default_hold = (
            _default_hold(self._limits) if default_hold is None else duration_nanos(default_hold, "default_hold")
        )
        self._prefix = prefix
        self._manager = manager
        self._clock = _MachineClock() if clock is None else clock
        self._enabled = enabled
        self._jitter = jitter
        self._holds: dict[Key, _Hold] = {}
        self._lock = fork_safety.lock()

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickle the arguments, without what this process knows of holds."""
        return self._made_by

    def acquire(self, request: Any = None) -> Key | None:
        """Wait for the turn of a request, and return the key that it counts under; None where it is not limited.

        :param request: what a callable ``key`` or ``cost`` is given.
        :raises RateLimitExceeded: at once, where the wait would be longer than ``max_wait``; nothing is taken then.

        A wait that is interrupted gives its tokens back, unless others wait behind it. Errors of the store are as the
        manager's ``on_error`` says.
        """
        return run(self._admitted(request, asynchronous=False))

    async def aacquire(self, request: Any = None) -> Key | None:
        """See :meth:`acquire`."""
        return await arun(self._admitted(request, asynchronous=True))

    def learn(self, key: Key | None, status: int, headers: Mapping[str, str]) -> None:
        """Hold all callers back if the answer to a request says so.

        :param key: what :meth:`acquire` has returned.

        It raises no error of the store: where the bucket cannot be held back, only this process is.
        """
        run(self._learned(key, status, headers, asynchronous=False))

    async def alearn(self, key: Key | None, status: int, headers: Mapping[str, str]) -> None:
        """See :meth:`learn`."""
        await arun(self._learned(key, status, headers, asynchronous=True))

    def hold_back(self, key: Key, duration: Duration) -> None:
        """Let no caller go for this long from now, as if a server had said so; at most ``max_hold``.

        :param duration: a ``timedelta`` or seconds, above 0.
        """
        run(self._held_back(_checked_key(key), duration_nanos(duration, "duration"), asynchronous=False))

    async def ahold_back(self, key: Key, duration: Duration) -> None:
        """See :meth:`hold_back`."""
        await arun(self._held_back(_checked_key(key), duration_nanos(duration, "duration"), asynchronous=True))

    def reserve(self, request: Any = None) -> float:
        """Take the tokens of a request on credit, and return the seconds until its turn without waiting for it.

        :raises RateLimitExceeded: where that is longer than ``max_wait``; nothing is taken then.
        """
        return run(self._reserved(request))

    def remaining_hold(self, request: Any = None) -> float:
        """Return for how many seconds this process knows that no caller may go; 0 where it knows of no hold."""
        key = self.key_of(request)
        return 0 if key is None else self._rest(self._holds.get(key)) / NANOS_PER_SECOND

    def check_face(self, *, asynchronous: bool) -> None:
        """Refuse a manager of the other kind, for a transport that is made with this limit.

        :raises InvalidArgumentError: for such a manager.
        """
        wrong = ProxyManager if asynchronous else AsyncProxyManager
        if isinstance(self._manager, wrong):
            wanted = "AsyncProxyManager" if asynchronous else "ProxyManager"
            raise InvalidArgumentError(
                f"manager must be of the kind {wanted} here; got one of the kind {type(self._manager).__name__}"
            )

    def _admitted(self, request: Any, *, asynchronous: bool) -> Steps[Key | None]:
        key, cost = self.key_of(request), self._cost_of(request)
        if key is None or not cost:
            return key
        bucket = self._bucket(key, asynchronous=asynchronous)
        deadline = NEVER if self._max_wait is None else self._clock.now_nanos() + self._max_wait
        while True:
            hold = self._holds.get(key)
            if hold is not None and not hold.shared:
                yield from self._sit_out(key, hold, deadline, asynchronous=asynchronous)
            result = yield from consumed(bucket, cost, self._left(key, deadline))
            if not result.value:
                raise _exceeded(key, result.value)
            newest = self._holds.get(key)
            if newest is None or newest is hold or not self._rest(newest):
                break
        # Tokens that were put in or given back end the hold of the bucket early, but not that of this process.
        if hold is not None:
            yield from self._sit_out(key, hold, deadline, asynchronous=asynchronous)
        return key

    def _sit_out(self, key: Key, hold: _Hold, deadline: int, *, asynchronous: bool) -> Steps[None]:
        rest = self._rest(hold)
        if not rest:
            return
        if self._clock.now_nanos() + rest > deadline:
            raise RateLimitExceeded(key, to_seconds(rest))
        sleep: Callable[[int], Any] = self._clock.asleep if asynchronous else self._clock.sleep
        yield sleep(rest)

    def _left(self, key: Key, deadline: int) -> int | None:
        """Return what is left of the longest wait, in nanoseconds; None: it has no bound."""
        if not self._max_wait:
            return self._max_wait
        nanos = deadline - self._clock.now_nanos()
        if nanos <= 0:
            raise RateLimitExceeded(key, to_seconds(self._rest(self._holds.get(key))))
        return nanos

    def _reserved(self, request: Any) -> Steps[float]:
        key, cost = self.key_of(request), self._cost_of(request)
        if key is None or not cost:
            return 0
        bucket = self._bucket(key, asynchronous=False)
        rest = self._rest(self._holds.get(key))
        longest = NEVER if self._max_wait is None else self._max_wait
        if rest > longest:
            raise RateLimitExceeded(key, to_seconds(rest))
        result = yield from reserving(bucket, cost, longest)
        if result.value.wait == NEVER:
            raise _exceeded(key, probe_of(result, result.value.refused_wait, consumed=False))
        return to_seconds(max(result.value.wait, rest)) or 0

    def _learned(self, key: Key | None, status: int, headers: Mapping[str, str], *, asynchronous: bool) -> Steps[None]:
        if key is None:
            return
        nanos = nanos_to_hold(status, fields_of(headers), self._clock.now_nanos())
        if nanos is None and status == TOO_MANY_REQUESTS:
            nanos = self._default_hold
        if nanos:
            yield from self._held_back(key, nanos, asynchronous=asynchronous)

    def _held_back(self, key: Key, nanos: int, *, asynchronous: bool) -> Steps[None]:
        nanos = min(nanos, self._max_hold)
        nanos += round(min(nanos / 10, _LONGEST_JITTER) * self._jitter())
        hold = self._noted(key, nanos)
        rest = self._rest(hold)
        if hold.shared or not rest:
            return
        try:
            yield self._bucket(key, asynchronous=asynchronous).hold_back(Fraction(rest, NANOS_PER_SECOND))
        except RateLimitError as error:
            _logger.warning("only this process is held back for the key %s: %s", shown(key), error)
        else:
            hold.shared = True

    def _noted(self, key: Key, nanos: int) -> _Hold:
        """Note a hold of a key that begins now, and return it, or a longer one that is there already."""
        fork_safety.check()
        with self._lock:
            now = self._clock.now_nanos()
            known = self._holds.get(key)
            if known is not None and known.until >= now + nanos:
                return known
            for over in [each for each, hold in self._holds.items() if hold.until <= now]:
                del self._holds[over]
            hold = self._holds[key] = _Hold(now + nanos)
            return hold

    def _rest(self, hold: _Hold | None) -> int:
        return 0 if hold is None else max(0, hold.until - self._clock.now_nanos())

    def _bucket(self, key: Key, *, asynchronous: bool) -> Bucket | AsyncBucket:
        self.check_face(asynchronous=asynchronous)
        manager: Any = async_manager_of(self._manager) if asynchronous else manager_of(self._manager)  # type: ignore[arg-type]  # is checked
        stored = self._prefix.encode() + key if isinstance(key, bytes) else self._prefix + key
        return manager.bucket(stored, self._limits)  # type: ignore[no-any-return]

    def key_of(self, request: Any) -> Key | None:
        """Return the key that a request counts under; None where it is not limited."""
        if not self._enabled or not is_enabled():
            return None
        key = self._key(request) if callable(self._key) else self._key
        return None if key is None else _checked_key(key)

    def _cost_of(self, request: Any) -> int:
        if not callable(self._cost):
            return self._cost  # type: ignore[no-any-return]  # an int was checked
        return answered_cost(self._cost(request))


def host_of(request: Any) -> str:
    """Return the host that a request goes to, in lower case, for a limit of each host: ``key=host_of``.

    It is for requests of httpx, requests and aiohttp, and for whatever has a ``url``.
    """
    return urlsplit(str(request.url)).hostname or ""


def _checked_key(key: object) -> Key:
    return instance(key, (str, bytes), "key", "a str or bytes")  # type: ignore[return-value]  # what it has checked


def _default_hold(limits: Configuration | None) -> int:
    """Return the shortest period of the limits, or their shortest window where they have no periods."""
    periods = [getattr(limit, "refill_period_nanos", limit.window_nanos) for limit in limits or ()]
    shortest = min(periods, default=0)
    return max(_SHORTEST_DEFAULT_HOLD, min(shortest, _LONGEST_DEFAULT_HOLD))


def _exceeded(key: Key, probe: ConsumptionProbe) -> RateLimitExceeded:
    return RateLimitExceeded(key, probe.retry_after, probe)
