"""Bucket4j's raw commands, run on the stored state by the function that decides all commands here.

A raw command answers "bucket_not_found" or "configuration_needs_replacement" where a bucket's verbs would make it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ratelimit import ConsumptionProbe, EstimationProbe, Snapshot, TokensInheritance
from ratelimit.core import commands
from ratelimit.core.algorithm import State, decode, encode
from ratelimit.core.commands import Command, Terms, Transition, execute
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.stores.memory import SwappingMemoryStore
from tests.support import vectors

Answer = dict[str, Any]
Outcome = tuple[State | None, Answer]  # the state to store, if any

NOT_FOUND = {"error": "bucket_not_found"}
NEEDS_REPLACEMENT = {"error": "configuration_needs_replacement"}


class Sync(Command[None]):
    """Bucket4j's synchronisation, which this library has no verb for: it stores the refill, and nothing else."""

    def decide(self, state: State, now: int) -> Transition[None]:
        return state, None

    def answer_without_limit(self) -> None:
        raise NotImplementedError


class Nothing(Command[None]):
    """Changes nothing, and so shows what is stored of itself: a bucket that had to be made."""

    def decide(self, state: State, now: int) -> Transition[None]:
        return None, None

    def answer_without_limit(self) -> None:
        raise NotImplementedError


PLAIN: dict[str, Callable[..., Command[Any]]] = {
    "try_consume": commands.TryConsume,
    "try_consume_and_return_remaining": commands.TryConsumeAndReturnRemaining,
    "consume_as_much_as_possible": commands.ConsumeAsMuchAsPossible,
    "consume_ignoring_rate_limits": commands.ConsumeIgnoringRateLimits,
    "reserve_and_calculate_time_to_sleep": commands.Reserve,
    "estimate_ability_to_consume": commands.EstimateAbilityToConsume,
    "get_available_tokens": commands.GetAvailableTokens,
    "create_snapshot": commands.TakeSnapshot,
    "add_tokens": commands.AddTokens,
    "force_add_tokens": commands.ForceAddTokens,
    "reset": commands.Reset,
    "sync": Sync,
}


def run_raw(
    store: SwappingMemoryStore, key: bytes, raw: dict[str, Any], now: int, configurations: list[BucketConfiguration]
) -> Answer:
    before = store.get(key)
    state = None if before is None else decode(before)
    after, answer = _run(raw, state, now, configurations)
    if after is not None:
        assert store.swap(key, before, encode(after), -1) is None
    return answer


def _run(raw: dict[str, Any], state: State | None, now: int, configurations: list[BucketConfiguration]) -> Outcome:
    op, args = raw["op"], raw.get("args", {})
    if op == "multi":
        answers, stored = [], None
        for part in args["commands"]:
            after, answer = _run(part, state if stored is None else stored, now, configurations)
            stored = stored if after is None else after
            answers.append(answer)
        return stored, {"value": answers}
    if op == "check_configuration_version_and_execute":
        if state is None:
            return None, NOT_FOUND
        if state.configuration_version is None or state.configuration_version < args["version"]:
            return None, NEEDS_REPLACEMENT
        return _run(args["command"], state, now, configurations)
    if op == "create_initial_state_and_execute":
        return _on_terms(Terms(configurations[args["configuration"]]), args["command"], state, now, configurations)
    if op == "create_initial_state_with_version_or_replace_configuration_and_execute":
        terms = Terms(configurations[args["configuration"]], args["version"], TokensInheritance[args["strategy"]])
        return _on_terms(terms, args["command"], state, now, configurations)
    if state is None:
        return None, NOT_FOUND
    if op == "get_configuration":
        return None, {"value": vectors.as_recorded(state.configuration)}
    after, value = execute(PLAIN[op](*args.values()), Terms(state.configuration), state, now)
    return after, {"value": _recorded_form(value)}


def _on_terms(
    terms: Terms, inner: dict[str, Any], state: State | None, now: int, configurations: list[BucketConfiguration]
) -> Outcome:
    """Let the terms make or replace the bucket, then run the inner command on it."""
    made, _ = execute(Nothing(), terms, state, now)
    after, answer = _run(inner, state if made is None else made, now, configurations)
    return made if after is None else after, answer


def _recorded_form(value: Any) -> Any:
    if isinstance(value, ConsumptionProbe | EstimationProbe):
        return vectors.probe_as_recorded(value)
    if isinstance(value, commands.Reserved):
        return value.wait
    if isinstance(value, Snapshot):
        return {
            "configuration": vectors.as_recorded(value.configuration),
            "configuration_version": value.configuration_version,
            "consumed_tokens": value.consumed_tokens,
            "bandwidth_states": vectors.states_as_recorded(value.bandwidth_states),
        }
    return value
