"""Reservations that settle: an estimate is charged before the work, and what was used is settled after it.

These classes know when a reservation begins and ends. What takes its tokens, and what settles them, they are given.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Generic, NamedTuple, Self, TypeAlias, TypeVar

from ratelimit.checks import refusal
from ratelimit.core.results import CombinedProbe, ConsumptionProbe
from ratelimit.errors import InvalidArgumentError, RateLimitExceeded
from ratelimit.keys import Key, shown
from ratelimit.runtime.copies import OfThisProcess

Used = TypeVar("Used")
Tokens = TypeVar("Tokens")
Probe = TypeVar("Probe")

RefundOn: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
"""A class of exceptions, or a tuple of them."""

_NOT_ENTERED: Final = "a reservation must be entered first: with bucket.reserve(tokens) as reservation"

_logger = logging.getLogger("ratelimit")


class Charge(NamedTuple):
    """What was charged for a reservation, or refused.

    :param keys: those of the buckets.
    :param refused: the key that the error of a refusal names.
    :param tokens: those that were reserved; of several buckets, a tuple with those of each.
    :param probe: the answer; false where the tokens were refused, and nothing was charged.
    :param settle: is called with what was used, once; of a reservation for asyncio it returns an awaitable.
    :param cancel: is called in place of ``settle`` where nothing was used.
    """

    keys: Sequence[Key]
    refused: Key
    tokens: Any
    probe: Any
    settle: Callable[[Any], Any]
    cancel: Callable[[], Any]


class _Reservation(OfThisProcess, Generic[Tokens, Probe]):
    """What the reservations of both faces share.

    :param take: takes the tokens, and returns a :class:`Charge`; for asyncio, an awaitable of one.
    :param refund_on: exceptions that give all tokens back when they leave the block.
    """

    _advice = "pass on the numbers that you need"

    def __init__(self, take: Callable[[], Any], refund_on: RefundOn = ()) -> None:
        self._take = take
        self._refund_on = _checked_exceptions(refund_on)
        self._entered = False
        self._is_used = False
        self._charge: Charge | None = None
        self._how = "open"
        # Whoever takes this out settles the reservation: one step, at which two threads cannot both be first.
        self._open: list[None] = []
        self._handled_before: BaseException | None = None

    def __repr__(self) -> str:
        charge = self._charge
        if charge is None:
            return f"{type(self).__name__}({'refused' if self._entered else 'not entered'})"
        of = ", ".join([shown(key) for key in charge.keys])
        return f"{type(self).__name__}({charge.tokens} tokens of {of}, {self._how})"

    @property
    def tokens(self) -> Tokens:
        """The tokens that are reserved: the estimate, or as many as the bucket can hold if that is less."""
        return self._charged().tokens  # type: ignore[no-any-return]  # a charge is of either kind

    @property
    def probe(self) -> Probe:
        """The answer of the bucket when the tokens were taken."""
        return self._charged().probe  # type: ignore[no-any-return]  # as above

    def _charged(self) -> Charge:
        if self._charge is None:
            raise InvalidArgumentError(_NOT_ENTERED)
        return self._charge

    def _begin(self) -> None:
        if self._entered:
            raise InvalidArgumentError("a reservation must be entered once; make another one by reserve()")
        self._entered = True
        self._handled_before = sys.exception()

    def _admit(self, charge: Charge) -> None:
        if not charge.probe:
            raise RateLimitExceeded(charge.refused, charge.probe.retry_after, charge.probe)
        self._charge = charge
        self._open.append(None)

    def _is_refunded(self, error: BaseException | None) -> bool:
        # Where settling has failed the work was done, even if its error is one of those that refund.
        return bool(self._open) and not self._is_used and isinstance(error, self._refund_on)

    @contextmanager
    def _ending(self, how: str, leaving: BaseException | None = None) -> Generator[Charge]:
        """End the reservation, once. Where that certainly changes nothing because it fails, it may be ended again.

        :param how: what happens to the reservation: it is settled, or cancelled.
        :param leaving: the exception that leaves the block.
        """
        under_way = leaving or self._under_way()
        charge = self._charged()
        try:
            self._open.pop()
        except IndexError:
            raise InvalidArgumentError(f"a reservation must be settled or cancelled once; it is {self._how}") from None
        self._how = f"{how}, in doubt"
        try:
            yield charge
        except InvalidArgumentError:
            self._reopen()
            raise
        except Exception as error:
            if not getattr(error, "in_doubt", False):
                self._reopen()
            if under_way is None:
                raise
            # The caller must hear of that exception, and not of this error.
            _logger.warning("a reservation of %s tokens could not be %s: %s", charge.tokens, how, error)
        else:
            self._how = how

    def _reopen(self) -> None:
        self._how = "open"
        self._open.append(None)

    def _under_way(self) -> BaseException | None:
        """Return the exception that the caller handles now, if it was raised since the block was entered."""
        handled = sys.exception()
        return None if handled is self._handled_before else handled


class _OfSyncCode(_Reservation[Tokens, Probe], Generic[Used, Tokens, Probe]):
    """Reservations for sync code."""

    def settle(self, tokens: Used) -> None:
        """Charge what was used in place of the reserved tokens: the rest is given back, an excess is debt.

        :param tokens: those that were used, 0 or more. Where several buckets are reserved together: one number for
            each, or one for all that were given with the same number of tokens; see :meth:`AllOf.reserve`.
        :raises InvalidArgumentError: for another number, and for a reservation that is settled or cancelled already.
        :raises ReservationOverflowError: where the debt does not fit into 64 bits.
        """
        self._is_used = True
        with self._ending("settled") as charge:
            charge.settle(tokens)

    def cancel(self) -> None:
        """Give all tokens back: nothing was used.

        :raises InvalidArgumentError: for a reservation that is settled or cancelled already.
        """
        with self._ending("cancelled") as charge:
            charge.cancel()

    def __enter__(self) -> Self:
        self._begin()
        self._admit(self._take())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_refunded(error):
            with self._ending("cancelled", error) as charge:
                charge.cancel()


class _OfAsyncio(_Reservation[Tokens, Probe], Generic[Used, Tokens, Probe]):
    """Reservations for asyncio."""

    async def settle(self, tokens: Used) -> None:
        """See :meth:`Reservation.settle`."""
        self._is_used = True
        with self._ending("settled") as charge:
            await charge.settle(tokens)

    async def cancel(self) -> None:
        """See :meth:`Reservation.cancel`."""
        with self._ending("cancelled") as charge:
            await charge.cancel()

    async def __aenter__(self) -> Self:
        self._begin()
        self._admit(await self._take())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_refunded(error):
            with self._ending("cancelled", error) as charge:
                await charge.cancel()


class Reservation(_OfSyncCode[int, int, ConsumptionProbe]):
    """Tokens that are charged when its block begins, and settled once it is known how many were used.

    :meth:`Bucket.reserve` makes it. The block begins where the tokens were taken, and raises ``RateLimitExceeded``
    where they are refused. Left without :meth:`settle` or :meth:`cancel`, normally or by an exception, the tokens stay
    charged, because the work may have been done; they may be settled after the block as well.

    Both methods raise what any verb raises. But while an exception of the block is handled, or leaves it, their failure
    is logged, so that it never hides that exception. If an error is certain to have changed nothing, they may be called
    again.
    """


class AsyncReservation(_OfAsyncio[int, int, ConsumptionProbe]):
    """A :class:`Reservation` for asyncio: enter it by ``async with``, and await its methods."""


class CombinedReservation(_OfSyncCode[int | Sequence[int], tuple[int, ...], CombinedProbe]):
    """Tokens of several buckets that are charged, and settled, in one decision each; :meth:`AllOf.reserve` makes it.

    It is a :class:`Reservation` whose ``tokens`` has those of each bucket, and whose ``probe`` is a
    :class:`CombinedProbe`.
    """


class AsyncCombinedReservation(_OfAsyncio[int | Sequence[int], tuple[int, ...], CombinedProbe]):
    """A :class:`CombinedReservation` for asyncio: enter it by ``async with``, and await its methods."""


def _checked_exceptions(exceptions: RefundOn) -> tuple[type[BaseException], ...]:
    listed = exceptions if isinstance(exceptions, tuple) else (exceptions,)
    for each in listed:
        if not isinstance(each, type) or not issubclass(each, BaseException):
            raise refusal("refund_on", "a class of exceptions, or a tuple of them", exceptions)
    return listed
