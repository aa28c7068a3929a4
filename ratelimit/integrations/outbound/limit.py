"""One limit of somebody else's API: waiting for a turn under it, and learning from the answers.

A turn is a reservation in the bucket, so that whoever comes first is served first, in whichever process. Where the
server says that it has had enough, the bucket is brought to where nobody gets a token before the time that it named.
Who has reserved before that, and sleeps, is not known to the bucket any more: those of this process find the hold when
they wake up. The token that they were due falls into the time of the hold and is void; they reserve anew.
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
from ratelimit.checks import duration_nanos, token_count
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, Duration, to_seconds
from ratelimit.core.results import VerboseResult
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration, Limits
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.errors import InvalidArgumentError, RateLimitError, RateLimitExceeded
from ratelimit.integrations.managers import async_manager_of, manager_of
from ratelimit.integrations.outbound.answers import TOO_MANY_REQUESTS, fields_of, nanos_to_hold
from ratelimit.integrations.switch import is_enabled
from ratelimit.keys import Key, brief, shown
from ratelimit.manager import AsyncProxyManager, ProxyManager
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
    """The wall clock as it was when this began, and the monotonic one since."""

    def __init__(self) -> None:
        self._now = steady_clock()

    def now_nanos(self) -> int:
        return self._now()


@dataclass(slots=True, eq=False)
class _Hold:
    """Until when nobody of this process is to go, and whether the bucket has it, too."""

    until: int
    shared: bool = False


class OutboundLimit(OfThisProcess):
    """A limit of an API that is called by many workers, which share its bucket.

    Give the same one to all transports of a process that call the API: it serves sync code and asyncio. For a client
    library without a transport of this package, put :meth:`acquire` before each call and :meth:`learn` behind it.

    A copy is the limit itself. It can be pickled if its arguments can, with a session for example; the manager must be
    a URL then, or made by one.

    :param limits: text, a ``BucketConfiguration``, or a list of limits; None: those of the manager.
    :param key: of the bucket: whatever names what the provider counts by, a host or an account. Or a callable that is
        given each request (as its library has it) and answers with a key, or with None for one that is not limited.
    :param cost: tokens of a request, an int of 1 or more, or a callable that is given the request; for 0 it is free.
    :param max_wait: the longest wait for a turn, a ``timedelta`` or seconds above 0; None: no bound.
    :param max_hold: the longest time that a server may hold the fleet back, but for the jitter.
    :param default_hold: how long a 429 that does not say does so; by default the shortest period of the limits, at
        least a second and at most a minute.
    :param prefix: stands before the key in the store, so that it is not the bucket of somebody who calls you.
    :param manager: a ``ProxyManager`` for sync code, an ``AsyncProxyManager`` for asyncio; or the URL of a store that
        the process shares, by default that in the variable ``RATELIMIT_URL``, or on this machine.
    :param clock: by what holds are kept in this process, and slept out; the machine's by default.
    :param enabled: False: no call waits, as where ``RATELIMIT_ENABLED`` is ``false``.
    :param jitter: gives numbers from 0 to 1: the part of a tenth of a hold (at most ten seconds) that is added to it.
    :raises InvalidConfigurationError: for limits that cannot be.
    :raises InvalidArgumentError: for another argument that cannot be.
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
        if jitter is not _random:  # which cannot be pickled
            arguments["jitter"] = jitter
        self._made_by = partial(type(self), **arguments), (limits,)
        if not callable(key):
            _checked_key(key)
        if manager is not None and not isinstance(manager, ProxyManager | AsyncProxyManager | str):
            raise InvalidArgumentError(f"manager must be a manager, a URL or None, not {brief(manager)}")
        self._limits = None if limits is None else BucketConfiguration.of(limits)
        self._key = key
        self._cost = cost if callable(cost) else token_count(cost, "cost")
        self._max_wait = None if max_wait is None else duration_nanos(max_wait, "max_wait")
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
        """Wait for the turn of a request; the key that it counts under, None where it is not limited.

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
        """Hold everybody back if the answer to a request says so.

        :param key: what :meth:`acquire` has given.

        No error of the store comes of it: where the bucket cannot be told, this process alone is held back.
        """
        run(self._learned(key, status, headers, asynchronous=False))

    async def alearn(self, key: Key | None, status: int, headers: Mapping[str, str]) -> None:
        """See :meth:`learn`."""
        await arun(self._learned(key, status, headers, asynchronous=True))

    def hold_back(self, key: Key, duration: Duration) -> None:
        """Let nobody go before this long from now, as if a server had said so; at most ``max_hold``.

        :param duration: a ``timedelta`` or seconds, above 0.
        """
        run(self._held_back(_checked_key(key), duration_nanos(duration, "duration"), asynchronous=False))

    async def ahold_back(self, key: Key, duration: Duration) -> None:
        """See :meth:`hold_back`."""
        await arun(self._held_back(_checked_key(key), duration_nanos(duration, "duration"), asynchronous=True))

    def reserve(self, request: Any = None) -> float:
        """Take the tokens of a request on credit, and do not wait: the seconds until its turn, for who waits elsewhere.

        :raises RateLimitExceeded: where that is longer than ``max_wait``; nothing is taken then.
        """
        return run(self._reserved(request))

    def remaining_hold(self, request: Any = None) -> float:
        """Seconds for which this process knows that nobody is to go; 0 where it knows of nothing."""
        key = self.key_of(request)
        return 0 if key is None else self._rest(self._holds.get(key)) / NANOS_PER_SECOND

    def check_face(self, *, asynchronous: bool) -> None:
        """Refuse a manager of the other kind, for a transport that is made with this limit.

        :raises InvalidArgumentError: if it is one.
        """
        wrong = ProxyManager if asynchronous else AsyncProxyManager
        if isinstance(self._manager, wrong):
            wanted = "AsyncProxyManager" if asynchronous else "ProxyManager"
            raise InvalidArgumentError(f"manager must be of the kind {wanted} here, not {type(self._manager).__name__}")

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
            result = yield bucket.verbose.consume(cost, timeout=self._left(key, deadline))
            if not result.value:
                raise RateLimitExceeded(key, to_seconds(_wait_of(result, cost)))
            newest = self._holds.get(key)
            if newest is None or newest is hold or not self._rest(newest):
                break
        if hold is not None:  # for the case that tokens were put in, or given back, since the bucket has it
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

    def _left(self, key: Key, deadline: int) -> Fraction | None:
        """What is left of the longest wait, in seconds; None: it has no bound."""
        if deadline == NEVER:
            return None
        nanos = deadline - self._clock.now_nanos()
        if nanos <= 0:
            raise RateLimitExceeded(key, to_seconds(self._rest(self._holds.get(key))))
        return Fraction(nanos, NANOS_PER_SECOND)

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
            raise RateLimitExceeded(key, to_seconds(_wait_of(result, cost)))
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
        """The hold of a key after one that begins now: that one, or another that is longer."""
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
        """The key that a request counts under; None where it is not limited."""
        if not self._enabled or not is_enabled():
            return None
        key = self._key(request) if callable(self._key) else self._key
        return None if key is None else _checked_key(key)

    def _cost_of(self, request: Any) -> int:
        if not callable(self._cost):
            return self._cost
        cost = self._cost(request)
        return 0 if cost == 0 and type(cost) is int else token_count(cost, "cost")


def host_of(request: Any) -> str:
    """The host that a request goes to, in lower case, for a limit of each host: ``key=host_of``.

    For requests of httpx, requests and aiohttp, or whatever has a ``url``.
    """
    return urlsplit(str(request.url)).hostname or ""


def _checked_key(key: object) -> Key:
    if not isinstance(key, str | bytes):
        raise InvalidArgumentError(f"key must be a str or bytes, not {brief(key)}")
    return key


def _default_hold(limits: BucketConfiguration | None) -> int:
    shortest = min((one.refill_period_nanos for one in limits), default=0) if limits is not None else 0
    return max(_SHORTEST_DEFAULT_HOLD, min(shortest, _LONGEST_DEFAULT_HOLD))


def _wait_of(result: VerboseResult[Any], cost: int) -> int:
    """How long the wait would have been that was refused."""
    if result.configuration is None:  # by who decides where the store fails
        return result.full_refilling_time_nanos
    state = BucketState(result.configuration, None, 0, result.bandwidth_states)
    return state.nanos_until(cost, result.operation_time_nanos, check_capacity=False)
