from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from ratelimit import Bandwidth, BucketConfiguration, InvalidConfigurationError
from tests.support import vectors


@pytest.mark.parametrize("case", vectors.load("state-bytes.json")["configurations"], ids=lambda case: case["name"])
def test_configurations_are_taken_and_refused_as_recorded(case: dict[str, Any]) -> None:
    if case["ok"]:
        built = BucketConfiguration(*map(vectors.bandwidth, case["bandwidths"]))
        assert vectors.as_recorded(built) == case["configuration"]
    else:
        with pytest.raises(InvalidConfigurationError):
            BucketConfiguration(*map(vectors.bandwidth, case["bandwidths"]))


def test_constructors_fill_in_what_is_left_out() -> None:
    greedy = Bandwidth.greedy(10, timedelta(seconds=1))
    assert (greedy.capacity, greedy.refill_tokens, greedy.initial_tokens) == (10, 10, 10)
    assert (greedy.refill_period_nanos, greedy.refill_intervally, greedy.id) == (10**9, False, None)
    assert greedy == Bandwidth.greedy(10, 1) == Bandwidth.greedy(10, 1.0)
    assert Bandwidth.greedy(10, 0.1).refill_period_nanos == 100_000_000
    intervally = Bandwidth.intervally(10, 1, refill_tokens=5, initial_tokens=0, id="x")
    assert intervally == Bandwidth(
        capacity=10, refill_tokens=5, refill_period_nanos=10**9, initial_tokens=0, refill_intervally=True, id="x"
    )


def test_an_aligned_bandwidth_counts_from_a_time_in_any_zone() -> None:
    noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
    aligned = Bandwidth.intervally_aligned(10, 3600, first_refill=noon, adaptive_initial_tokens=True)
    assert aligned.first_refill_millis == 1_704_110_400_000
    assert aligned.refill_intervally
    assert aligned.adaptive_initial_tokens
    elsewhere = noon.astimezone(timezone(timedelta(hours=5)))
    assert aligned == Bandwidth.intervally_aligned(10, 3600, first_refill=elsewhere, adaptive_initial_tokens=True)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Bandwidth.greedy(True, 1), "capacity"),
        (lambda: Bandwidth.greedy(1.0, 1), "capacity"),  # type: ignore[arg-type]
        (lambda: Bandwidth.greedy(2**63, 1), "capacity"),
        (lambda: Bandwidth.greedy(1, 0), "period"),
        (lambda: Bandwidth.greedy(1, -5), "period"),
        (lambda: Bandwidth.greedy(1, float("nan")), "period"),
        (lambda: Bandwidth.greedy(1, "minute"), "period"),  # type: ignore[arg-type]
        (lambda: Bandwidth.greedy(1, timedelta(0)), "period"),
        (lambda: Bandwidth.greedy(10, 1e-9), "refill_tokens"),
        (lambda: Bandwidth.greedy(1, 1, initial_tokens=-1), "initial_tokens"),
        (lambda: Bandwidth.greedy(1, 1, id=7), "id"),  # type: ignore[arg-type]
        (lambda: Bandwidth.greedy(1, 1, id="\u20ac" * 21_846), "id"),
        (lambda: Bandwidth.intervally_aligned(1, 1, first_refill=datetime(2024, 1, 1)), "first_refill"),  # noqa: DTZ001
        (lambda: Bandwidth.intervally_aligned(1, 1, first_refill=5), "first_refill"),  # type: ignore[arg-type]
        (
            lambda: Bandwidth.intervally_aligned(1, 1, first_refill=datetime(1969, 1, 1, tzinfo=UTC)),
            "first_refill_millis",
        ),
        (
            lambda: Bandwidth.intervally_aligned(
                5, 1, first_refill=datetime(2024, 1, 1, tzinfo=UTC), initial_tokens=5, adaptive_initial_tokens=True
            ),
            "initial_tokens",
        ),
        (
            lambda: Bandwidth(capacity=1, refill_tokens=1, refill_period_nanos=1, first_refill_millis=0),
            "first_refill_millis",
        ),
        (
            lambda: Bandwidth(capacity=1, refill_tokens=1, refill_period_nanos=1, adaptive_initial_tokens=True),
            "adaptive_initial_tokens",
        ),
        (
            lambda: Bandwidth(capacity=1, refill_tokens=1, refill_period_nanos=1, refill_intervally=1),  # type: ignore[arg-type]
            "refill_intervally",
        ),
    ],
)
def test_a_value_out_of_range_is_named(make: Any, field: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=field) as caught:
        make()
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("wrong", [None, 5, b"5/second", ["5/second", 5], (100, 60), [["5/second"]], {"5/second"}])
def test_what_is_no_configuration_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidConfigurationError, match=r"limits must be text such as .*; got"):
        BucketConfiguration.of(wrong)
    with pytest.raises(InvalidConfigurationError):
        BucketConfiguration(wrong)


def test_a_configuration_is_taken_in_any_form() -> None:
    parsed = BucketConfiguration.parse("5/second")
    assert BucketConfiguration.of("5/second") == BucketConfiguration.of(Bandwidth.parse("5/s")) == parsed
    assert BucketConfiguration.of(parsed) is parsed


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_limits_is_several_limits_in_its_order(kind: Callable[[Any], list[Any] | tuple[Any, ...]]) -> None:
    several = kind(["9/day, 8/hour", Bandwidth.parse("7/minute"), BucketConfiguration.parse("6/s; 5/ms"), "4/us"])
    assert BucketConfiguration.of(several) == BucketConfiguration.parse("9/day; 8/hour; 7/minute; 6/s; 5/ms; 4/us")
    assert BucketConfiguration.of(kind(["5/second"])) == BucketConfiguration.parse("5/second")
    with pytest.raises(InvalidConfigurationError, match="from 1 to 64; got 0"):
        BucketConfiguration.of(kind([]))
    with pytest.raises(InvalidConfigurationError, match="id must differ between bandwidths; got 'a' twice"):
        BucketConfiguration.of(kind(["5/second id a", "9/minute id a"]))


def test_both_classes_are_frozen_hashable_and_comparable() -> None:
    one, other = BucketConfiguration.parse("5/s; 9/h id x"), BucketConfiguration.parse("5/second; 9/hour id x")
    assert one == other
    assert len({one, other}) == 1
    assert one != BucketConfiguration.parse("9/h id x; 5/s")
    text: object = "5/s; 9/h id x"
    assert one != text
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bandwidth.parse("5/s").capacity = 6  # type: ignore[misc]
    for duplicate in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert duplicate == one
    assert dataclasses.replace(one.bandwidths[0], id="y").id == "y"
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bandwidths = ()  # type: ignore[misc]


def test_they_print_themselves_so_that_they_can_be_pasted_back() -> None:
    configuration = BucketConfiguration.parse("10/second burst 50; 1000/hour id daily")
    assert str(configuration) == "10/second burst 50; 1000/hour id daily"
    assert repr(configuration) == "BucketConfiguration.parse('10/second burst 50; 1000/hour id daily')"
    assert eval(repr(configuration)) == configuration
    assert eval(repr(configuration.bandwidths[0])) == configuration.bandwidths[0]


def test_a_stored_bandwidth_out_of_range_still_prints() -> None:
    stored = Bandwidth.unchecked(0, 0, 0, -1, False, -5, True, None)
    assert repr(stored).startswith("Bandwidth(capacity=0, refill_tokens=0,")
