"""Several buckets in one decision: each of them is charged, or none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, cast, overload

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.checks import boolean, max_wait_nanos, refusal, timeout_seconds, token_count, whole_number
from ratelimit.core.numbers import NEVER, Duration
from ratelimit.core.results import CombinedProbe, ConsumptionProbe, Snapshot, VerboseResult
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.several.buckets import SeveralBuckets
from ratelimit.engine.several.parts import hash_tag
from ratelimit.engine.several.reserving import TakenTogether, settling_together, taking_together
from ratelimit.errors import InvalidArgumentError
from ratelimit.keys import Key, brief, shown
from ratelimit.reservation import AsyncCombinedReservation, Charge, CombinedReservation, RefundOn
from ratelimit.runtime.clock import SystemClock
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run

_ADVICE: Final = "pickle its keys, and ask managers for the buckets again"

Part: TypeAlias = Bucket | tuple[Bucket, int]
"""A bucket, or a bucket and how many of its tokens one of the whole is worth."""

MOST_PARTS: Final = 16
"""The most buckets of one decision: a server is busy with them for a fraction of a millisecond."""

AsyncPart: TypeAlias = AsyncBucket | tuple[AsyncBucket, int]
"""A :data:`Part` for asyncio."""


class _AllOf(OfThisProcess):
    """What both faces share."""

    __slots__ = ("_estimates", "_several")

    _advice = _ADVICE

    def __init__(self, several: SeveralBuckets, estimates: Sequence[int | None]) -> None:
        self._several = several
        self._estimates = estimates

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of the buckets, as they were given."""
        return tuple([proxy.target.key for proxy, _ in self._several.shares])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([shown(key) for key in self.keys])})"


class AllOf(_AllOf):
    """Several buckets that are charged together or not at all, for sync code; :func:`all_of` makes it.

    Every verb has a ``timeout``, which defaults to the shortest of the buckets'. Verbs raise what those of a
    :class:`Bucket` raise.
    """

    __slots__ = ()

    def try_consume(self, *, timeout: Duration | None = None) -> bool:
        """Consume the tokens of every bucket if all of them are there, and return whether they were."""
        return run(self._several.try_consume("try_consume", timeout)).consumed

    def try_consume_and_return_remaining(self, *, timeout: Duration | None = None) -> CombinedProbe:
        """Consume the tokens of every bucket if all of them are there; return which refuse, and how long to wait."""
        return run(self._several.try_consume("try_consume_and_return_remaining", timeout))

    def consume(self, *, max_wait: Duration | None = None, timeout: Duration | None = None) -> bool:
        """Wait until the tokens of every bucket are there at once, and consume them.

        Nothing is taken while this waits: it tries, sleeps for the longest wait, and tries again. Of the callers of a
        manager that wait for the same bucket, those that came first are served first. A call that is interrupted while
        a request is in flight gives back what it has taken, as far as it knows.

        :param max_wait: the longest wait that is accepted, a ``timedelta`` or seconds, 0 or more; None: as long as it
            takes. Where the tokens would take longer the answer is False, and nothing is taken.
        :raises ReservationOverflowError: without a longest wait, where a bucket cannot hold so many tokens.
        """
        return run(self._several.consume(max_wait, timeout))

    def estimate_ability_to_consume(self, *, timeout: Duration | None = None) -> CombinedProbe:
        """Return whether all tokens could be consumed now, which buckets refuse, and how long to wait; consume none."""
        return run(self._several.estimate(timeout))

    def reserve(
        self, *, max_wait: Duration | None = 0, refund_on: RefundOn = (), timeout: Duration | None = None
    ) -> CombinedReservation:
        """Charge an estimate to every bucket before some work, or to none, and settle what was used after it.

        ::

            limit = all_of(requests.bucket(user), (tokens.bucket(user), 1_500))
            with limit.reserve() as reservation:
                answer = call_the_model(question)
                reservation.settle(answer.usage.total_tokens)

        A bucket that was given with a number of tokens has these as its estimate, and ``settle`` takes what was used of
        it. A bucket that was given without a number, such as that of the requests, stays charged. ``settle`` also takes
        one number for each bucket, as in ``settle((1, 700))``; it has to where the estimates differ. ``cancel`` gives
        everything back.

        Nothing is sent before the block is entered: that raises :class:`RateLimitExceeded` where a bucket refuses, with
        a :class:`CombinedProbe`.

        :param max_wait: the longest wait for the tokens that is accepted, as for :meth:`consume`; 0: no wait.
        :param refund_on: exceptions that give all tokens back when they leave the block, because no work was done: a
            class or a tuple of them.
        :param timeout: of the request that takes the tokens, and of the one that settles them.
        """
        return CombinedReservation(_taking(self._several, self._estimates, max_wait, timeout), refund_on)

    def give_back(self, *, timeout: Duration | None = None) -> None:
        """Undo a consumption that was of no use: every bucket has its tokens again; see :meth:`Bucket.give_back`."""
        run(self._several.give_back(timeout))

    def snapshot(self, *, timeout: Duration | None = None) -> tuple[Snapshot, ...]:
        """Return the states of the buckets at one time, in their order.

        :raises BucketNotFoundError: for a key that is not limited.
        """
        return run(self._several.snapshot(timeout))


