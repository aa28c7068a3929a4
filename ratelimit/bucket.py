"""Buckets as callers hold them: a line for each verb, sync and asyncio, plain and verbose."""

from __future__ import annotations

from typing import Final

from ratelimit.checks import token_count
from ratelimit.core.commands import (
    AddTokens,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    Reserve,
    Reserved,
    Reset,
    Verbose,
)
from ratelimit.core.numbers import MAX, Duration
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, Snapshot, VerboseResult
from ratelimit.core.token_bucket.bandwidth import Limits
from ratelimit.core.token_bucket.inheritance import TokensInheritance
from ratelimit.engine.handle import Handle, hold_back, replacement, try_consume, try_consume_and_return_remaining
from ratelimit.keys import Key, shown
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run

_ADVICE: Final = "pickle its key, and ask a manager for the bucket again"


class Bucket(OfThisProcess):
    """One bucket, for sync code; made by :meth:`ProxyManager.bucket`. Cheap: nothing is sent before the first verb.

    Every verb has a ``timeout``, a ``timedelta`` or seconds above 0: by then it has answered or raised an error. When
    none is given, it is that of the bucket or the manager; of ``consume`` too, whose own is about waiting for tokens.

    Verbs raise ``InvalidArgumentError`` for a number of tokens that is no ``int`` of 1 or more, ``StoreError`` or one
    of its kinds for trouble with the store, ``ContentionError``, and ``CorruptStateError`` for foreign bytes under the
    key.
    """

    __slots__ = ("_handle",)

    _advice = _ADVICE

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def key(self) -> Key:
        """The key, as it was given."""
        return self._handle.target.key

    def __repr__(self) -> str:
        return f"Bucket({shown(self.key)})"

    @property
    def verbose(self) -> VerboseBucket:
        """The same verbs, answering with the bucket after them."""
        return VerboseBucket(self._handle)

    def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """Consume the tokens if all of them are there; whether they were."""
        return self._handle.answer(try_consume(tokens), timeout)

    def try_consume_and_return_remaining(self, tokens: int = 1, *, timeout: Duration | None = None) -> ConsumptionProbe:
        """Consume the tokens if all of them are there; with what is left, and how long to wait."""
        return self._handle.answer(try_consume_and_return_remaining(tokens), timeout)

    def try_consume_as_much_as_possible(self, limit: int | None = None, *, timeout: Duration | None = None) -> int:
        """Consume what is there, at most ``limit``; how many tokens that was."""
        return self._handle.answer(ConsumeAsMuchAsPossible(_limit(limit)), timeout)

    def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> int:
        """Consume the tokens, in debt if need be; nanoseconds until they would have been there.

        :raises ReservationOverflowError: where the debt does not fit into 64 bits.
        """
        return run(self._handle.penalty(ConsumeIgnoringRateLimits(token_count(tokens)), timeout))

    def consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """Wait for the tokens: take them on credit, then sleep until they are there. First reserved, first served.

        :param timeout: the longest wait, a ``timedelta`` or seconds, above 0. Where the tokens would take longer the
            answer is False at once, and nothing is taken.
        :raises ReservationOverflowError: without a timeout, where the wait would never end.

        A wait that is interrupted gives its tokens back, unless others wait behind it: they keep their times.
        """
        return self._handle.shielded(self._handle.consume, tokens, timeout)

    def estimate_ability_to_consume(self, tokens: int, *, timeout: Duration | None = None) -> EstimationProbe:
        """Whether the tokens could be consumed now, and how long to wait for them."""
        return self._handle.answer(EstimateAbilityToConsume(token_count(tokens)), timeout)

    def available_tokens(self, *, timeout: Duration | None = None) -> int:
        """The tokens that are there now; negative in debt."""
        return self._handle.answer(GetAvailableTokens(), timeout)

    def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """Put tokens in, up to the capacity."""
        self._handle.answer(AddTokens(token_count(tokens)), timeout)

    def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """Put tokens in, above the capacity if need be."""
        self._handle.answer(ForceAddTokens(token_count(tokens)), timeout)

    def give_back(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """Undo a consumption of which nothing has come: the tokens are there again, up to the capacity.

        They are there for newcomers at once, also where others wait who were given times before. By as many tokens more
        may then be admitted than the limits allow.
        """
        self._handle.answer(GiveBack(token_count(tokens)), timeout)

    def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> None:
        """Let nobody have a token before this long from now; a wait that is longer already stays as it is.

        For a fleet that has been told to come later: however many say it, it is done once. Tokens are taken for it, in
        debt if need be, and come back one by one or by the period, as the limits say. They do not count as consumed.
        Who has reserved tokens before is not held, and who puts tokens in, or gives them back, ends it sooner.

        :param duration: a ``timedelta`` or seconds, above 0.
        """
        self._handle.answer(hold_back(duration), timeout)

    def reset(self, *, timeout: Duration | None = None) -> None:
        """Fill the bucket to its capacity; a debt is forgotten."""
        self._handle.answer(Reset(), timeout)

    def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """Put other limits in the place of the stored ones; see :class:`TokensInheritance` for the tokens."""
        self._handle.answer(replacement(configuration, inheritance), timeout)

    def sync(self) -> None:
        """Tell the store what was handed out without asking it, and learn what it holds; see :class:`Optimization`.

        Without an optimization there is nothing to tell, and nothing is sent.
        """
        run(self._handle.sync())

    def snapshot(self, *, timeout: Duration | None = None) -> Snapshot:
        """The state of the bucket now.

        :raises BucketNotFoundError: for a key that is not limited.
        """
        return run(self._handle.snapshot(timeout))


class VerboseBucket(OfThisProcess):
    """The verbs of a :class:`Bucket`, each answering with the bucket right after it as well."""

    __slots__ = ("_handle",)

    _advice = _ADVICE

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> VerboseResult[bool]:
        """See :meth:`Bucket.try_consume`."""
        return self._handle.answer(Verbose(try_consume(tokens)), timeout)

    def try_consume_and_return_remaining(
        self, tokens: int = 1, *, timeout: Duration | None = None
    ) -> VerboseResult[ConsumptionProbe]:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return self._handle.answer(Verbose(try_consume_and_return_remaining(tokens)), timeout)

    def try_consume_as_much_as_possible(
        self, limit: int | None = None, *, timeout: Duration | None = None
    ) -> VerboseResult[int]:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return self._handle.answer(Verbose(ConsumeAsMuchAsPossible(_limit(limit))), timeout)

    def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return run(self._handle.penalty(Verbose(ConsumeIgnoringRateLimits(token_count(tokens))), timeout))

    def consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> VerboseResult[bool]:
        """See :meth:`Bucket.consume`."""
        return self._handle.shielded(self._handle.consume_verbosely, tokens, timeout)

    def estimate_ability_to_consume(
        self, tokens: int, *, timeout: Duration | None = None
    ) -> VerboseResult[EstimationProbe]:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return self._handle.answer(Verbose(EstimateAbilityToConsume(token_count(tokens))), timeout)

    def available_tokens(self, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.available_tokens`."""
        return self._handle.answer(Verbose(GetAvailableTokens()), timeout)

    def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.add_tokens`."""
        return self._handle.answer(Verbose(AddTokens(token_count(tokens))), timeout)

    def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.force_add_tokens`."""
        return self._handle.answer(Verbose(ForceAddTokens(token_count(tokens))), timeout)

    def give_back(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.give_back`."""
        return self._handle.answer(Verbose(GiveBack(token_count(tokens))), timeout)

    def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.hold_back`."""
        return self._handle.answer(Verbose(hold_back(duration)), timeout)

    def reset(self, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.reset`."""
        return self._handle.answer(Verbose(Reset()), timeout)

    def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> VerboseResult[None]:
        """See :meth:`Bucket.replace_configuration`."""
        return self._handle.answer(Verbose(replacement(configuration, inheritance)), timeout)

    def snapshot(self, *, timeout: Duration | None = None) -> VerboseResult[Snapshot]:
        """See :meth:`Bucket.snapshot`."""
        return run(self._handle.snapshot_verbosely(timeout))


class AsyncBucket(OfThisProcess):
    """One bucket, for asyncio; made by :meth:`AsyncProxyManager.bucket`. As :class:`Bucket`, awaited."""

    __slots__ = ("_handle",)

    _advice = _ADVICE

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def key(self) -> Key:
        """The key, as it was given."""
        return self._handle.target.key

    def __repr__(self) -> str:
        return f"AsyncBucket({shown(self.key)})"

    @property
    def verbose(self) -> AsyncVerboseBucket:
        """The same verbs, answering with the bucket after them."""
        return AsyncVerboseBucket(self._handle)

    async def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`Bucket.try_consume`."""
        return await self._handle.awaited(try_consume(tokens), timeout)

    async def try_consume_and_return_remaining(
        self, tokens: int = 1, *, timeout: Duration | None = None
    ) -> ConsumptionProbe:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return await self._handle.awaited(try_consume_and_return_remaining(tokens), timeout)

    async def try_consume_as_much_as_possible(
        self, limit: int | None = None, *, timeout: Duration | None = None
    ) -> int:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return await self._handle.awaited(ConsumeAsMuchAsPossible(_limit(limit)), timeout)

    async def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return await arun(self._handle.penalty(ConsumeIgnoringRateLimits(token_count(tokens)), timeout))

    async def consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`Bucket.consume`."""
        return await arun(self._handle.consume(tokens, timeout))

    async def estimate_ability_to_consume(self, tokens: int, *, timeout: Duration | None = None) -> EstimationProbe:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return await self._handle.awaited(EstimateAbilityToConsume(token_count(tokens)), timeout)

    async def available_tokens(self, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.available_tokens`."""
        return await self._handle.awaited(GetAvailableTokens(), timeout)

    async def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.add_tokens`."""
        await self._handle.awaited(AddTokens(token_count(tokens)), timeout)

    async def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.force_add_tokens`."""
        await self._handle.awaited(ForceAddTokens(token_count(tokens)), timeout)

    async def give_back(self, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.give_back`."""
        await self._handle.awaited(GiveBack(token_count(tokens)), timeout)

    async def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.hold_back`."""
        await self._handle.awaited(hold_back(duration), timeout)

    async def reset(self, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.reset`."""
        await self._handle.awaited(Reset(), timeout)

    async def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """See :meth:`Bucket.replace_configuration`."""
        await self._handle.awaited(replacement(configuration, inheritance), timeout)

    async def sync(self) -> None:
        """See :meth:`Bucket.sync`."""
        await arun(self._handle.sync())

    async def snapshot(self, *, timeout: Duration | None = None) -> Snapshot:
        """See :meth:`Bucket.snapshot`."""
        return await arun(self._handle.snapshot(timeout))


class AsyncVerboseBucket(OfThisProcess):
    """The verbs of an :class:`AsyncBucket`, each answering with the bucket right after it as well."""

    __slots__ = ("_handle",)

    _advice = _ADVICE

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def try_consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> VerboseResult[bool]:
        """See :meth:`Bucket.try_consume`."""
        return await self._handle.awaited(Verbose(try_consume(tokens)), timeout)

    async def try_consume_and_return_remaining(
        self, tokens: int = 1, *, timeout: Duration | None = None
    ) -> VerboseResult[ConsumptionProbe]:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return await self._handle.awaited(Verbose(try_consume_and_return_remaining(tokens)), timeout)

    async def try_consume_as_much_as_possible(
        self, limit: int | None = None, *, timeout: Duration | None = None
    ) -> VerboseResult[int]:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return await self._handle.awaited(Verbose(ConsumeAsMuchAsPossible(_limit(limit))), timeout)

    async def consume_ignoring_rate_limits(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return await arun(self._handle.penalty(Verbose(ConsumeIgnoringRateLimits(token_count(tokens))), timeout))

    async def consume(self, tokens: int = 1, *, timeout: Duration | None = None) -> VerboseResult[bool]:
        """See :meth:`Bucket.consume`."""
        return await arun(self._handle.consume_verbosely(tokens, timeout))

    async def estimate_ability_to_consume(
        self, tokens: int, *, timeout: Duration | None = None
    ) -> VerboseResult[EstimationProbe]:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return await self._handle.awaited(Verbose(EstimateAbilityToConsume(token_count(tokens))), timeout)

    async def available_tokens(self, *, timeout: Duration | None = None) -> VerboseResult[int]:
        """See :meth:`Bucket.available_tokens`."""
        return await self._handle.awaited(Verbose(GetAvailableTokens()), timeout)

    async def add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.add_tokens`."""
        return await self._handle.awaited(Verbose(AddTokens(token_count(tokens))), timeout)

    async def force_add_tokens(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.force_add_tokens`."""
        return await self._handle.awaited(Verbose(ForceAddTokens(token_count(tokens))), timeout)

    async def give_back(self, tokens: int, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.give_back`."""
        return await self._handle.awaited(Verbose(GiveBack(token_count(tokens))), timeout)

    async def hold_back(self, duration: Duration, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.hold_back`."""
        return await self._handle.awaited(Verbose(hold_back(duration)), timeout)

    async def reset(self, *, timeout: Duration | None = None) -> VerboseResult[None]:
        """See :meth:`Bucket.reset`."""
        return await self._handle.awaited(Verbose(Reset()), timeout)

    async def replace_configuration(
        self, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> VerboseResult[None]:
        """See :meth:`Bucket.replace_configuration`."""
        return await self._handle.awaited(Verbose(replacement(configuration, inheritance)), timeout)

    async def snapshot(self, *, timeout: Duration | None = None) -> VerboseResult[Snapshot]:
        """See :meth:`Bucket.snapshot`."""
        return await arun(self._handle.snapshot_verbosely(timeout))


def _limit(limit: int | None) -> int:
    return MAX if limit is None else token_count(limit, "limit")


def reserving(bucket: Bucket | AsyncBucket, tokens: int, longest_wait: int) -> Steps[VerboseResult[Reserved]]:
    """Take tokens on credit without waiting for them, for callers that wait in a way of their own.

    :param longest_wait: in nanoseconds; where the tokens would take longer, nothing is taken.
    """
    handle = bucket._handle  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # this module is a bucket's own
    return handle.run(Verbose(Reserve(tokens, longest_wait)), handle.call())
