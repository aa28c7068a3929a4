"""The commands about one bucket: try, inspect, reset and remove."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ratelimit.bucket import Bucket
from ratelimit.checks import max_wait_nanos, stored_key
from ratelimit.core.algorithm import Configuration, Level, State, decode, levels, out_of_range, stored_form
from ratelimit.core.limits import parse
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, to_seconds
from ratelimit.core.results import ConsumptionProbe
from ratelimit.engine.question import errors_named
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import Key, shown
from ratelimit.manager import ProxyManager
from ratelimit.stores.redis.store import RedisStore
from ratelimit.stores.urls import store_from_url

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


@dataclass(frozen=True, slots=True)
class _Trial:
    """The result of an attempt to consume.

    :param waited: the nanoseconds that it took; None for an attempt that does not wait.
    :param limits: the limits of the bucket.
    :param now: when the bucket had these limits, in nanoseconds since the epoch.
    """

    probe: ConsumptionProbe
    waited: int | None
    limits: Configuration | None
    now: int


def try_(arguments: argparse.Namespace) -> int:
    """Consume tokens; return 0 when they were admitted, 1 when they were refused."""
    limits = parsed_limits(arguments.limit)
    with ProxyManager.from_url(arguments.url, limits, prefix=arguments.prefix) as manager:
        trial = _try(manager.bucket(arguments.key), arguments.tokens, arguments.wait)
    probe = trial.probe
    if arguments.json:
        _print_json(
            key=_shown_key(arguments.key),
            admitted=probe.consumed,
            tokens=arguments.tokens,
            remaining=probe.remaining_tokens,
            retry_after=probe.retry_after,
            full_after=probe.reset_after,
            **({} if trial.waited is None else {"waited": to_seconds(trial.waited)}),
            limits=str(trial.limits),
        )
    else:
        print(_told(trial))
        if trial.limits != stored_form(limits, trial.now):
            print(f"the bucket keeps the limits it was made with: {trial.limits}", file=sys.stderr)
    return 0 if probe else 1


def _try(bucket: Bucket, tokens: int, max_wait: float | None) -> _Trial:
    if max_wait is None:
        result = bucket.verbose.try_consume_and_return_remaining(tokens)
        return _Trial(result.value, None, result.configuration, result.operation_time_nanos)
    max_wait_nanos(max_wait, "--wait")
    begin = time.monotonic_ns()
    admitted = bucket.consume(tokens, max_wait=None if max_wait == float("inf") else max_wait)
    waited = time.monotonic_ns() - begin
    # The bucket has refilled during the wait, so that the answer of the reservation is out of date.
    now = bucket.verbose.estimate_ability_to_consume(tokens)
    retry_after = 0 if admitted else now.value.nanos_to_wait_for_refill
    probe = ConsumptionProbe(admitted, now.value.remaining_tokens, retry_after, now.full_refilling_time_nanos)
    return _Trial(probe, waited, now.configuration, now.operation_time_nanos)


def _told(trial: _Trial) -> str:
    probe = trial.probe
    first = "admitted" if probe else "refused"
    words = [first if trial.waited is None else f"{first} after {duration(trial.waited)}"]
    words.append(f"{probe.remaining_tokens} left")
    if probe.nanos_to_wait_for_refill == NEVER:
        words.append("retry never: the bucket cannot hold so many")
    elif not probe:
        words.append(f"retry after {duration(probe.nanos_to_wait_for_refill)}")
    words.append(f"full after {duration(probe.nanos_to_wait_for_reset)}")
    return ", ".join(words)


def inspect(arguments: argparse.Namespace) -> int:
    """Show the bucket that is stored under a key; return 1 where there is none."""
    key: Key = arguments.key
    stored = stored_key(stored_key(b"", arguments.prefix), key)
    with closing(store_from_url(arguments.url)) as store, errors_named(key):
        data = store.get(stored)
        if data is None:
            return _missing(key, arguments.json)
        state, by_limit = _refilled(data, key, store.now_nanos(stored))
        ttl = _ttl_millis(store, stored) if isinstance(store, RedisStore) else None
    if arguments.json:
        _print_json(
            key=_shown_key(key),
            found=True,
            limits=str(state.configuration),
            version=state.configuration_version,
            tokens=state.available_tokens,
            consumed=state.consumed_tokens,
            bandwidths=[_as_json(level) for level in by_limit],
            bytes=len(data),
            ttl=None if ttl is None else ttl / 1_000,
        )
        return 0
    rows = [("key", shown(key))]
    for level in by_limit:
        rows += [("limit", str(level.limit)), ("tokens", _as_text(level))]
    rows.append(("consumed", f"{state.consumed_tokens} so far"))
    if state.configuration_version is not None:
        rows.append(("version", str(state.configuration_version)))
    expiry = "does not expire" if ttl is None else f"expires in {duration(ttl * 1_000_000)}"
    rows.append(("stored", f"{len(data)} bytes, {expiry}"))
    for name, value in rows:
        print(f"{name:<10}{value}")
    return 0


def _refilled(data: bytes, key: Key, now: int) -> tuple[State, tuple[Level, ...]]:
    """Decode a stored state and refill it until now; return it, and how full each of its limits is."""
    state = decode(data, key)
    try:
        state = state.refilled(now)
        return state, levels(state, now)
    except ArithmeticError as error:
        raise out_of_range(data, key) from error


def _as_text(level: Level) -> str:
    words = [f"{level.tokens} of {level.limit.capacity}"]
    if level.nanos_until_full > 0:
        words += [f"next in {duration(level.nanos_until_next)}", f"full in {duration(level.nanos_until_full)}"]
    return ", ".join(words)


def _as_json(level: Level) -> dict[str, Any]:
    return {
        "limit": str(level.limit),
        "capacity": level.limit.capacity,
        "tokens": level.tokens,
        "next_token_after": to_seconds(level.nanos_until_next),
        "full_after": to_seconds(level.nanos_until_full),
    }


def _ttl_millis(store: RedisStore, key: bytes) -> int | None:
    """Return the milliseconds after which a key expires; None where it does not expire, 0 where it is gone."""
    ttl = int(store.ask(key, "PTTL", key))
    return None if ttl == -1 else max(ttl, 0)


def reset(arguments: argparse.Namespace) -> int:
    """Fill a bucket, by the limits that are stored with it; return 1 where there is none."""
    key: Key = arguments.key
    with ProxyManager.from_url(arguments.url, prefix=arguments.prefix) as manager:
        configuration = manager.configuration(key)
        if configuration is None:
            return _missing(key)
        manager.bucket(key, configuration).reset()
    print(f"the bucket {shown(key)} is full: {configuration}")
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Remove what is stored under a key if it is a bucket; return 1 where there is none."""
    key: Key = arguments.key
    with ProxyManager.from_url(arguments.url, prefix=arguments.prefix) as manager:
        if manager.configuration(key) is None:
            return _missing(key)
        manager.remove(key)
    print(f"the bucket {shown(key)} is removed")
    return 0


def parsed_limits(text: str) -> Configuration:
    """Read the limits that ``--limit`` was given.

    :raises InvalidConfigurationError: where the text has no valid limits; its message shows the place.
    """
    try:
        return parse(text)
    except InvalidConfigurationError as error:
        raise InvalidConfigurationError(f"--limit: {error.message}", error.field) from None


def _missing(key: Key, as_json: bool = False) -> int:
    if as_json:
        _print_json(key=_shown_key(key), found=False)
    else:
        print(f"no bucket under the key {shown(key)}")
    return 1


def _print_json(**values: Any) -> None:
    print(json.dumps(values))


def _shown_key(key: Key) -> str:
    return key if isinstance(key, str) else key.decode(errors="backslashreplace")


def duration(nanos: int) -> str:
    """Return a duration for people, rounded up: a caller that waits this long has waited long enough."""
    if nanos == NEVER:
        return "eternity"
    total = -(-nanos // NANOS_PER_SECOND)
    for (unit, size), (smaller, part) in pairwise(_UNITS):
        if total >= size:
            whole, rest = divmod(-(-total // part), size // part)
            return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"
    return f"{-(-nanos // 1_000_000) / 1_000:g} s"