class AsyncAllOf(_AllOf):
    """Several buckets that are charged together or not at all, for asyncio; the verbs are those of :class:`AllOf`."""

    __slots__ = ()

    async def try_consume(self, *, timeout: Duration | None = None) -> bool:
        """See :meth:`AllOf.try_consume`."""
        return (await arun(self._several.try_consume("try_consume", timeout))).consumed

    async def try_consume_and_return_remaining(self, *, timeout: Duration | None = None) -> CombinedProbe:
        """See :meth:`AllOf.try_consume_and_return_remaining`."""
        return await arun(self._several.try_consume("try_consume_and_return_remaining", timeout))

    async def consume(self, *, max_wait: Duration | None = None, timeout: Duration | None = None) -> bool:
        """See :meth:`AllOf.consume`."""
        return await arun(self._several.consume(max_wait, timeout))

    async def estimate_ability_to_consume(self, *, timeout: Duration | None = None) -> CombinedProbe:
        """See :meth:`AllOf.estimate_ability_to_consume`."""
        return await arun(self._several.estimate(timeout))

    def reserve(
        self, *, max_wait: Duration | None = 0, refund_on: RefundOn = (), timeout: Duration | None = None
    ) -> AsyncCombinedReservation:
        """See :meth:`AllOf.reserve`; the answer is entered by ``async with``, and is itself not awaited."""
        return AsyncCombinedReservation(_ataking(self._several, self._estimates, max_wait, timeout), refund_on)

    async def give_back(self, *, timeout: Duration | None = None) -> None:
        """See :meth:`AllOf.give_back`."""
        await arun(self._several.give_back(timeout))

    async def snapshot(self, *, timeout: Duration | None = None) -> tuple[Snapshot, ...]:
        """See :meth:`AllOf.snapshot`."""
        return await arun(self._several.snapshot(timeout))


