"""Tasks that wait for their turn as messages, in a worker over a broker in memory, and eagerly."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    InvalidArgumentError,
    InvalidConfigurationError,
    MemoryStore,
    ProxyManager,
    RateLimitExceeded,
)
from ratelimit.testing import ManualClock

pytest.importorskip("http_sf")
celery = pytest.importorskip("celery")

from celery import signals  # noqa: E402
from celery.contrib.testing.worker import start_worker  # noqa: E402

from ratelimit.integrations.celery import RateLimitedTask  # noqa: E402
from ratelimit.integrations.outbound import OutboundLimit  # noqa: E402

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
LIMITS = "10/second burst 1"


@pytest.fixture(scope="module")
def shared_app() -> Generator[Any]:
    app = celery.Celery("test", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=False,
        broker_transport_options={"polling_interval": 0.01},
    )
    yield app
    app.close()


@pytest.fixture(scope="module")
def running_worker(shared_app: Any) -> Generator[Any]:
    def keep_logging(**_: Any) -> None:
        """Leave the loggers of the other tests alone."""

    signals.setup_logging.connect(keep_logging)
    start: Any = start_worker
    with start(shared_app, pool="threads", concurrency=4, perform_ping_check=False, shutdown_timeout=20) as worker:
        yield worker
    signals.setup_logging.disconnect(keep_logging)


Task = Callable[..., Callable[[Callable[..., Any]], Any]]


@pytest.fixture
def task(shared_app: Any, request: pytest.FixtureRequest) -> Task:
    """A decorator for the task of a test."""

    def task(**options: Any) -> Any:
        return shared_app.task(base=RateLimitedTask, name=request.node.name, shared=False, lazy=False, **options)

    return task


@pytest.fixture
def work(running_worker: Any) -> Callable[[], None]:
    """Have the worker take note of the tasks that there are."""

    def work() -> None:
        running_worker.consumer.update_strategies()

    return work


@pytest.fixture
def manager() -> ProxyManager:
    return ProxyManager(MemoryStore())


@pytest.fixture
def retries() -> Generator[list[float]]:
    """The countdowns of all retries."""
    countdowns: list[float] = []

    def note(reason: Any, **_: Any) -> None:
        countdowns.append(reason.when)

    signals.task_retry.connect(note)
    yield countdowns
    signals.task_retry.disconnect(note)


def consumed(manager: ProxyManager, limits: str = LIMITS) -> int:
    return manager.bucket("outbound:api", limits).snapshot().consumed_tokens


def test_tasks_run_each_at_its_turn_are_retried_once_for_it_and_take_one_token(
    task: Task, manager: ProxyManager, retries: list[float], work: Callable[[], None]
) -> None:
    limit = OutboundLimit(LIMITS, key="api", manager=manager)
    times: list[tuple[float, int]] = []

    @task(outbound_limit=limit, max_retries=0)
    def call(number: int) -> int:
        times.append((time.monotonic(), number))
        return number

    work()
    results = [call.delay(number) for number in range(6)]
    assert [result.get(timeout=20) for result in results] == list(range(6))
    assert consumed(manager) == 6
    assert len(retries) == 5
    assert max(times)[0] - min(times)[0] > 0.2  # by a wall clock that hardly anybody sets meanwhile


def test_retries_of_the_tasks_own_want_tokens_and_are_counted_alone(
    task: Task, manager: ProxyManager, retries: list[float], work: Callable[[], None]
) -> None:
    limit = OutboundLimit("20/second burst 1", key="api", manager=manager)
    bucket = manager.bucket("outbound:api", "20/second burst 1")
    seen: list[int] = []

    @task(bind=True, outbound_limit=limit, max_retries=2)
    def call(self: Any) -> int:
        seen.append(self.request.retries)
        bucket.consume_ignoring_rate_limits(6)  # so that there is none for the next attempt
        if len(seen) < 3:
            raise self.retry(countdown=0)
        return len(seen)

    bucket.consume_ignoring_rate_limits(6)
    work()
    assert call.delay().get(timeout=20) == 3
    assert seen == [0, 1, 2]
    assert consumed(manager, "20/second burst 1") == 4 * 6 + 3
    assert retries.count(0) == 2
    assert len(retries) == 2 + 3  # those of the limit do not count against two


def test_a_turn_that_is_too_far_off_fails_the_task(task: Task, manager: ProxyManager, work: Callable[[], None]) -> None:
    limit = OutboundLimit("1/hour", key="api", max_wait=60, manager=manager)

    @task(outbound_limit=limit)
    def call() -> None: ...

    work()
    assert call.delay().get(timeout=20) is None
    with pytest.raises(RateLimitExceeded) as failure:
        call.delay().get(timeout=20)
    assert 3500 < (failure.value.retry_after or 0) <= 3600
    assert consumed(manager, "1/hour") == 1


def test_what_a_task_has_been_told_holds_all_back_even_those_with_tokens(
    task: Task, manager: ProxyManager, work: Callable[[], None]
) -> None:
    limits = "5/second burst 1"
    limit = OutboundLimit(limits, key="api", manager=manager, jitter=lambda: 0)
    times: list[float] = []
    told: list[float] = []

    @task(bind=True, outbound_limit=limit)
    def call(self: Any) -> None:
        times.append(time.monotonic())
        if not told:
            while consumed(manager, limits) < 4:  # until the others have theirs
                time.sleep(0.001)
            told.append(time.monotonic())
            self.learn(429, {"Retry-After": "1"})

    work()
    for result in [call.delay() for _ in range(4)]:
        result.get(timeout=20)
    assert len(times) == 4
    assert max(times) - told[0] > 0.9
    assert consumed(manager, limits) > 4  # some have reserved again


def test_the_key_and_the_cost_are_those_of_the_request(
    task: Task, manager: ProxyManager, work: Callable[[], None]
) -> None:
    limit = OutboundLimit(
        "10/hour",
        key=lambda request: f"api:{request.kwargs['customer']}",
        cost=lambda request: request.args[0],
        manager=manager,
    )

    @task(outbound_limit=limit)
    def call(size: int, *, customer: str) -> str:
        return customer * size

    work()
    assert call.delay(3, customer="a").get(timeout=20) == "aaa"
    assert manager.bucket("outbound:api:a", "10/hour").available_tokens() == 7


def test_a_task_that_runs_eagerly_sleeps() -> None:
    clock = ManualClock(NOW)
    manager = ProxyManager(MemoryStore(), clock=clock)
    limit = OutboundLimit("1/second", key="api", max_wait=2, manager=manager, clock=clock)
    app = celery.Celery("eager", set_as_current=False)
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    runs: list[int] = []

    options = {"base": RateLimitedTask, "bind": True, "max_retries": 1, "shared": False}

    @app.task(outbound_limit=limit, **options)  # type: ignore[untyped-decorator]  # Celery has no types
    def call(self: Any, *, fails: bool = False) -> int:
        runs.append(self.request.retries)
        if fails and self.request.retries == 0:
            raise self.retry(countdown=0)
        return len(runs)

    assert [call.delay().get() for _ in range(3)] == [1, 2, 3]
    assert clock.slept == [SECOND] * 2
    app.conf.task_eager_propagates = False
    assert call.delay(fails=True).get() == 5
    assert clock.slept == [SECOND] * 4
    manager.bucket("outbound:api", "1/second").consume_ignoring_rate_limits(5)
    assert isinstance(call.delay().result, RateLimitExceeded)
    app.close()


def test_a_call_as_a_function_is_not_limited(task: Task, manager: ProxyManager) -> None:
    @task(outbound_limit=OutboundLimit("1/hour", key="api", manager=manager))
    def double(number: int) -> int:
        return 2 * number

    assert [double(number) for number in range(3)] == [0, 2, 4]


def test_a_task_without_a_limit_is_refused(task: Task) -> None:
    with pytest.raises(InvalidConfigurationError, match="needs an outbound_limit"):

        @task()
        def call() -> None: ...


def test_a_manager_for_asyncio_is_refused(task: Task) -> None:
    limit = OutboundLimit("1/second", key="api", manager=AsyncProxyManager(AsyncMemoryStore()))
    with pytest.raises(InvalidArgumentError, match="ProxyManager"):

        @task(outbound_limit=limit)
        def call() -> None: ...
