"""When a server is left alone, and which caller tries it again; by a clock that tests move."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ratelimit import CircuitBreaker, CircuitState, InvalidConfigurationError, StoreTimeoutError, StoreUnavailableError
from ratelimit.stores.redis.circuit import Circuit

ERROR = StoreTimeoutError(b"key", "Redis did not answer in time")
BREAKER = CircuitBreaker(failures=3, shortest_pause=0.1, longest_pause=0.8)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit(BREAKER, clock)


def is_admitted(circuit: Circuit, deadline: float | None = None) -> bool:
    try:
        circuit.admit(b"key", deadline)
    except StoreUnavailableError as error:
        assert not error.in_doubt
        return False
    return True


def fail(circuit: Circuit, times: int = 1) -> None:
    for _ in range(times):
        circuit.failed(ERROR)


def end_pause(circuit: Circuit, clock: Clock) -> float:
    """Let the pause pass, and return how long it was."""
    pause = circuit.status().retry_after
    clock.now += pause - 0.001
    assert not is_admitted(circuit)
    clock.now += 0.002
    return pause


def test_it_opens_after_enough_failures_in_a_row(circuit: Circuit) -> None:
    for _ in range(3):
        fail(circuit, 2)
        assert not circuit.is_open
        circuit.succeeded()
    fail(circuit, 3)
    assert circuit.is_open
    with pytest.raises(
        StoreUnavailableError, match=r"3 times in a row .* \(last: Redis did not answer in time\)"
    ) as caught:
        circuit.admit(b"key")
    assert caught.value.key == b"key"


def test_without_a_breaker_it_never_opens(clock: Clock) -> None:
    circuit = Circuit(None, clock)
    fail(circuit, 100)
    assert not circuit.is_open
    assert is_admitted(circuit)
    assert circuit.status() == (CircuitState.CLOSED, 100, 0.0, "Redis did not answer in time")


def test_pauses_double_up_to_the_longest_and_are_shortened_by_chance(circuit: Circuit, clock: Clock) -> None:
    fail(circuit, 3)
    for longest in (0.1, 0.2, 0.4, 0.8, 0.8, 0.8):
        assert longest / 2 <= end_pause(circuit, clock) <= longest
        assert is_admitted(circuit)
        fail(circuit)
    circuit.succeeded()
    fail(circuit, 3)
    assert 0.05 <= end_pause(circuit, clock) <= 0.1


def test_pauses_differ(clock: Clock) -> None:
    pauses = set()
    for _ in range(50):
        circuit = Circuit(BREAKER, clock)
        fail(circuit, 3)
        pauses.add(circuit.status().retry_after)
    assert len(pauses) > 25


def test_failures_of_requests_that_were_on_their_way_do_not_lengthen_the_pause(circuit: Circuit) -> None:
    fail(circuit, 3)
    pause = circuit.status().retry_after
    fail(circuit, 50)
    assert circuit.status().retry_after == pause
    assert circuit.status().failures == 53


def test_after_a_pause_one_caller_at_a_time_is_let_through(circuit: Circuit, clock: Clock) -> None:
    fail(circuit, 3)
    for _ in range(3):
        end_pause(circuit, clock)
        assert [is_admitted(circuit, clock.now + 0.5) for _ in range(10)] == [True] + [False] * 9
        # The caller that was let through still waits for an answer, for longer than the pause was.
        clock.now += 0.49
        assert not is_admitted(circuit, clock.now + 0.5)
        fail(circuit)


def test_of_threads_that_come_at_once_one_is_let_through(circuit: Circuit, clock: Clock) -> None:
    fail(circuit, 3)
    end_pause(circuit, clock)
    gate = threading.Barrier(20)

    def come(_: Any) -> bool:
        gate.wait(10)
        return is_admitted(circuit, clock.now + 0.5)

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(come, range(20))) == 1


@pytest.mark.parametrize(("timeout", "until_next"), [(None, 0.1), (0.05, 0.1), (0.5, 0.5), (100, 0.8)])
def test_who_is_cancelled_and_tells_nothing_is_followed_by_another_one(
    circuit: Circuit, clock: Clock, timeout: float | None, until_next: float
) -> None:
    fail(circuit, 3)
    end_pause(circuit, clock)
    assert is_admitted(circuit, None if timeout is None else clock.now + timeout)
    clock.now += until_next - 0.001
    assert not is_admitted(circuit)
    clock.now += 0.002
    assert is_admitted(circuit)
    assert not is_admitted(circuit)


def test_it_closes_with_the_first_success(circuit: Circuit, clock: Clock) -> None:
    fail(circuit, 3)
    end_pause(circuit, clock)
    assert is_admitted(circuit)
    circuit.succeeded()
    assert not circuit.is_open
    assert all(is_admitted(circuit) for _ in range(10))


def test_the_status_tells_where_it_stands(circuit: Circuit, clock: Clock) -> None:
    assert circuit.status() == (CircuitState.CLOSED, 0, 0.0, None)
    fail(circuit)
    assert circuit.status() == (CircuitState.CLOSED, 1, 0.0, "Redis did not answer in time")
    fail(circuit, 2)
    state, failures, retry_after, last_error = circuit.status()
    assert (state, failures, last_error) == (CircuitState.OPEN, 3, "Redis did not answer in time")
    assert 0.05 <= retry_after <= 0.1
    clock.now += 0.1
    assert circuit.status()[:3] == (CircuitState.HALF_OPEN, 3, 0.0)
    circuit.admit(b"key", clock.now + 0.5)
    assert circuit.status()[:3] == (CircuitState.HALF_OPEN, 3, 0.0)
    circuit.failed(ConnectionError("refused"))
    assert circuit.status()[:2] == (CircuitState.OPEN, 4)
    assert circuit.status().last_error == "refused"
    circuit.succeeded()
    assert circuit.status() == (CircuitState.CLOSED, 0, 0.0, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"failures": 0},
        {"failures": True},
        {"failures": 2.5},
        {"shortest_pause": 0},
        {"shortest_pause": float("nan")},
        {"shortest_pause": 3.0},
        {"longest_pause": float("inf")},
    ],
    ids=str,
)
def test_a_breaker_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(InvalidConfigurationError, match=rf"^{name} must be .*; got {value!r}$") as caught:
        CircuitBreaker(**settings)
    assert caught.value.field == name
