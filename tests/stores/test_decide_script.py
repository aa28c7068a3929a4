"""The script that decides where the bucket is stored makes the very transition that the core makes, to the byte."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import redis

from ratelimit import Bandwidth, BandwidthState, BucketConfiguration, Expiration
from ratelimit.core import codec
from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    Plan,
    Reserve,
    Reset,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
)
from ratelimit.core.int64 import MAX, MIN
from ratelimit.core.requests import request
from ratelimit.core.state import BucketState
from ratelimit.errors import CorruptStateError
from ratelimit.stores.scripts import load

pytestmark = pytest.mark.redis

SCRIPT = load("decide")
CASES = int(os.environ.get("RATELIMIT_TEST_DECISIONS", "30000"))
SEED = int(os.environ.get("RATELIMIT_TEST_SEED", "1"))
ROUND_TRIP = 500

NOW = 1_700_000_000_000_000_000
MILLISECOND = 10**6
SECOND = 10**9
HOUR = 3600 * SECOND
DAY = 24 * HOUR
LONGEST_TTL = 2**53
OLD_TTL = 10**12  # far from anything that the script sets

# The script, telling also the time to live that it sets: -1 for none, -2 where it stores nothing.
TELLING = b"""
local ttl = -2
local real = redis
local redis = {call = function(command, ...)
  local reply = real.call(command, ...)
  if command == 'SET' then
    ttl = select(4, ...) or '-1'
  end
  return reply
end}
""" + SCRIPT.text.replace(b"return {1, before}", b"return {1, before, ttl}").replace(
    b"return {0, before}", b"return {0, before, ttl}"
)


@pytest.fixture
def client(redis_url: str) -> Generator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


class Case(NamedTuple):
    before: bytes | None
    command: Command[Any]
    plan: Plan
    expiration: Expiration
    now: int
    must_exist: bool
    everyday: bool
    """Nothing in it is out of the ordinary: it must be decided."""

    def request(self) -> tuple[bytes, ...]:
        arguments = request(self.command, self.plan, self.expiration, self.now, must_exist=self.must_exist)
        assert arguments is not None
        return arguments


class Outcome(NamedTuple):
    stored: bytes | None
    ttl: int | None
    """-1: for ever; None: nothing is written."""


def by_the_core(case: Case) -> Outcome | None:
    """What the core makes of it; None where it is not for the script to decide."""
    state = None
    if case.before is None:
        if case.must_exist:
            return None
    else:
        try:
            state = codec.decode(case.before)
        except CorruptStateError:
            return None
        version, wanted = state.configuration_version, case.plan.version
        if wanted is not None and (version is None or version < wanted):
            return None
    try:
        after, _ = execute(case.command, case.plan, state, case.now)
        if after is None:
            return Outcome(case.before, None)
        ttl = case.expiration.ttl_millis(after, case.now)
    except ZeroDivisionError:
        return None
    return Outcome(codec.encode(after), min(ttl, LONGEST_TTL) if ttl > 0 else -1)


# Cases at random. `everyday` numbers are those of services; the others are whatever 64 bits can hold.

EDGES = [0, 1, 2, 2**31, 2**32, 2**52, 2**53, 2**62, 2**63 - 1, *(10**exponent for exponent in range(19))]
EVERYDAY_CAPACITIES = [1, 2, 3, 5, 7, 10, 60, 100, 1000, 3600, 5000, 10**5, 10**6, 36 * 10**5, 10**8, 10**9]
EVERYDAY_PERIODS = [
    *(MILLISECOND, 100 * MILLISECOND, SECOND, 7 * SECOND, 10 * SECOND, 60 * SECOND, 900 * SECOND, HOUR, DAY),
    *(7 * DAY, 30 * DAY, 90 * DAY, 365 * DAY),
]
IDS = [None, "", "a", "limit", "~\x01\x7f"]
ODD_IDS = [*IDS, "\0", "é", "€", "\U0001f600", "\ud800"]


def edge(rng: random.Random, smallest: int = MIN) -> int:
    while True:
        kind = rng.random()
        if kind < 0.4:
            number = rng.choice(EDGES) + rng.randint(-2, 2)
        elif kind < 0.9:
            number = rng.getrandbits(rng.randint(1, 63))
        else:
            number = rng.randint(0, 100)
        if rng.random() < 0.3:
            number = -number
        if max(MIN, smallest) <= number <= MAX:
            return number


def log_uniform(rng: random.Random, largest: int) -> int:
    return min(largest, int(2 ** rng.uniform(0, largest.bit_length())))


def everyday_bandwidth(rng: random.Random, now: int, id: str | None) -> Bandwidth:
    capacity = rng.choice(EVERYDAY_CAPACITIES) if rng.random() < 0.8 else log_uniform(rng, 10**9)
    period = rng.choice(EVERYDAY_PERIODS)
    tokens = capacity if rng.random() < 0.7 else rng.choice(EVERYDAY_CAPACITIES)
    kind = rng.random()
    aligned = kind > 0.8
    adaptive = aligned and rng.random() < 0.5
    return Bandwidth(
        capacity=capacity,
        refill_tokens=min(tokens, period),
        refill_period_nanos=period,
        initial_tokens=rng.randint(0, 2 * capacity) if not adaptive and rng.random() < 0.2 else None,
        refill_intervally=kind > 0.6,
        first_refill_millis=(now + rng.randint(-30 * DAY, 2 * period)) // MILLISECOND if aligned else None,
        adaptive_initial_tokens=adaptive,
        id=id,
    )


def everyday_state(rng: random.Random, bandwidth: Bandwidth, now: int) -> BandwidthState:
    last = now - log_uniform(rng, 400 * DAY) if rng.random() < 0.9 else now + rng.randint(0, SECOND)
    capacity, period = bandwidth.capacity, bandwidth.refill_period_nanos
    size = rng.choice([capacity, 0, rng.randint(-capacity, capacity), rng.randint(0, 2 * capacity)])
    error = 0 if bandwidth.refill_intervally or size >= capacity or rng.random() < 0.2 else rng.randrange(period)
    if rng.random() < 0.1:
        now -= rng.randrange(3) * period
        last = now - period * rng.randrange(3)
    return BandwidthState(last, size, error)


def edge_bandwidth(rng: random.Random, id: str | None) -> Bandwidth:
    smallest = 1 if rng.random() < 0.97 else MIN
    return Bandwidth.unchecked(
        edge(rng, smallest),
        edge(rng, smallest),
        edge(rng, smallest),
        edge(rng),
        rng.random() < 0.4,
        edge(rng, 0) if rng.random() < 0.3 else None,
        rng.random() < 0.1,
        id,
    )


def everyday_command(rng: random.Random, capacity: int) -> Command[Any]:
    tokens = rng.choice([1, 1, 1, 2, rng.randint(1, capacity), rng.randint(1, 2 * capacity)])
    match rng.randrange(16):
        case 0 | 1 | 2 | 3:
            return TryConsume(tokens)
        case 4 | 5:
            return TryConsumeAndReturnRemaining(tokens)
        case 6:
            return ConsumeAsMuchAsPossible(rng.choice([MAX, tokens]))
        case 7:
            return Reserve(tokens)
        case 8:
            return Reserve(tokens, log_uniform(rng, 10 * DAY))
        case 9:
            return ConsumeIgnoringRateLimits(tokens)
        case 10:
            return GiveBack(tokens)
        case 11:
            return AddTokens(tokens)
        case 12:
            return ForceAddTokens(tokens)
        case 13:
            return Reset()
        case 14:
            return Verbose(everyday_command(rng, capacity))
        case _:
            return everyday_batch(rng, capacity)


def everyday_batch(rng: random.Random, capacity: int) -> Batch:
    if rng.random() < 0.5:
        return Batch((TryConsume(rng.randint(1, max(1, capacity // 10))),) * rng.randint(1, 40))
    parts: list[Command[Any]] = [
        everyday_command(rng, capacity) if rng.random() < 0.9 else GetAvailableTokens() for _ in range(rng.randrange(6))
    ]
    return Batch(tuple(part for part in parts for _ in range(rng.choice([1, 1, 2, 3]))))


def edge_command(rng: random.Random) -> Command[Any]:
    tokens = edge(rng, 0)
    kinds: list[Command[Any]] = [
        TryConsume(tokens),
        TryConsumeAndReturnRemaining(tokens),
        ConsumeAsMuchAsPossible(tokens),
        Reserve(tokens, edge(rng)),
        ConsumeIgnoringRateLimits(tokens),
        GiveBack(tokens),
        AddTokens(tokens),
        ForceAddTokens(tokens),
        Reset(),
    ]
    command = rng.choice(kinds)
    return command if rng.random() < 0.8 else Batch((command, command, edge_command(rng)))


def expiration(rng: random.Random) -> Expiration:
    milliseconds = rng.choice([1, 999, 60_000, 86_400_000])
    return rng.choice(
        [
            Expiration.none(),
            Expiration.fixed(milliseconds / 1000),
            Expiration.after_refill(0),
            Expiration.after_refill(milliseconds / 1000),
            Expiration.automatic(),
            Expiration.automatic(),
        ]
    )


def ids(rng: random.Random, count: int, *, odd: bool) -> list[str | None]:
    if rng.random() < 0.7:
        return [None] * count
    return rng.sample(ODD_IDS if odd and rng.random() < 0.2 else IDS, count)


def everyday_case(rng: random.Random) -> Case:
    now = NOW + rng.randrange(DAY) if rng.random() < 0.5 else (NOW + rng.randrange(DAY)) // MILLISECOND * MILLISECOND
    count = rng.choice([1, 1, 1, 2, 3])
    configuration = BucketConfiguration(*(everyday_bandwidth(rng, now, id) for id in ids(rng, count, odd=False)))
    version = rng.choice([None, None, 1, 7])
    before, must_exist = None, False
    if rng.random() < 0.9:
        states = tuple(everyday_state(rng, bandwidth, now) for bandwidth in configuration)
        before = codec.encode(BucketState(configuration, version, rng.randrange(10**9), states))
        must_exist = rng.random() < 0.1
        if rng.random() < 0.1:
            before += rng.randbytes(rng.randint(1, 20))
    plan = Plan(configuration, rng.choice([None, version]))
    command = everyday_command(rng, configuration.bandwidths[0].capacity)
    return Case(before, command, plan, expiration(rng), now, must_exist, everyday=True)


def edge_case(rng: random.Random) -> Case:
    now = NOW + rng.randrange(DAY) if rng.random() < 0.5 else edge(rng)
    id_of = ids(rng, rng.choice([1, 1, 2]), odd=True)
    if rng.random() < 0.5:
        configuration = BucketConfiguration(*(edge_bandwidth(rng, id) for id in id_of))
        states = tuple(BandwidthState(edge(rng), edge(rng), edge(rng)) for _ in id_of)
    else:
        configuration = BucketConfiguration(*(everyday_bandwidth(rng, NOW, id) for id in id_of))
        states = tuple(everyday_state(rng, bandwidth, now) for bandwidth in configuration)
        states = tuple(state._replace(**{rng.choice(BandwidthState._fields): edge(rng)}) for state in states)
    states = tuple(BandwidthState(max(MIN, min(MAX, last)), *rest) for last, *rest in states)
    version = rng.choice([None, edge(rng), 5])
    before = codec.encode(BucketState(configuration, version, edge(rng), states)) if rng.random() < 0.9 else None
    wanted = rng.choice([None, None, edge(rng), 4, 5, 6])
    rules = expiration(rng)
    if rng.random() < 0.1:
        rules = replace(rules, duration_millis=edge(rng))
    command = edge_command(rng) if rng.random() < 0.5 else everyday_command(rng, 1000)
    return Case(before, command, Plan(configuration, wanted), rules, now, rng.random() < 0.1, everyday=False)


def garbled_case(rng: random.Random) -> Case:
    """Bytes that are wrong in one place, or are cut off."""
    case = everyday_case(rng)
    data = bytearray(case.before or codec.encode(BucketState.initial(case.plan.configuration, 3, case.now)))
    for _ in range(rng.choice([1, 1, 2])):
        position = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(76, len(data)))
        data[position] = rng.choice([0, 1, 2, 3, 255, rng.randrange(256)])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    return case._replace(before=bytes(data), everyday=False)


def any_case(rng: random.Random) -> Case:
    kind = rng.random()
    return everyday_case(rng) if kind < 0.7 else edge_case(rng) if kind < 0.93 else garbled_case(rng)


class Tally:
    def __init__(self) -> None:
        self.cases = self.stored = self.left = self.refused = 0
        self.everyday = 0

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.everyday} of them everyday: {self.stored} stored, {self.left} changed nothing; "
            f"handed back {self.refused} that the script must not decide, and {self.undecided} others "
            f"({self.undecided / self.cases:.2%})"
        )

    @property
    def undecided(self) -> int:
        return self.cases - self.stored - self.left - self.refused

    def check(self, case: Case, reply: list[Any], stored: bytes | None, pttl: int) -> None:
        decided, before, ttl = reply
        self.cases += 1
        self.everyday += case.everyday
        assert before == case.before, case
        expected = by_the_core(case)
        if expected is None:
            assert decided == 0, case
            self.refused += 1
        if not decided:
            assert not case.everyday or expected is None, case
            assert (stored, ttl) == (case.before, -2), case
        elif expected is not None and expected.ttl is None:
            assert (stored, ttl) == (expected.stored, -2), case
            self.left += 1
        elif expected is not None:
            assert (stored, int(ttl)) == expected, (case, expected)
            self.stored += 1
            assert pttl == -1 if expected.ttl == -1 else expected.ttl - 60_000 <= pttl <= expected.ttl, case
        if int(ttl) == -2:
            assert pttl == -2 if stored is None else OLD_TTL - 60_000 <= pttl <= OLD_TTL, case


def test_script_and_core_agree_to_the_byte_on_random_cases(client: redis.Redis) -> None:
    rng, tally = random.Random(SEED), Tally()
    sha = client.script_load(TELLING)
    while tally.cases < CASES:
        cases = [any_case(rng) for _ in range(ROUND_TRIP)]
        client.flushdb()
        with client.pipeline(transaction=True) as pipe:  # in one transaction no key expires under way
            for number, case in enumerate(cases):
                if case.before is not None:
                    pipe.execute_command("SET", number, case.before, "PX", OLD_TTL)
                pipe.execute_command("EVALSHA", sha, 1, number, *case.request())
                pipe.execute_command("GET", number)
                pipe.execute_command("PTTL", number)
            replies = iter(pipe.execute())
        for case in cases:
            if case.before is not None:
                next(replies)
            tally.check(case, next(replies), next(replies), next(replies))
    print(tally)
    assert tally.undecided < 0.02 * tally.cases, tally