@overload
def all_of(*parts: Part, spread: bool = False) -> AllOf: ...
@overload
def all_of(*parts: AsyncPart, spread: bool = False) -> AsyncAllOf: ...
def all_of(*parts: Any, spread: bool = False) -> AllOf | AsyncAllOf:
    """Return several buckets as one: each of them is charged, or none, in one round trip. Nothing is sent yet.

    ::

        limit = all_of(users.bucket("{acme}:42"), tenants.bucket("{acme}"), (tokens.bucket("{acme}"), 1_500))
        if not limit.try_consume(): ...

    In a cluster the keys must share a slot, and so need one tag in braces, such as ``{acme}`` above. The bucket that
    most calls share should come last: calls of one process that share it, or the tag, go together.

    :param parts: buckets, or pairs of a bucket and how many of its tokens one of the whole is worth. They may be of any
        managers over one store, of one face, and must have different keys in the store.
    :param spread: take the tokens from one bucket after the other, in this order, and give them back where a later one
        refuses: for keys that cannot share a slot. ``docs/several-buckets.md`` says what is guaranteed then.
    :raises InvalidArgumentError: for buckets that cannot be charged together.
    """
    boolean(spread, "spread")
    if not parts:
        raise InvalidArgumentError("parts must be one bucket or more; got none")
    shares = tuple([_share(part) for part in parts])
    proxies = [proxy for proxy, _ in shares]
    _check_that_they_differ(proxies)
    first = proxies[0].pipeline
    if any(proxy.pipeline.face is not first.face for proxy in proxies):
        raise InvalidArgumentError(
            f"parts must be buckets of sync code, or of asyncio, and not of both; got {brief(parts)}"
        )
    if not spread and (obstacle := _obstacle(proxies)) is not None:
        raise InvalidArgumentError(obstacle)
    several = SeveralBuckets(shares, spread)
    estimates = [part[1] if isinstance(part, tuple) else None for part in parts]
    return AsyncAllOf(several, estimates) if first.face.asynchronous else AllOf(several, estimates)


def _share(part: Any) -> tuple[BucketProxy, int]:
    bucket, tokens = part if isinstance(part, tuple) and len(part) == 2 else (part, 1)
    if not isinstance(bucket, Bucket | AsyncBucket):
        raise refusal("part", "a bucket, or a bucket and a number of tokens", part)
    return bucket._proxy, token_count(tokens)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # this is a bucket's own


def _taking(
    several: SeveralBuckets, estimates: Sequence[int | None], max_wait: Duration | None, timeout: Duration | None
) -> Callable[[], Charge]:
    """Return what takes the tokens of a reservation in sync code."""
    arguments = _checked_wait(max_wait), _checked_timeout(timeout)

    def charge() -> Charge:
        (longest_wait, seconds) = arguments
        taken = run(taking_together(several, longest_wait, seconds))

        def settle(used: int | Sequence[int]) -> None:
            run(settling_together(taken, _used(used, estimates), seconds))

        def cancel() -> None:
            run(settling_together(taken, [0] * len(estimates), seconds))

        return _charge(taken, settle, cancel)

    return charge


def _ataking(
    several: SeveralBuckets, estimates: Sequence[int | None], max_wait: Duration | None, timeout: Duration | None
) -> Callable[[], Awaitable[Charge]]:
    """Return what takes the tokens of a reservation in asyncio."""
    arguments = _checked_wait(max_wait), _checked_timeout(timeout)

    async def charge() -> Charge:
        (longest_wait, seconds) = arguments
        taken = await arun(taking_together(several, longest_wait, seconds))

        async def settle(used: int | Sequence[int]) -> None:
            await arun(settling_together(taken, _used(used, estimates), seconds))

        async def cancel() -> None:
            await arun(settling_together(taken, [0] * len(estimates), seconds))

        return _charge(taken, settle, cancel)

    return charge


def _charge(taken: TakenTogether, settle: Callable[[Any], Any], cancel: Callable[[], Any]) -> Charge:
    keys = [proxy.target.key for proxy, _ in taken.buckets.shares]
    return Charge(keys, taken.refused, taken.tokens, taken.probe, settle, cancel)


def _checked_wait(max_wait: Duration | None) -> int:
    return NEVER if max_wait is None else max_wait_nanos(max_wait)


def _checked_timeout(timeout: Duration | None) -> float | None:
    return None if timeout is None else timeout_seconds(timeout)


