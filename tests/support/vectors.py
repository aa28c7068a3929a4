"""The recorded behaviour of Bucket4j in ``tests/data/``, as values of this library."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

from ratelimit import Bandwidth, BandwidthState, BucketConfiguration, ConsumptionProbe, EstimationProbe
from ratelimit.core.token_bucket.state import BucketState

DATA = Path(__file__).parents[1] / "data"


@cache
def load(name: str) -> Any:
    return json.loads((DATA / name).read_text("ascii"))


def bandwidth(recorded: dict[str, Any]) -> Bandwidth:
    recorded = dict(recorded)
    return Bandwidth(first_refill_millis=recorded.pop("time_of_first_refill_millis"), **recorded)


def configuration(recorded: dict[str, Any]) -> BucketConfiguration:
    return BucketConfiguration(*map(bandwidth, recorded["bandwidths"]))


def state(of: dict[str, Any], recorded: dict[str, Any]) -> BucketState:
    return BucketState(
        configuration(of),
        recorded["configuration_version"],
        recorded["consumed_tokens"],
        tuple(BandwidthState(**numbers) for numbers in recorded["bandwidth_states"]),
    )


def as_recorded(configuration: BucketConfiguration) -> dict[str, Any]:
    """A configuration in the words of the recordings."""
    return {
        "bandwidths": [
            {
                "capacity": one.capacity,
                "initial_tokens": one.initial_tokens,
                "refill_period_nanos": one.refill_period_nanos,
                "refill_tokens": one.refill_tokens,
                "refill_intervally": one.refill_intervally,
                "time_of_first_refill_millis": one.first_refill_millis,
                "adaptive_initial_tokens": one.adaptive_initial_tokens,
                "id": one.id,
            }
            for one in configuration
        ]
    }


def states_as_recorded(states: tuple[BandwidthState, ...]) -> list[dict[str, int]]:
    return [one._asdict() for one in states]


def probe_as_recorded(probe: ConsumptionProbe | EstimationProbe) -> dict[str, Any]:
    """A probe as the recordings have it: Bucket4j tells nothing of a store that fails."""
    fields = dataclasses.asdict(probe)
    del fields["degraded"]
    return fields
