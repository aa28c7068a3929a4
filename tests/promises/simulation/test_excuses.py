"""What the ledger excuses, in a schedule made by hand: a swap that comes late finds a bucket again as it was before.

Tokens that come by whole periods leave no reading of the clock in the state, and clocks that are coarse or behind leave
none that is a client's own. The bytes of a greedy bucket recur only where it was removed, or has expired.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from ratelimit.core.commands import Command, GetAvailableTokens, GiveBack, Terms, TryConsume
from ratelimit.core.expiration import Expiration
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.engine.face import Face
from ratelimit.engine.last_seen import LastSeen
from ratelimit.engine.question import Question, Target
from ratelimit.engine.store_requests import DEFAULT_TUNING, requests_to
from ratelimit.engine.swapping import Swapping
from ratelimit.errors import StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime.steps import Steps, run
from ratelimit.stores.memory import MemoryStore
from ratelimit.testing import ManualClock
from tests.promises.simulation.world import EPOCH, SECOND

KEY = b"key"
MINUTES = BucketConfiguration(
    Bandwidth.intervally_aligned(10, 60, first_refill=datetime.fromtimestamp(EPOCH // SECOND, UTC))
)

Swap = Callable[[], Any]


class Held:
    """A store whose requests are carried out when the test calls them."""

    def __init__(self, stored: MemoryStore) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return partial(partial, getattr(self._stored, name))


class Own(ManualClock):
    """A clock that no other writer reads alike."""

    def __init__(self, nanos: int) -> None:
        super().__init__(nanos)
        self.unique_readings = True


class Client:
    """One that reads a clock to the nanosecond, like no other."""

    def __init__(self, stored: MemoryStore, index: int) -> None:
        held: Any = Held(stored)
        face = Face(False, pause=int, spawn=run, finish=run, monotonic=float)
        requests = requests_to(held, Own(EPOCH + 1 + index), face, LastSeen(1 << 20), DEFAULT_TUNING)
        self._decide = Swapping(requests).decide

    def begin(self, command: Command[Any]) -> tuple[Steps[Any], Swap]:
        """A decision, and its first request."""
        steps = self._decide(Question.of(Target(KEY, KEY, Expiration.none()), Terms(MINUTES), command))
        waits_for = next(steps)
        while isinstance(waits_for, int):
            waits_for = steps.send(waits_for)
        return steps, waits_for

    def decide(self, command: Command[Any]) -> Any:
        """A decision that nothing disturbs."""
        steps, request = self.begin(command)
        while True:
            try:
                request = steps.send(request() if callable(request) else request)
            except StopIteration as end:
                return end.value


def end(steps: Steps[Any], reply: Any) -> Any:
    with pytest.raises(StopIteration) as ended:
        steps.send(reply)
    return ended.value.value


def late() -> StoreTimeoutError:
    return StoreTimeoutError(KEY, "late", in_doubt=True)


def consumed(stored: MemoryStore) -> int:
    state = stored.get(KEY)
    assert state is not None
    return codec.decode(state).consumed_tokens


def test_a_client_does_not_take_the_bytes_of_another_for_its_own() -> None:
    stored = MemoryStore()
    one, swap_of_one = Client(stored, 1).begin(TryConsume(1))
    other, swap_of_other = Client(stored, 2).begin(TryConsume(1))
    assert end(one, swap_of_one()) is True
    swap_of_other()  # is lost, and so is the reply that tells
    repeated = other.throw(late())
    with pytest.raises(StoreUnavailableError) as caught:
        other.send(repeated())
    assert caught.value.in_doubt
    assert consumed(stored) == 1


def test_a_late_swap_is_repeated_when_the_bytes_recur() -> None:
    stored = MemoryStore()
    client = Client(stored, 1)
    assert client.decide(TryConsume(2))
    taking, swap = client.begin(TryConsume(5))
    repeated = taking.throw(late())
    assert end(taking, repeated()) is True
    client.decide(GiveBack(5))
    assert consumed(stored) == 2
    assert swap() is None  # arrives now, and finds what it was to replace
    assert consumed(stored) == 7
    assert client.decide(GetAvailableTokens()) == 3
