"""Reservations of either face under one notation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from ratelimit import AsyncCombinedReservation, AsyncReservation, CombinedReservation, Reservation
from tests.support.both_faces import Settled, settled

AnyReservation = Reservation | AsyncReservation | CombinedReservation | AsyncCombinedReservation


@asynccontextmanager
async def entered(reservation: AnyReservation) -> AsyncGenerator[Settled]:
    """Run the block of a reservation; its methods are all awaited."""
    if isinstance(reservation, AsyncReservation | AsyncCombinedReservation):
        async with reservation:
            yield Settled(reservation)
    else:
        with reservation:
            yield Settled(reservation)


async def _reserve_and_settle(manager: Any, key: str) -> None:
    async with entered(manager.reserve(key, 2)) as reservation:
        await reservation.settle(1)


def reserve_and_settle(manager: Any, key: str) -> Any:
    """Reserve two tokens, and settle one; for asyncio, return an awaitable."""
    reservation = manager.reserve(key, 2)
    if isinstance(reservation, AsyncReservation):
        return _reserve_and_settle(manager, key)
    with reservation:
        reservation.settle(1)
    return None


async def consumed(manager: Any, key: str = "key") -> int:
    """Return the tokens that the bucket has counted as consumed."""
    snapshot = await settled(manager.snapshot(key))
    counted: int = snapshot.consumed_tokens
    return counted