def _used(used: Any, estimates: Sequence[int | None]) -> list[int]:
    """Return what was used of each bucket.

    :param used: one number for each bucket; or one for all that have an estimate, while the others keep their token.
    :param estimates: the tokens that each bucket was given with; None: none.
    """
    if isinstance(used, Sequence) and not isinstance(used, str | bytes):
        if len(used) != len(estimates):
            raise refusal("tokens", f"one number, or one for each of the {len(estimates)} buckets", used)
        return [whole_number(each, "tokens", least=0) for each in used]
    tokens = whole_number(cast("int", used), "tokens", least=0)
    different = {estimate for estimate in estimates if estimate is not None}
    if len(different) > 1:
        raise refusal("tokens", "one number for each bucket, because their estimates differ", used)
    # Where no bucket has an estimate, each of them is worth one token of the whole.
    return [tokens if estimate is not None or not different else 1 for estimate in estimates]


def _check_that_they_differ(proxies: Sequence[BucketProxy]) -> None:
    found: set[bytes] = set()
    for proxy in proxies:
        key = proxy.target.stored_key
        if key in found:
            raise InvalidArgumentError(
                f"parts must have different keys in the store; got {shown(key)} twice; give the managers of different "
                "limits different prefixes"
            )
        found.add(key)


def charging(
    shares: Sequence[tuple[Bucket | AsyncBucket, int]], max_waits: Sequence[int | None]
) -> Steps[Sequence[VerboseResult[ConsumptionProbe]]]:
    """Charge several buckets of one manager with different keys, or none of them, and return what each of them shows.

    They are asked one after the other where they cannot go together.

    :param max_waits: for each bucket, the longest wait because of it that is accepted, in nanoseconds; None: as long as
        it takes, 0: none.
    """
    proxies = [bucket._proxy for bucket, _ in shares]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # as above
    pairs = tuple([(proxy, tokens) for proxy, (_, tokens) in zip(proxies, shares, strict=True)])
    several = SeveralBuckets(pairs, spread=_obstacle(proxies) is not None, shows=True)
    if any(longest != 0 for longest in max_waits):
        probe = yield from several.consume_in_turn([NEVER if longest is None else longest for longest in max_waits])
    else:
        probe = yield from several.try_consume("try_consume_and_return_remaining", None)
    return probe.results  # type: ignore[attr-defined, no-any-return]  # it shows them


def _obstacle(proxies: Sequence[BucketProxy]) -> str | None:
    """Return what keeps buckets from being decided about at once, and what to do; None where nothing does."""
    first = proxies[0].pipeline
    for proxy in proxies:
        pipeline = proxy.pipeline
        if pipeline.store is not first.store:
            return (
                f"parts must be buckets of managers over one store; got {brief(first.store)} and "
                f"{brief(pipeline.store)}; make the second manager over manager.store of the first, or pass spread=True"
            )
        if not _is_one_clock(pipeline.clock, first.clock):
            return f"parts must be buckets that go by one clock; got {brief(first.clock)} and {brief(pipeline.clock)}"
        if proxy.manner.optimization is not None:
            return (
                f"parts must be buckets without an optimization; got one for the key {shown(proxy.target.key)}; ask a "
                "manager without one for the bucket, or pass spread=True"
            )
    if len(proxies) > MOST_PARTS:
        return f"parts must be {MOST_PARTS} buckets at most; got {len(proxies)}"
    if proxies[-1].pipeline.several.decide is None:
        return (
            f"parts must be buckets over a store with a method swap_all(); got {brief(first.store)}; pass spread=True"
        )
    slot_of = getattr(first.store, "slot_of", None)
    return None if slot_of is None else _obstacle_of_slots([proxy.target.stored_key for proxy in proxies], slot_of)


def _is_one_clock(one: Any, other: Any) -> bool:
    return one is other or (type(one) is SystemClock and type(other) is SystemClock)


def _obstacle_of_slots(keys: Sequence[bytes], slot_of: Callable[[bytes], int]) -> str | None:
    if len({slot_of(key) for key in keys}) == 1:
        return None
    tag = next((tag for key in keys if (tag := hash_tag(key)) is not None), None)
    example = "{acme}" if tag is None else "{" + tag.decode(errors="replace") + "}"
    return (
        f"parts must have keys that share a slot of the cluster; got {', '.join([shown(key) for key in keys])}; put "
        f"the same text in braces into each of them, such as {example}, or pass spread=True"
    )
