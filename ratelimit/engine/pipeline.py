"""The layers of a manager, listed once, and what all of them have in common.

From the outside in; a layer that has nothing to do is left out:

- looking up finds the terms of a key, where the limits are a callable;
- observing notifies a listener;
- fallback answers as ``on_error`` says, where the store fails;
- the shield keeps the tokens of an interrupted wait from being lost, in sync code;
- local decisions answer without the store, as far as an optimization allows;
- coalescing lets one question at a time through for each bucket;
- swapping asks the store. Over a store in this process, :class:`InProcess` takes the place of these last two.

Questions about several buckets at once have layers of their own, in ``several``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

from ratelimit.core.algorithm import Configuration, decode
from ratelimit.core.commands import Terms, terms_of
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.limits import Limits
from ratelimit.engine.cancelled_waits import CancelledWaits
from ratelimit.engine.coalescing.tasks import TaskCoalescing
from ratelimit.engine.coalescing.threads import ThreadCoalescing
from ratelimit.engine.express import Express
from ratelimit.engine.face import Face
from ratelimit.engine.fallback import Fallback
from ratelimit.engine.in_process import InProcess
from ratelimit.engine.last_seen import LastSeen
from ratelimit.engine.local_buckets import LocalBuckets
from ratelimit.engine.local_decisions import LocalDecisions
from ratelimit.engine.observing import Listener, observing
from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.outage_log import OutageLog
from ratelimit.engine.proxy import BucketProxy, asking_in_process, asking_in_steps, asking_together
from ratelimit.engine.question import Layer, Part, Question, Target, errors_named
from ratelimit.engine.several import Several
from ratelimit.engine.several.parts import Manner, terms_of_key
from ratelimit.engine.shield import shielding
from ratelimit.engine.store_requests import Tuning, now_of, requests_to
from ratelimit.engine.swapping import Swapping
from ratelimit.errors import RateLimitError
from ratelimit.keys import Key
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import Clock, MonotonicSleep, steady_clock
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import AsyncStore, Store, UpdatingStore

_logger = logging.getLogger("ratelimit")

AsyncLimitsOfKey: TypeAlias = Callable[[Any], Limits | Awaitable[Limits | None] | None]
"""Returns the limits of a key, or None for a key that is not limited; in asyncio code it may be ``async``."""


class _Layers(NamedTuple):
    """The layers for one policy and one optimization.

    :param layer: the outermost layer.
    :param shielded: the outermost layer for waits in sync code; in asyncio it is ``layer``.
    :param asking: makes the function that answers the commands about a bucket.
    """

    layer: Layer
    shielded: Layer
    asking: Callable[[BucketProxy], Any]


class Pipeline:
    """What the buckets of a manager have in common.

    :param clock: the clock that buckets go by; None: the store's.
    :param on_error: the policy of buckets that have none of their own.
    :param optimization: the optimization of buckets that have none of their own; None: every decision asks the store.
    :param described: the manager, as logs name it.
    :param coalesces: whether questions that want the same bucket at the same time go together.
    :param timeout: how long a question that the manager itself asks may take, in seconds.
    :ivar own_deadline: returns the deadline of a question that the manager itself asks, also after it was closed.
    :ivar begin: returns the time at which a question begins, by the clock of deadlines; it raises once the manager is
        closed.
    :ivar sleep: waits for a number of nanoseconds by the clock of the buckets.
    :ivar monotonic: the clock of deadlines, in seconds.
    :ivar coalescing: lets one question at a time through for each bucket; None where questions do not go together.
    """

    def __init__(
        self,
        store: Store | AsyncStore,
        face: Face,
        *,
        clock: Clock | None,
        on_error: ErrorPolicy,
        listener: Listener | None,
        optimization: Optimization | None,
        described: str,
        tuning: Tuning,
        memory_limit_bytes: int,
        coalesces: bool,
        timeout: float,
    ) -> None:
        self.store = store
        self.face = face
        self.clock = clock
        self.coalesces = coalesces
        self.listener = listener
        self.monotonic = face.monotonic
        # This is not a method, because layers that referred to the pipeline would keep a dropped manager, and its
        # connections, alive.
        self.own_deadline = partial(_own_deadline, self.monotonic, timeout)
        sleeper = MonotonicSleep() if clock is None else clock
        self.sleep: Callable[[int], Any] = sleeper.asleep if face.asynchronous else sleeper.sleep
        now_of_clock = None if clock is None else now_of(clock)
        self.last_seen = LastSeen(memory_limit_bytes)
        self.requests = requests_to(store, clock, face, self.last_seen, tuning)
        self.cancelled_waits = CancelledWaits()
        self.coalescing: ThreadCoalescing | TaskCoalescing | None = None
        self._asking: Callable[[BucketProxy], Any] = asking_in_steps
        self._in_process: InProcess | None = None
        self._innermost = self._decider(store, now_of_clock, coalesces=coalesces)
        self.local_decisions = LocalDecisions(self._innermost, self.requests.now, self.own_deadline, memory_limit_bytes)
        # Local buckets need a time while the store does not answer, and the host's wall clock may jump.
        steady = steady_clock()
        self.local_buckets = LocalBuckets(now_of_clock or (lambda _: steady()), memory_limit_bytes)
        self.fallback = Fallback(
            self._beneath(optimization),
            self.local_buckets,
            OutageLog(described, self.monotonic),
            deadline=self.own_deadline,
            spawn=face.spawn,
            monotonic=self.monotonic,
        )
        self._on_error = on_error
        self._optimization = optimization
        self._layers = self._composed(on_error, optimization)
        self.begin = self.monotonic

    def _decider(self, store: Any, now_of_clock: Callable[[bytes], int] | None, *, coalesces: bool) -> Layer:
        """Return the innermost layers as one, and set how a bucket asks them where there is no other layer."""
        if isinstance(store, UpdatingStore):
            self._in_process = InProcess(store, now_of_clock)
            if not self.face.asynchronous:
                self._asking = partial(asking_in_process, self._in_process)
            return self._in_process.decide
        swapping = Swapping(self.requests)
        if not coalesces:
            return swapping.decide
        express = Express(swapping, self.requests)
        if self.face.asynchronous:
            self.coalescing = TaskCoalescing(express, self.monotonic)
        else:
            self.coalescing = ThreadCoalescing(express.decide, self.monotonic)
        self._asking = partial(asking_together, self.coalescing)
        return self.coalescing.decide

    def _beneath(self, optimization: Optimization | None) -> Layer:
        return self._innermost if optimization is None else self.local_decisions.layer(optimization)

    def _composed(self, on_error: ErrorPolicy, optimization: Optimization | None) -> _Layers:
        beneath = self._beneath(optimization)
        layer = self._around(beneath, on_error)
        shielded = layer if self.face.asynchronous else self._around(shielding(beneath, self.monotonic), on_error)
        return _Layers(layer, shielded, self._asking if layer is self._innermost else asking_in_steps)

    def _around(self, layer: Layer, on_error: ErrorPolicy) -> Layer:
        if on_error != OnError.RAISE:
            layer = self.fallback.layer(layer, on_error)
        # The listener stands outside on_error, because it reports those answers too.
        if self.listener is not None:
            layer = observing(layer, self.listener, self.monotonic, asynchronous=self.face.asynchronous)
        return layer

    def bucket(
        self,
        target: Target,
        limits: Configuration | AsyncLimitsOfKey,
        *,
        version: int | None,
        inheritance: TokensInheritance,
        timeout: float,
        on_error: ErrorPolicy | None = None,
        optimization: Optimization | None = None,
    ) -> BucketProxy:
        """Return a bucket with its layers.

        :param limits: the configuration, or a callable that is asked for it, by the key, at every verb.
        :param on_error: the policy of this bucket; None: that of the pipeline.
        :param optimization: the optimization of this bucket; None: that of the pipeline.
        """
        layers = self._layers
        if on_error is not None or optimization is not None:
            layers = self._composed(
                self._on_error if on_error is None else on_error,
                self._optimization if optimization is None else optimization,
            )
        layer, shielded, asking = layers
        manner = Manner(
            self._on_error if on_error is None else on_error,
            self._optimization if optimization is None else optimization,
            partial(terms_of_key, limits, version, inheritance) if callable(limits) else None,
        )
        terms: Terms | None = None
        if manner.find_terms is not None:
            look_up = partial(looking_up, find=manner.find_terms, monotonic=self.monotonic)
            layer, shielded, asking = look_up(layer), look_up(shielded), asking_in_steps
        else:
            terms = terms_of(limits, version, inheritance)
        return BucketProxy(self, target, terms, timeout, layer, shielded, asking, manner)

    @cached_property
    def several(self) -> Several:
        """What decides about several buckets, the last of which is of this pipeline."""
        return Several(self)

    def deadline(self, seconds: float) -> float:
        """Return the deadline of a question that begins now.

        :raises RateLimitError: once the manager is closed.
        """
        fork_safety.check()
        return self.begin() + seconds

    def close(self) -> None:
        """Refuse every question that begins from now on; those that are under way go on.

        The function that every question begins with is replaced by one that raises. So no question has to check
        whether the manager is closed.
        """
        self.begin = _closed
        if self._in_process is not None:
            self._in_process.check = _closed

    def settled(self) -> Steps[None]:
        """Report to the store all tokens that were handed out without asking it."""
        fork_safety.check()
        try:
            yield from self.local_decisions.sync_all()
        finally:
            try:
                yield from self.fallback.charge_all()
            except RateLimitError as error:
                _logger.warning("what was consumed without the store could not be charged to it: %s", error)

    def remove(self, target: Target, timeout: float) -> Steps[None]:
        """Forget a bucket, in the store and in this process."""
        deadline = self.deadline(timeout)
        with errors_named(target.key):
            yield self.requests.delete(target.stored_key, deadline=deadline)
        for known in (self.last_seen, self.cancelled_waits, self.local_decisions, self.local_buckets):
            known.forget(target.stored_key)

    def stored_configuration(self, target: Target, timeout: float) -> Steps[Configuration | None]:
        """Return the configuration that is stored with a bucket; None where there is no bucket."""
        deadline = self.deadline(timeout)
        with errors_named(target.key):
            state = yield self.requests.get(target.stored_key, deadline=deadline)
        return None if state is None else decode(state, target.key).configuration


def looking_up(inner: Layer, *, find: Callable[[Key], Steps[Terms | None]], monotonic: Callable[[], float]) -> Layer:
    """Return the layer that looks up the terms of a key; a key without limits is answered without the store."""

    def decide(question: Question) -> Steps[Any]:
        ((target, _, command),) = question.parts
        begun = monotonic()
        terms = yield from find(target.key)
        if terms is None:
            return command.answer_without_limit()
        deadline = question.deadline
        if deadline is not None:
            # The lookup is the caller's own code, so that its time does not count.
            deadline += monotonic() - begun
        return (yield from inner(question._replace(parts=(Part(target, terms, command),), deadline=deadline)))

    return decide


def _own_deadline(monotonic: Callable[[], float], timeout: float, seconds: float | None = None) -> float:
    fork_safety.check()
    return monotonic() + (timeout if seconds is None else seconds)


def _closed() -> float:
    # This is not a StoreError, because ``on_error`` would turn that into an answer. The program is wrong, not the
    # store.
    raise RateLimitError(
        "the manager is closed, and so are its buckets; make another manager, or close this one after its last call"
    )
