"""An optimization is a value, and one that makes no sense is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from ratelimit import InvalidArgumentError, InvalidConfigurationError, MemoryStore, Optimization, ProxyManager
from tests.engine.local_decisions.doubles import DELAYING, LIMITS, MANUAL, PREDICTING, SECOND


@pytest.mark.parametrize(
    ("make_it", "field"),
    [
        (lambda: Optimization.skip_sync_on_zero(0), "recheck"),
        (lambda: Optimization.skip_sync_on_zero(math.nan), "recheck"),
        (lambda: Optimization.delaying(0, 1), "max_unsynchronized_tokens"),
        (lambda: Optimization.delaying(True, 1), "max_unsynchronized_tokens"),
        (lambda: Optimization.delaying(2**63, 1), "max_unsynchronized_tokens"),
        (lambda: Optimization.delaying(1, -1), "max_unsynchronized_time"),
        (lambda: Optimization.delaying(1, "1"), "max_unsynchronized_time"),  # type: ignore[arg-type]  # the point
        (lambda: Optimization.predicting(1, 1, min_samples=1), "min_samples"),
        (lambda: Optimization.predicting(1, 1, min_samples=5, max_samples=4), "max_samples"),
        (lambda: Optimization.predicting(1, 1, max_sample_age=0), "max_sample_age"),
    ],
)
def test_values_out_of_range_are_refused(make_it: Callable[[], Optimization], field: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=field) as caught:
        make_it()
    assert caught.value.field == field


def test_an_optimization_is_a_value() -> None:
    assert Optimization.delaying(5, 2.0) == DELAYING != PREDICTING
    assert hash(Optimization.manual()) == hash(MANUAL)
    assert PREDICTING.max_sample_age_nanos == 10 * 2 * SECOND
    with pytest.raises(dataclasses.FrozenInstanceError):
        DELAYING.max_unsynchronized_tokens = 6  # type: ignore[misc]  # the point


def test_something_else_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="must be an Optimization; got 'delaying'"):
        ProxyManager(MemoryStore(), LIMITS, optimization="delaying")  # type: ignore[arg-type]  # the point
    with pytest.raises(InvalidArgumentError, match="must be an Optimization"):
        ProxyManager(MemoryStore(), LIMITS).bucket("key", optimization=5)  # type: ignore[arg-type]  # the point
