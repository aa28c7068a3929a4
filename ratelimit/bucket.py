"""Buckets as callers hold them: a line for each verb, sync and asyncio, plain and verbose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache, partial
from typing import Any, Final

from ratelimit.checks import duration_nanos, max_wait_nanos, timeout_seconds, token_count, whole_number
from ratelimit.core.commands import (
    AddTokens,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    HoldBack,
    PeriodicTerms,
    ReplaceConfiguration,
    Reserve,
    Reserved,
    Reset,
    Settle,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.limits import Limits, configuration_of
from ratelimit.core.numbers import MAX, NEVER, Duration
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, Snapshot, VerboseResult
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.reserving import Taken, settling, take, taking
from ratelimit.errors import InvalidArgumentError
from ratelimit.keys import Key, brief, shown
from ratelimit.reservation import AsyncReservation, Charge, RefundOn, Reservation
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run
from ratelimit.settings import checked_inheritance

_ADVICE: Final = "pickle its key, and ask a manager for the bucket again"


class _OfBucket(OfThisProcess):
    """What the four classes below share: the proxy that their verbs ask, and the key."""

    __slots__ = ("_proxy",)

    _advice = _ADVICE

    def __init__(self, proxy: BucketProxy) -> None:
        self._proxy = proxy

    @property
    def key(self) -> Key:
        """The key, as it was given."""
        return self._proxy.target.key

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.key)})"


class Bucket(_OfBucket):
    """A bucket, for sync code; :meth:`ProxyManager.bucket` makes it. Nothing is sent before the first verb.

    Every verb but :meth:`sync` has a ``timeout``, a ``timedelta`` or seconds above 0: by then it has answered or raised
    an error. It defaults to that of the bucket or the manager. The time that :meth:`consume` waits for tokens is not in
    it; ``max_wait`` bounds that.

    Verbs raise ``InvalidArgumentError`` for a number of tokens that is not an ``int`` of 1 or more, ``StoreError`` or
    one of its kinds for trouble with the store, ``ContentionError``, and ``CorruptStateError`` for foreign bytes under
    the key.
    """

    __slots__ = ()

    @property
    def verbose(self) -> VerboseBucket:
        """The verbs of this bucket, each of which also shows the bucket right after it."""
        return VerboseBucket(self._proxy)

    def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """Consume the tokens if all of them are there, and return whether they were."""
        return self._proxy.ask(_try_consume(tokens), timeout)

    def try_consume_and_return_remaining(self, tokens: int = 1, *, timeout: Duration | None = None) -> ConsumptionProbe:
        """Consume the tokens if all of them are there, and return what is left and how long to wait."""
        return self._proxy.ask(_try_consume_and_return_remaining(tokens), timeout)

    def try_consume_as_much_as_possible(self, limit: int | None = None, *, timeout: Duration | None = None) -> int:
        """Consume what is there, at most ``limit``, and return how many tokens that was."""
        return self._proxy.ask(ConsumeAsMuchAsPossible(_limit(limit)), timeout)

    def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> int:
        """Consume the tokens, in debt if need be, and return the nanoseconds until they would have been there.

        :raises ReservationOverflowError: where the debt does not fit into 64 bits.
        """
        return run(self._proxy.consume_into_debt(ConsumeIgnoringRateLimits(token_count(tokens)), timeout))

    def consume(self, tokens: int = 1, *, max_wait: Duration | None = None, timeout: Duration | None = None) -> bool:
        """Wait for the tokens: take them on credit, then sleep until they are there. First reserved, first served.

        A wait that is interrupted gives its tokens back, unless other callers wait behind it: they keep their times.

        :param max_wait: the longest wait that is accepted, a ``timedelta`` or seconds, 0 or more; None: as long as it
            takes. Where the tokens would take longer the answer is False at once, and nothing is taken.
        :raises ReservationOverflowError: without a longest wait, where the wait would never end.
        """
        return self._proxy.under_shield(self._proxy.consume, tokens, max_wait, timeout)

    def reserve(
        self,
        tokens: int,
        *,
        max_wait: Duration | None = 0,
        refund_on: RefundOn = (),
        timeout: Duration | None = None,
    ) -> Reservation:
        """Charge an estimate before some work, and settle what was used after it.

        ::

            with bucket.reserve(2_000) as reservation:
                answer = call_the_model(question)
                reservation.settle(answer.usage.total_tokens)

        Nothing is sent before the block is entered: that raises :class:`RateLimitExceeded` where the tokens are
        refused.

        :param tokens: the estimate. More than the bucket can hold is cut to that; the rest is settled as debt.
        :param max_wait: the longest wait for the tokens that is accepted, as for :meth:`consume`; 0: no wait.
        :param refund_on: exceptions that give all tokens back when they leave the block, because no work was done: a
            class or a tuple of them.
        :param timeout: of the request that takes the tokens, and of the one that settles them.
        """
        return Reservation(_taking(self._proxy, tokens, max_wait, timeout), refund_on)

    def estimate_ability_to_consume(self, tokens: int, *, timeout: Duration | None = None) -> EstimationProbe:
        """Return whether the tokens could be consumed now, and how long to wait for them; consume nothing."""
        return self._proxy.ask(EstimateAbilityToConsume(token_count(tokens)), timeout)

    def available_tokens(self, *, timeout: Duration | None = None) -> int:
        """Return the tokens that are there now; negative in debt."""
        return self._proxy.ask(GetAvailableTokens(), timeout)

    def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """Put tokens in, up to the capacity."""
        self._proxy.ask(AddTokens(token_count(tokens)), timeout)

    def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """Put tokens in, above the capacity if need be."""
        self._proxy.ask(ForceAddTokens(token_count(tokens)), timeout)

    def give_back(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """Undo a consumption that was of no use: the tokens are there again, up to the capacity.

        New callers can take them at once, even while earlier callers still wait for theirs. Up to this many tokens more
        than the limits allow may then be admitted.
        """
        self._proxy.ask(GiveBack(token_count(tokens)), timeout)

    def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> None:
        """Let nobody take a token until this much time has passed; if the wait for one is longer already, do nothing.

        It is for clients in many processes whose server has asked them to come later. If several of them call it, the
        bucket is held back once. To that end tokens are taken, in debt if need be. They come back as the limits say,
        and do not count as consumed. Callers that have reserved tokens before are not held back. A caller that puts
        tokens in, or gives them back, makes the time shorter.

        :param duration: a ``timedelta`` or seconds, above 0.
        """
        self._proxy.ask(_hold_back(duration), timeout)

    def reset(self, *, timeout: Duration | None = None) -> None:
        """Fill the bucket to its capacity; a debt is forgotten."""
        self._proxy.ask(Reset(), timeout)

    def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """Replace the stored limits; see :class:`TokensInheritance` for how the tokens pass to the new ones."""
        self._proxy.ask(_replacement(self._proxy, configuration, inheritance), timeout)

    def sync(self) -> None:
        """Report to the store what was handed out without asking it, and learn its state; see :class:`Optimization`.

        Without an optimization nothing is sent.
        """
        run(self._proxy.sync())

    def snapshot(self, *, timeout: Duration | None = None) -> Snapshot:
        """Return the state of the bucket now.

        :raises BucketNotFoundError: for a key that is not limited.
        """
        return run(self._proxy.snapshot(timeout))


class VerboseBucket(_OfBucket):
    """The verbs of a :class:`Bucket`, each of which also shows the bucket right after it."""

    __slots__ = ()

    def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> VerboseResult[bool]:
        """See :meth:`Bucket.try_consume`."""
        return self._proxy.ask(Verbose(_try_consume(tokens)), timeout)

    def try_consume_and_return_remaining(
        self, tokens: int = 1, *, timeout: Duration | None = None
    ) -> VerboseResult[ConsumptionProbe]:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return self._proxy.ask(Verbose(_try_consume_and_return_remaining(tokens)), timeout)

    def try_consume_as_much_as_possible(
        self, limit: int | None = None, *, timeout: Duration | None = None
    ) -> VerboseResult[int]:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return self._proxy.ask(Verbose(ConsumeAsMuchAsPossible(_limit(limit))), timeout)

    def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return run(self._proxy.consume_into_debt(Verbose(ConsumeIgnoringRateLimits(token_count(tokens))), timeout))

    def consume(
        self, tokens: int = 1, *, max_wait: Duration | None = None, timeout: Duration | None = None
    ) -> VerboseResult[bool]:
        """See :meth:`Bucket.consume`."""
        return self._proxy.under_shield(self._proxy.consume_verbosely, tokens, max_wait, timeout)

    def estimate_ability_to_consume(
        self, tokens: int, *, timeout: Duration | None = None
    ) -> VerboseResult[EstimationProbe]:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return self._proxy.ask(Verbose(EstimateAbilityToConsume(token_count(tokens))), timeout)

    def available_tokens(self, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.available_tokens`."""
        return self._proxy.ask(Verbose(GetAvailableTokens()), timeout)

    def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.add_tokens`."""
        return self._proxy.ask(Verbose(AddTokens(token_count(tokens))), timeout)

    def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.force_add_tokens`."""
        return self._proxy.ask(Verbose(ForceAddTokens(token_count(tokens))), timeout)

    def give_back(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.give_back`."""
        return self._proxy.ask(Verbose(GiveBack(token_count(tokens))), timeout)

    def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.hold_back`."""
        return self._proxy.ask(Verbose(_hold_back(duration)), timeout)

    def reset(self, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.reset`."""
        return self._proxy.ask(Verbose(Reset()), timeout)

    def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> VerboseResult[None]:
        """See :meth:`Bucket.replace_configuration`."""
        return self._proxy.ask(Verbose(_replacement(self._proxy, configuration, inheritance)), timeout)

    def snapshot(self, *, timeout: Duration | None = None) -> VerboseResult[Snapshot]:
        """See :meth:`Bucket.snapshot`."""
        return run(self._proxy.snapshot_verbosely(timeout))


class AsyncBucket(_OfBucket):
    """A bucket, for asyncio; :meth:`AsyncProxyManager.bucket` makes it. The verbs are those of a :class:`Bucket`."""

    __slots__ = ()

    @property
    def verbose(self) -> AsyncVerboseBucket:
        """The verbs of this bucket, each of which also shows the bucket right after it."""
        return AsyncVerboseBucket(self._proxy)

    async def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`Bucket.try_consume`."""
        return await self._proxy.aask(_try_consume(tokens), timeout)

    async def try_consume_and_return_remaining(
        self, tokens: int = 1, *, timeout: Duration | None = None
    ) -> ConsumptionProbe:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return await self._proxy.aask(_try_consume_and_return_remaining(tokens), timeout)

    async def try_consume_as_much_as_possible(
        self, limit: int | None = None, *, timeout: Duration | None = None
    ) -> int:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return await self._proxy.aask(ConsumeAsMuchAsPossible(_limit(limit)), timeout)

    async def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return await arun(self._proxy.consume_into_debt(ConsumeIgnoringRateLimits(token_count(tokens)), timeout))

    async def consume(
        self, tokens: int = 1, *, max_wait: Duration | None = None, timeout: Duration | None = None
    ) -> bool:
        """See :meth:`Bucket.consume`."""
        return await arun(self._proxy.consume(tokens, max_wait, timeout))

    def reserve(
        self,
        tokens: int,
        *,
        max_wait: Duration | None = 0,
        refund_on: RefundOn = (),
        timeout: Duration | None = None,
    ) -> AsyncReservation:
        """See :meth:`Bucket.reserve`; the answer is entered by ``async with``, and is itself not awaited."""
        return AsyncReservation(_ataking(self._proxy, tokens, max_wait, timeout), refund_on)

    async def estimate_ability_to_consume(self, tokens: int, *, timeout: Duration | None = None) -> EstimationProbe:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return await self._proxy.aask(EstimateAbilityToConsume(token_count(tokens)), timeout)

    async def available_tokens(self, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.available_tokens`."""
        return await self._proxy.aask(GetAvailableTokens(), timeout)

    async def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.add_tokens`."""
        await self._proxy.aask(AddTokens(token_count(tokens)), timeout)

    async def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.force_add_tokens`."""
        await self._proxy.aask(ForceAddTokens(token_count(tokens)), timeout)

    async def give_back(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.give_back`."""
        await self._proxy.aask(GiveBack(token_count(tokens)), timeout)

    async def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.hold_back`."""
        await self._proxy.aask(_hold_back(duration), timeout)

    async def reset(self, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.reset`."""
        await self._proxy.aask(Reset(), timeout)

    async def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """See :meth:`Bucket.replace_configuration`."""
        await self._proxy.aask(_replacement(self._proxy, configuration, inheritance), timeout)

    async def sync(self) -> None:
        """See :meth:`Bucket.sync`."""
        await arun(self._proxy.sync())

    async def snapshot(self, *, timeout: Duration | None = None) -> Snapshot:
        """See :meth:`Bucket.snapshot`."""
        return await arun(self._proxy.snapshot(timeout))


class AsyncVerboseBucket(_OfBucket):
    """The verbs of an :class:`AsyncBucket`, each of which also shows the bucket right after it."""

    __slots__ = ()

    async def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> VerboseResult[bool]:
        """See :meth:`Bucket.try_consume`."""
        return await self._proxy.aask(Verbose(_try_consume(tokens)), timeout)

    async def try_consume_and_return_remaining(
        self, tokens: int = 1, *, timeout: Duration | None = None
    ) -> VerboseResult[ConsumptionProbe]:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return await self._proxy.aask(Verbose(_try_consume_and_return_remaining(tokens)), timeout)

    async def try_consume_as_much_as_possible(
        self, limit: int | None = None, *, timeout: Duration | None = None
    ) -> VerboseResult[int]:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return await self._proxy.aask(Verbose(ConsumeAsMuchAsPossible(_limit(limit))), timeout)

    async def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return await arun(
            self._proxy.consume_into_debt(Verbose(ConsumeIgnoringRateLimits(token_count(tokens))), timeout)
        )

    async def consume(
        self, tokens: int = 1, *, max_wait: Duration | None = None, timeout: Duration | None = None
    ) -> VerboseResult[bool]:
        """See :meth:`Bucket.consume`."""
        return await arun(self._proxy.consume_verbosely(tokens, max_wait, timeout))

    async def estimate_ability_to_consume(
        self, tokens: int, *, timeout: Duration | None = None
    ) -> VerboseResult[EstimationProbe]:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return await self._proxy.aask(Verbose(EstimateAbilityToConsume(token_count(tokens))), timeout)

    async def available_tokens(self, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.available_tokens`."""
        return await self._proxy.aask(Verbose(GetAvailableTokens()), timeout)

    async def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.add_tokens`."""
        return await self._proxy.aask(Verbose(AddTokens(token_count(tokens))), timeout)

    async def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.force_add_tokens`."""
        return await self._proxy.aask(Verbose(ForceAddTokens(token_count(tokens))), timeout)

    async def give_back(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.give_back`."""
        return await self._proxy.aask(Verbose(GiveBack(token_count(tokens))), timeout)

    async def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.hold_back`."""
        return await self._proxy.aask(Verbose(_hold_back(duration)), timeout)

    async def reset(self, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.reset`."""
        return await self._proxy.aask(Verbose(Reset()), timeout)

    async def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> VerboseResult[None]:
        """See :meth:`Bucket.replace_configuration`."""
        return await self._proxy.aask(Verbose(_replacement(self._proxy, configuration, inheritance)), timeout)

    async def snapshot(self, *, timeout: Duration | None = None) -> VerboseResult[Snapshot]:
        """See :meth:`Bucket.snapshot`."""
        return await arun(self._proxy.snapshot_verbosely(timeout))


def consuming(bucket: Bucket | AsyncBucket, tokens: int, max_wait: Duration | None) -> Any:
    """Wait as :meth:`Bucket.consume` does, and return a ``VerboseResult`` with the reservation, or an awaitable of it.

    :param max_wait: the longest wait that is accepted; None: as long as it takes.
    """
    proxy = bucket._proxy  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # this module is a bucket's own
    if isinstance(bucket, Bucket):
        return proxy.under_shield(proxy.consume_and_show, tokens, max_wait, None)
    return arun(proxy.consume_and_show(tokens, max_wait, None))


def settled(bucket: Bucket | AsyncBucket, reserved: int, used: int) -> Any:
    """Settle tokens that were taken before, and return a ``VerboseResult``, or an awaitable of it.

    It is None where nothing has changed.
    """
    proxy = bucket._proxy  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # this module is a bucket's own
    steps = settling(proxy, Settle(reserved, used), None)
    return run(steps) if isinstance(bucket, Bucket) else arun(steps)


def _taking(
    proxy: BucketProxy, tokens: int, max_wait: Duration | None, timeout: Duration | None
) -> Callable[[], Charge]:
    """Return what takes the tokens of a reservation in sync code."""
    arguments = _checked_reservation(tokens, max_wait, timeout)

    def charge() -> Charge:
        taken = take(proxy, *arguments)

        def settle(used: int) -> None:
            run(_settling(proxy, taken, used, timeout))

        key = proxy.target.key
        return Charge((key,), key, taken.tokens, taken.result.value, settle, partial(settle, 0))

    return charge


def _ataking(
    proxy: BucketProxy, tokens: int, max_wait: Duration | None, timeout: Duration | None
) -> Callable[[], Awaitable[Charge]]:
    """Return what takes the tokens of a reservation in asyncio."""
    arguments = _checked_reservation(tokens, max_wait, timeout)

    async def charge() -> Charge:
        taken = await arun(taking(proxy, *arguments))

        async def settle(used: int) -> None:
            await arun(_settling(proxy, taken, used, timeout))

        key = proxy.target.key
        return Charge((key,), key, taken.tokens, taken.result.value, settle, partial(settle, 0))

    return charge


def _checked_reservation(
    tokens: int, max_wait: Duration | None, timeout: Duration | None
) -> tuple[int, Duration | None, int, Duration | None]:
    longest_wait = NEVER if max_wait is None else max_wait_nanos(max_wait)
    return token_count(tokens), max_wait, longest_wait, None if timeout is None else timeout_seconds(timeout)


def _settling(proxy: BucketProxy, taken: Taken, used: int, timeout: Duration | None) -> Steps[None]:
    command = Settle(taken.tokens, whole_number(used, "tokens", least=0))
    if taken.is_charged:
        yield from settling(proxy, command, timeout, is_local=taken.is_local)


def _limit(limit: int | None) -> int:
    return MAX if limit is None else token_count(limit, "limit")


def reserving(bucket: Bucket | AsyncBucket, tokens: int, longest_wait: int) -> Steps[VerboseResult[Reserved]]:
    """Take tokens on credit without waiting for them, for callers that wait in a way of their own.

    :param longest_wait: in nanoseconds; where the tokens would take longer, nothing is taken.
    """
    proxy = bucket._proxy  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # this module is a bucket's own
    return proxy.steps(Verbose(Reserve(tokens, longest_wait)))


def _try_consume(tokens: int) -> TryConsume:
    try:
        return _kept_try_consume(tokens)
    except TypeError:
        # A value that cannot be hashed is not a number of tokens: this call raises the error.
        return TryConsume(token_count(tokens))


def _try_consume_and_return_remaining(tokens: int) -> TryConsumeAndReturnRemaining:
    try:
        return _kept_try_consume_and_return_remaining(tokens)
    except TypeError:  # as above
        return TryConsumeAndReturnRemaining(token_count(tokens))


# Equal commands are one object, so that coalesced calls carry them out as one step. The caches are typed because True
# and 1.0, which equal 1, must be refused.


@lru_cache(maxsize=1024, typed=True)
def _kept_try_consume(tokens: int) -> TryConsume:
    return TryConsume(token_count(tokens))


@lru_cache(maxsize=1024, typed=True)
def _kept_try_consume_and_return_remaining(tokens: int) -> TryConsumeAndReturnRemaining:
    return TryConsumeAndReturnRemaining(token_count(tokens))


def _hold_back(duration: Duration) -> HoldBack:
    return HoldBack(duration_nanos(duration, "duration"))


def _replacement(proxy: BucketProxy, configuration: Limits, inheritance: TokensInheritance) -> ReplaceConfiguration:
    wanted, terms = configuration_of(configuration), proxy.terms
    # Without terms, a callable gives the limits, and may give quotas.
    if getattr(wanted, "has_periods", False) and not (terms is None or isinstance(terms, PeriodicTerms)):
        raise InvalidArgumentError(
            "configuration must have no calendar quota where the limits of the bucket itself have none, because nothing"
            f" would begin the next period; got {brief(configuration)}: give the quota to the manager"
        )
    return ReplaceConfiguration(wanted, checked_inheritance(inheritance))
