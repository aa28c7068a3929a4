"""The script that decides where the bucket is stored makes the very transition that the core makes, to the byte."""

from __future__ import annotations

import math
import os
import random
import re
import struct
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import redis

from ratelimit import Bandwidth, BandwidthState, BucketConfiguration, Expiration
from ratelimit.core.algorithm import encode
from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Book,
    Cancel,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    HoldBack,
    ReplaceConfiguration,
    Reserve,
    Reset,
    Settle,
    Synchronize,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
    terms_of,
)
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import MAX, MIN, wrap
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.script_arguments import COUNTING, STRICT, plain_consumption
from ratelimit.errors import CorruptStateError
from ratelimit.stores.operations import Operation
from ratelimit.stores.redis.scripts import load
from tests.support.script_requests import request

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
CONSUMED = 1_000_000  # tokens that a bucket has counted, often
OLD_TTL = 10**12  # far from anything that the script sets

# This is the script with another reply: whether it has decided, what it replies to that, and the time to live that it
# sets: -1 for none, -2 where it stores nothing.
TELLING = b"""
local told = -2
local real = redis
local redis = {call = function(command, ...)
  local reply = real.call(command, ...)
  if command == 'SET' and reply then
    local _, _, px, ttl = ...
    told = px == 'PX' and string.format('%.0f', ttl) or '-1'
  end
  return reply
end}
""" + re.sub(
    rb"return (\{)?((?:before|not missing|taken|counting|'').*?)\}?\n",
    lambda found: b"return {%d, %b, told}\n" % (0 if found[1] else 1, found[2]),
    SCRIPT.text.replace(b"local before", b"local before", 1) + b"\n",
)


@pytest.fixture
def client(redis_url: str) -> Generator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


class Case(NamedTuple):
    before: bytes | None
    command: Command[Any]
    plan: Terms
    expiration: Expiration
    now: int
    must_exist: bool
    everyday: bool
    """Nothing in it is out of the ordinary: it must be decided."""
    flags: int = 0

    def request(self) -> tuple[bytes, ...]:
        arguments = request(
            self.command, self.plan, self.expiration, self.now, must_exist=self.must_exist, flags=self.flags
        )
        assert arguments is not None
        return arguments

    def leaves_a_trace(self, expected: Outcome) -> bool:
        """Whether a strict request is run: then its effect can be seen afterwards."""
        consumption = plain_consumption(self.command)
        assert consumption is not None
        if 0 < self.consumed(expected) < consumption.tokens * consumption.calls:
            return False
        if self.before is None:
            return True
        before = codec.decode(self.before)
        first, ours = before.configuration.bandwidths[0], before.bandwidth_states[0]
        return not (first.refill_intervally or ours.last_refill_time_nanos >= self.now)

    def consumed(self, expected: Outcome) -> int:
        """How many tokens a plain consumption takes."""
        before = 0 if self.before is None else codec.decode(self.before).consumed_tokens
        assert expected.stored is not None
        return wrap(codec.decode(expected.stored).consumed_tokens - before)


class Outcome(NamedTuple):
    stored: bytes | None
    ttl: int | None
    """Milliseconds; -1: without an end; None: nothing is written."""


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
    try:
        after, _ = execute(case.command, case.plan, state, case.now)
        if after is None:
            return Outcome(case.before, None)
        ttl = case.expiration.ttl_millis(after, case.now)
    except ArithmeticError:
        return None
    return Outcome(encode(after), min(ttl, LONGEST_TTL) if ttl > 0 else -1)


# Cases at random. `everyday` numbers are those of services; the others are whatever 64 bits can hold.

EDGES: list[int] = [0, 1, 2, 2**31, 2**32, 2**52, 2**53, 2**62, 2**63 - 1, *(10**exponent for exponent in range(19))]
EVERYDAY_CAPACITIES = [1, 2, 3, 5, 7, 10, 60, 100, 1000, 3600, 5000, 10**5, 10**6, 36 * 10**5, 10**8, 10**9]
EVERYDAY_PERIODS = [
    *(MILLISECOND, 100 * MILLISECOND, SECOND, 7 * SECOND, 10 * SECOND, 60 * SECOND, 900 * SECOND, HOUR, DAY),
    *(7 * DAY, 30 * DAY, 90 * DAY, 365 * DAY),
]
IDS = [None, "", "a", "limit", "~\x01\x7f"]
ODD_IDS = [*IDS, "\0", "é", "€", "\U0001f600", "\ud800"]
INHERITANCES = list(TokensInheritance)


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
    return min(largest, int(math.exp2(rng.uniform(0, largest.bit_length()))))


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
    first = edge(rng, 0) if rng.random() < 0.3 else None
    adaptive = smallest == 1 and rng.random() < 0.1  # by 0 no initial size could be computed
    capacity, tokens, period = edge(rng, smallest), edge(rng, smallest), edge(rng, smallest)
    return Bandwidth.unchecked(capacity, tokens, period, edge(rng), rng.random() < 0.4, first, adaptive, id)


def everyday_command(rng: random.Random, capacity: int) -> Command[Any]:
    tokens = rng.choice([1, 1, 1, 2, rng.randint(1, capacity), rng.randint(1, 2 * capacity)])
    kind = rng.random()
    if kind < 0.4:
        return TryConsume(tokens)
    if kind < 0.5:
        return Verbose(everyday_command(rng, capacity))
    if kind < 0.6:
        return everyday_batch(rng, capacity)
    return any_of_the_kinds(rng, tokens, log_uniform(rng, 10 * DAY))


def noted(rng: random.Random, tokens: int) -> int:
    """What a reservation has noted: mostly near to what is counted."""
    if rng.random() < 0.1:
        return edge(rng)
    return max(MIN, min(MAX, CONSUMED + rng.choice([0, 0, tokens, -tokens, -1, -rng.randint(0, 100)])))


def surplus(rng: random.Random) -> tuple[tuple[int, int], ...]:
    """What a reservation has taken beside its tokens, perhaps under other limits than those of the bucket."""
    if rng.random() < 0.3:
        return ()
    largest = rng.choice([10, 10**6, MAX])
    return tuple(
        (rng.choice([0, rng.randint(0, largest)]), rng.choice([0, rng.randint(0, rng.choice(EVERYDAY_PERIODS))]))
        for _ in range(rng.choice([1, 2, 2, 3]))
    )


def any_of_the_kinds(rng: random.Random, tokens: int, longest_wait: int) -> Command[Any]:
    kinds: list[Command[Any]] = [
        TryConsume(tokens),
        TryConsumeAndReturnRemaining(tokens),
        ConsumeAsMuchAsPossible(rng.choice([MAX, tokens])),
        Reserve(tokens),
        Reserve(tokens, longest_wait),
        ConsumeIgnoringRateLimits(tokens),
        GiveBack(tokens),
        Settle(max(0, tokens), rng.choice([0, 3, MAX])),
        Cancel(tokens, noted(rng, tokens), surplus(rng)),
        AddTokens(tokens),
        ForceAddTokens(tokens),
        Reset(),
        Book(tokens),
        HoldBack(rng.choice([max(1, tokens), max(1, longest_wait)])),
        Synchronize(tokens, TryConsume(tokens), booking=True),
    ]
    return rng.choice(kinds)


def everyday_batch(rng: random.Random, capacity: int) -> Batch:
    if rng.random() < 0.5:
        return Batch((TryConsume(rng.randint(1, max(1, capacity // 10))),) * rng.randint(1, 40))
    parts: list[Command[Any]] = [
        everyday_command(rng, capacity) if rng.random() < 0.9 else GetAvailableTokens() for _ in range(rng.randrange(6))
    ]
    return Batch(tuple(part for part in parts for _ in range(rng.choice([1, 1, 2, 3]))))


def edge_command(rng: random.Random) -> Command[Any]:
    command = any_of_the_kinds(rng, edge(rng, 0), edge(rng))
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


def other_limits(
    rng: random.Random, configuration: BucketConfiguration, bandwidth: Callable[[str | None], Bandwidth], *, odd: bool
) -> BucketConfiguration:
    """Limits to put in the place of others: some of their ids stay, some go, and some come."""
    kept = [one.id for one in configuration if rng.random() < 0.8]
    come = [id for id in ids(rng, rng.choice([1, 1, 2]), odd=odd) if id is None or id not in kept]
    id_of = kept + come if not kept or rng.random() < 0.3 else kept
    rng.shuffle(id_of)
    if rng.random() < 0.3:  # with the numbers of old ones, but for one perhaps
        old = {one.id: one for one in configuration}
        limits = [old[id] if id in old and rng.random() < 0.7 else bandwidth(id) for id in id_of or [None]]
    else:
        limits = [bandwidth(id) for id in id_of or [None]]
    return BucketConfiguration(*limits)


def replacing(rng: random.Random, command: Command[Any], limits: Callable[[], BucketConfiguration]) -> Command[Any]:
    """A command that puts limits in the place of others, alone or among what else is done."""
    parts: list[Command[Any]] = [
        ReplaceConfiguration(limits(), rng.choice(INHERITANCES)) for _ in range(rng.choice([1, 1, 1, 2]))
    ]
    if rng.random() < 0.4:
        return parts[0] if rng.random() < 0.7 else Verbose(parts[0])
    if rng.random() < 0.5:
        parts.append(command)
    parts = [part for part in parts for _ in range(rng.choice([1, 1, 2]))]
    rng.shuffle(parts)
    return Batch((command, *parts))


def everyday_case(rng: random.Random) -> Case:
    now = NOW + rng.randrange(DAY) if rng.random() < 0.5 else (NOW + rng.randrange(DAY)) // MILLISECOND * MILLISECOND
    count = rng.choice([1, 1, 1, 2, 3])
    configuration = BucketConfiguration(*(everyday_bandwidth(rng, now, id) for id in ids(rng, count, odd=False)))
    version = rng.choice([None, None, 1, 7])
    before, must_exist = None, False
    if rng.random() < 0.9:
        states = tuple(everyday_state(rng, bandwidth, now) for bandwidth in configuration)
        consumed = rng.choice([CONSUMED, rng.randrange(10**9)])
        before = codec.encode(BucketState(configuration, version, consumed, states))
        must_exist = rng.random() < 0.1
        if rng.random() < 0.1:
            before += rng.randbytes(rng.randint(1, 20))
    plan = Terms(configuration, rng.choice([None, version]))
    command = everyday_command(rng, configuration.bandwidths[0].capacity)

    def others() -> BucketConfiguration:
        return other_limits(rng, configuration, lambda name: everyday_bandwidth(rng, now, name), odd=False)

    if rng.random() < 0.2:
        plan = Terms(others(), rng.choice([1, 7, 8, 9]), rng.choice(INHERITANCES))
    if rng.random() < 0.1:
        command = replacing(rng, command, others)
    return flagged(rng, Case(before, command, plan, expiration(rng), now, must_exist, everyday=True))


def flagged(rng: random.Random, case: Case) -> Case:
    if plain_consumption(case.command) is None:
        return case
    return case._replace(flags=rng.choice([0, 0, STRICT, COUNTING, STRICT | COUNTING]))


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
    consumed = rng.choice([CONSUMED, edge(rng)])
    before = codec.encode(BucketState(configuration, version, consumed, states)) if rng.random() < 0.9 else None
    wanted = rng.choice([None, None, edge(rng), 4, 5, 6])
    rules = expiration(rng)
    if rng.random() < 0.1:
        rules = replace(rules, duration_millis=edge(rng))
    command = edge_command(rng) if rng.random() < 0.5 else everyday_command(rng, 1000)

    def others() -> BucketConfiguration:
        return other_limits(
            rng,
            configuration,
            lambda name: edge_bandwidth(rng, name) if rng.random() < 0.5 else everyday_bandwidth(rng, NOW, name),
            odd=True,
        )

    if rng.random() < 0.2:
        command = replacing(rng, command, others)
    limits = configuration if rng.random() < 0.7 else others()
    plan = Terms(limits, wanted, rng.choice(INHERITANCES))
    return flagged(rng, Case(before, command, plan, rules, now, rng.random() < 0.1, everyday=False))


def garbled_case(rng: random.Random) -> Case:
    """Bytes that are wrong in one place, or are cut off."""
    case = everyday_case(rng)
    data = bytearray(case.before or codec.encode(BucketState.initial(case.plan.configuration, 3, case.now)))
    for _ in range(rng.choice([1, 1, 2])):
        position = rng.choice([rng.randrange(len(data)), rng.randrange(min(76, len(data))), len(data) - 9])
        data[position] = rng.choice([0, 1, 2, 3, 255, rng.randrange(256)])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    return case._replace(before=bytes(data), everyday=False)


PEOPLES_LIMITS = [
    *("100/minute", "1000/day", "10/second burst 50", "5000/hour", "100000/hour", "1000000/week", "1/hour", "3/second"),
    *("60/minute burst 10", "7777/day", "12345/hour", "10000000/day", "5/15 minutes", "10000/30 days", "1/second"),
    *("1000000/week burst 3000000", "1000/day burst 5000", "1000/30 days", "1000000000/day", "100/hour initial 7"),
    *("10/second burst 50; 1000/hour", "100/minute; 5000/day", "5/second; 100000/30 days", "1/second; 60/minute"),
]
EDGES_OF_PRODUCTS = [2**53, 2**63]


def greedy_bandwidth(rng: random.Random) -> Bandwidth:
    """Return limits of any size for which doubles may do, and some for which they may not."""
    period = rng.choice([log_uniform(rng, 2**54), rng.choice([1, 7, 60, 3600, 86_400, 604_800, 2_592_000]) * SECOND])
    capacity = rng.choice([log_uniform(rng, 2**20), log_uniform(rng, 2**54), rng.randint(1, 100)])
    rate = min(period, rng.choice([log_uniform(rng, 2**40), log_uniform(rng, 2**53), capacity, rng.randint(1, 50)]))
    initial = rng.choice([capacity, capacity, rng.randint(0, capacity), capacity + 1])
    return Bandwidth(capacity=capacity, refill_tokens=rate, refill_period_nanos=period, initial_tokens=initial)


def elapsed_at_an_edge(rng: random.Random, bandwidth: Bandwidth) -> int:
    """Return nanoseconds since a last refill that bring a product to an edge, a period to its end, or are ordinary."""
    period, rate = bandwidth.refill_period_nanos, bandwidth.refill_tokens
    return rng.choice(
        [
            *(0, -log_uniform(rng, 2**40), log_uniform(rng, 2**45), log_uniform(rng, 2**54)),
            rng.randint(0, 2 * period),
            period * rng.randint(0, 5) + rng.randint(-2, 2),
            rng.choice(EDGES_OF_PRODUCTS) // rate + rng.randint(-1000, 1000) * rng.choice([0, 1, 1000]),
        ]
    )


def part_at_an_edge(rng: random.Random, bandwidth: Bandwidth, elapsed: int, missing: int) -> int:
    """Return the part of a token that brings a sum to an edge, or a wait to a whole millisecond."""
    period, rate = bandwidth.refill_period_nanos, bandwidth.refill_tokens
    since = elapsed % period if elapsed > period else elapsed
    wanted = [
        *(0, 1, period - 1, rng.randrange(period), rng.randrange(period)),
        rng.choice(EDGES_OF_PRODUCTS) - since * rate + rng.choice([rng.randint(-3, 3), rng.randint(-5000, 5000)]),
        missing * period % (rate * MILLISECOND) + rng.randint(-2, 2),
    ]
    part = rng.choice(wanted)
    return part if 0 <= part < period else rng.randrange(period)


def greedy_case(rng: random.Random, *, of_people: bool = False) -> Case:
    """Return a case of what the script decides in doubles, at the edges of that or as people have it."""
    if of_people or rng.random() < 0.6:
        configuration = BucketConfiguration.parse(rng.choice(PEOPLES_LIMITS))
    else:
        configuration = BucketConfiguration(*(greedy_bandwidth(rng) for _ in range(rng.choice([1, 1, 2]))))
    now = NOW + rng.randrange(DAY)
    smallest = min(bandwidth.capacity for bandwidth in configuration)
    tokens = rng.choice([1, 1, 1, rng.randint(1, 10), rng.randint(1, smallest + 1)])
    calls = rng.choice([1, 1, 1, rng.randint(2, 60)])
    states = []
    for bandwidth in configuration:
        capacity = bandwidth.capacity
        elapsed = rng.randrange(2 * DAY) if of_people else elapsed_at_an_edge(rng, bandwidth)
        size = rng.choice([rng.randint(0, capacity), 0, capacity, capacity - 1, min(capacity, rng.randint(0, 5))])
        if not of_people and rng.random() < 0.1:
            size = rng.choice([-rng.randint(1, 1000), -log_uniform(rng, 2**54), capacity + 1])
        part = part_at_an_edge(rng, bandwidth, elapsed, capacity - size + tokens) if size < capacity else 0
        states.append(BandwidthState(now - elapsed, size, part))
    consumed = rng.randrange(10**9) if of_people or rng.random() < 0.95 else rng.choice([-1, 2**53 - 5, MAX, MIN])
    version = rng.choice([None, 7])
    before = codec.encode(BucketState(configuration, version, consumed, tuple(states)))
    command: Command[Any] = TryConsume(tokens) if rng.random() < 0.5 else TryConsumeAndReturnRemaining(tokens)
    if calls > 1:
        command = Batch((command,) * calls)
    made = Case(
        None if rng.random() < 0.1 else before,
        command,
        Terms(configuration, version),
        expiration(rng),
        now,
        must_exist=False,
        everyday=of_people,
    )
    return made if of_people else flagged(rng, made)


QUOTAS = [
    *(
        "1000/month tz Europe/Berlin",
        "50/day calendar",
        "10/second burst 50; 1000/month",
        "500/week tz Asia/Kolkata id x",
    ),
    *("5/second; 100/minute; 1000/day tz America/New_York", "20/hour id a; 100/day calendar; 5000/year; 1000/month"),
]


def calendar_case(rng: random.Random) -> Case:
    """Return a case of a bucket that was used some time ago, perhaps in an earlier period or under other versions."""
    now = NOW + rng.randrange(400 * DAY)
    old, new = rng.choice([(None, None), (0, 0), (3, 3), (3, 4), (2**39 - 2, 2**39 - 1), (None, 1), (4, 3)])
    configuration = BucketConfiguration.parse(rng.choice(QUOTAS))
    former = configuration if rng.random() < 0.8 else BucketConfiguration.parse(rng.choice(QUOTAS))
    before = None
    if rng.random() < 0.9:
        earlier = now - log_uniform(rng, 100 * DAY)
        made = terms_of(former, old, TokensInheritance.RESET).initial(earlier)
        states = tuple(everyday_state(rng, bandwidth, earlier) for bandwidth in made.configuration)
        version = made.configuration_version if rng.random() < 0.8 else rng.choice([None, 3])
        before = codec.encode(BucketState(made.configuration, version, CONSUMED, states))
    command = everyday_command(rng, 100)
    if rng.random() < 0.1:
        command = replacing(rng, command, lambda: BucketConfiguration.parse(rng.choice(QUOTAS)))
    plan = terms_of(configuration, new, rng.choice(INHERITANCES))
    return flagged(rng, Case(before, command, plan, expiration(rng), now, must_exist=False, everyday=True))


def any_case(rng: random.Random) -> Case:
    if rng.random() < 0.1:
        return calendar_case(rng)
    kind = rng.random()
    if kind < 0.4:
        return greedy_case(rng)
    return everyday_case(rng) if kind < 0.8 else edge_case(rng) if kind < 0.95 else garbled_case(rng)


class Tally:
    def __init__(self) -> None:
        self.cases = self.stored = self.left = self.refused = self.traceless = self.counted = 0
        self.everyday = 0

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.everyday} of them everyday: {self.stored} stored, {self.left} changed nothing, "
            f"{self.counted} were answered by a number; {self.traceless} would have left no trace; "
            f"handed back {self.refused} that the script must not decide, and {self.undecided} others "
            f"({self.undecided / self.cases:.2%})"
        )

    @property
    def undecided(self) -> int:
        return self.cases - self.stored - self.left - self.refused - self.traceless

    def check(self, case: Case, reply: list[Any], stored: bytes | None, pttl: int) -> None:
        decided, before, ttl = reply
        self.cases += 1
        self.everyday += case.everyday
        expected = by_the_core(case)
        if type(before) is int:
            assert case.flags & COUNTING, case
            assert expected is not None, case
            assert before == case.consumed(expected), case
            self.counted += 1
        else:
            assert before == case.before or (case.before == b"" and case.must_exist), case  # read, it is not there
        if expected is not None and case.flags & STRICT and not case.leaves_a_trace(expected):
            assert (decided, stored) == (0, case.before), case
            self.traceless += 1
            return
        if expected is None:
            assert decided == 0, case
            self.refused += 1
        if not decided:
            assert not case.everyday or expected is None, case
            assert (stored, ttl) == (case.before, -2), case
        elif expected is not None and expected.ttl is not None:
            assert Outcome(stored, int(ttl)) == expected, (case, expected)
            self.stored += 1
            assert pttl == -1 if expected.ttl == -1 else expected.ttl - 60_000 <= pttl <= expected.ttl, case
        elif expected is not None:
            assert (stored, ttl) == (expected.stored, -2), case
            self.left += 1
        if int(ttl) == -2:
            assert pttl == -2 if stored is None else OLD_TTL - 60_000 <= pttl <= OLD_TTL, case


def compared(client: redis.Redis, script: bytes, most: int) -> Tally:
    """Run a script on cases at random, and compare what it does with what the core does."""
    rng, tally = random.Random(SEED), Tally()
    sha = client.script_load(script)
    while tally.cases < most:
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
    return tally


def test_script_and_core_agree_to_the_byte_on_random_cases(client: redis.Redis) -> None:
    tally = compared(client, TELLING, CASES)
    print(tally)
    assert tally.undecided < 0.02 * tally.cases, tally


MUTANTS = [
    ("gained >= 2^53", "gained >= 2^56"),
    ("since = elapsed % period", "since = elapsed"),
    ("gained < 2^63 - 2^12", "gained < 2^66"),
    ("gained - whole * odd", "gained"),
    ("size, part = capacity, 0", "size = capacity"),
    ("part = gained % period", "part = 0"),
    ("available - available % tokens", "available"),
    ("elapsed <= 0 and strict", "elapsed < 0 and strict"),
    ("elseif strict and exact then", "elseif false then"),
    ("taken == 0 and exact and not missing", "taken == 0 and exact and false"),
    ("if size < available then", "if false then"),
    ("full + -full % NANOS_PER_MILLISECOND", "full - full % NANOS_PER_MILLISECOND"),
    ("wait > full", "true"),
    ("needed < 2^63 - 2^12", "needed < 2^66"),
    ("missing * ((period - odd) / rate)", "missing * (period / rate)"),
    ("wait = needed - part", "wait = needed"),
    ("local same_when_new = initial == capacity\n", "local same_when_new = true\n"),
    ("initial == capacity and initial_2 == capacity_2", "initial == capacity"),
    ("ttl < 1 and 1 or ttl", "ttl"),
    ("size <= capacity", "true"),
    ("size_2 <= capacity_2", "true"),
    ("part < period", "true"),
    ("statistics == 1", "true"),
    ("suffix:byte() == 1", "true"),
    ("formats == 2 * 2^32 + 1", "true"),
    ("version >= wanted_version", "true"),
    ("stored:sub(72)", "request"),
    ("stored:sub(119)", "request"),
    ("stored:sub(143)", "request"),
    ("after .. suffix", "after"),
    ("consumed + tokens * times < 2^53", "true"),
    ("counting and 0 or before", "before and 0"),
]
"""Changes of the everyday case, each of which breaks something."""


@pytest.mark.any_server
@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_a_mutant_of_the_everyday_case_is_found(client: redis.Redis, right: str, wrong: str) -> None:
    everyday, functions, rest = TELLING.partition(b"local function not_a_number")
    mutant = everyday.replace(right.encode(), wrong.encode())
    assert mutant != everyday
    with pytest.raises((AssertionError, redis.ResponseError)):
        compared(client, mutant + functions + rest, 30_000)


def test_what_people_limit_is_decided_without_functions(client: redis.Redis) -> None:
    rng, left = random.Random(SEED), 0
    before_functions, _, _ = TELLING.partition(b"local function whole")
    sha = client.script_load(before_functions + b"return 'left'")
    for _ in range(3000):
        case = greedy_case(rng, of_people=True)
        client.delete("key")
        if case.before is not None:
            client.set("key", case.before)
        left += client.evalsha(sha, 1, "key", *case.request()) == b"left"
    assert left == 0


def decided(client: redis.Redis, case: Case) -> list[Any]:
    """The reply of the script itself, on the state of the case."""
    client.delete("key")
    if case.before is not None:
        client.execute_command("SET", "key", case.before, "PX", OLD_TTL)
    reply: Any = client.execute_command("EVAL", TELLING, 1, "key", *case.request())
    assert isinstance(reply, list)
    assert reply[1] == case.before
    return reply


def after(client: redis.Redis, case: Case) -> BucketState:
    """What is stored where the script has decided, which has to be what the core stores, and for as long."""
    begin = time.monotonic()
    assert decided(client, case)[0] == 1
    stored, pttl = client.get("key"), client.pttl("key")
    assert isinstance(stored, bytes)
    expected = by_the_core(case)
    assert expected is not None
    assert stored == expected.stored
    assert isinstance(pttl, int)
    ttl = OLD_TTL if expected.ttl is None else expected.ttl
    passed = int((time.monotonic() - begin) * 1000) + 2
    assert pttl == -1 if ttl == -1 else ttl - passed <= pttl <= ttl
    return codec.decode(stored)


def case(
    bandwidth: BucketConfiguration | Bandwidth | str,
    *numbers: tuple[int, int, int],
    command: Command[Any] | None = None,
    expiration: Expiration | None = None,
    version: int | None = None,
    wanted: int | None = None,
    must_exist: bool = False,
) -> Case:
    """A command, by default one that consumes a token, on a bucket with these numbers; none: it is missing."""
    configuration = BucketConfiguration.of(bandwidth)
    states = tuple(BandwidthState(*three) for three in numbers)
    before = codec.encode(BucketState(configuration, version, 0, states)) if states else None
    return Case(
        before,
        command or TryConsume(1),
        Terms(configuration, wanted),
        expiration or Expiration.automatic(),
        NOW,
        must_exist,
        everyday=True,
    )


def sizes(state: BucketState) -> list[int]:
    return [one.current_size for one in state.bandwidth_states]


MONTH = 30 * DAY


@pytest.mark.parametrize(
    ("bandwidth", "before", "left"),
    [
        ("10/second", (NOW - SECOND // 4, 0, 0), (NOW, 1, SECOND // 2)),
        ("10/second", (NOW + SECOND, 5, 3), (NOW + SECOND, 4, 3)),  # of a clock that went ahead
        ("1000000/day", (NOW - HOUR, 0, 7), (NOW, 41665, 57600 * 10**9 + 7)),
        ("1000000/day", (NOW - 3 * HOUR, 0, 7), (NOW, 124999, 0)),  # in doubles, as the product overflows
        ("100/hour burst 1000000000", (NOW - 4 * MONTH, -5, 0), (NOW, 287_994, 0)),
        ("1000000000/second", (NOW - 1, 0, 0), (NOW, 0, 0)),
        ("1000/365d", (NOW - 2 * MONTH, 0, 1), (NOW, 163, 12_096_000 * SECOND + 1)),
        ("5/hour intervally", (NOW - 3 * HOUR // 2, 1, 0), (NOW - HOUR // 2, 5 - 1, 0)),
        ("5/hour burst 100 intervally", (NOW - 3 * MONTH - 1, -20, 0), (NOW - 1, 99, 0)),
        ("7/minute", (NOW, 9, 4), (NOW, 8, 4)),  # above the capacity
    ],
)
def test_a_bandwidth_is_refilled_and_a_token_taken(
    client: redis.Redis, bandwidth: str, before: tuple[int, int, int], left: tuple[int, int, int]
) -> None:
    state = after(client, case(bandwidth, before))
    assert state.bandwidth_states == (BandwidthState(*left),)
    assert state.consumed_tokens == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_aligned_bandwidth_begins_where_its_calendar_does(client: redis.Redis, adaptive: bool) -> None:
    day = Bandwidth.intervally_aligned(
        1000, 86_400, first_refill=datetime(2023, 11, 15, tzinfo=UTC), adaptive_initial_tokens=adaptive
    )
    (state,) = after(client, case(day)).bandwidth_states
    assert state.last_refill_time_nanos == NOW // DAY * DAY
    assert state.current_size == (74 if adaptive else 1000) - 1  # what is left of the day, which ends at 00:00


def test_several_bandwidths_give_what_the_scarcest_has(client: redis.Redis) -> None:
    several = BucketConfiguration.parse("10/second; 100/hour; 1000/day intervally")
    states = [BandwidthState(NOW, size, 0) for size in (8, 3, 500)]
    before = codec.encode(BucketState(several, None, 0, tuple(states)))
    command = ConsumeAsMuchAsPossible(5)
    everything = Case(before, command, Terms(several), Expiration.automatic(), NOW, must_exist=False, everyday=True)
    assert sizes(after(client, everything)) == [5, 0, 497]


EACH_OPERATION: list[tuple[Command[Any], int]] = [
    (ConsumeAsMuchAsPossible(2), 1),
    (Reserve(25), -22),
    (Reserve(25, SECOND), 3),
    (ConsumeIgnoringRateLimits(1000), -997),
    (GiveBack(4), 7),
    (GiveBack(100), 10),
    (Settle(6, 2), 7),
    (Settle(6, 1006), -997),
    (Batch((Reserve(25), Cancel(25, 25))), 3),
    (Batch((Reserve(25), Reserve(1), Cancel(25, 25))), -23),
    (Batch((Reserve(1), TryConsume(1), Cancel(1, 1))), 2),
    (AddTokens(100), 10),
    (ForceAddTokens(100), 103),
    (Reset(), 10),
    (Book(1000), -997),
    (HoldBack(2 * SECOND), -19),
    (Batch((HoldBack(SECOND), HoldBack(2 * SECOND), HoldBack(SECOND))), -19),
    (Synchronize(4, Verbose(TryConsume(1)), booking=True), -1),
    (Synchronize(2, TryConsume(1), booking=True), 0),
    (TryConsume(4), 3),
    (TryConsumeAndReturnRemaining(3), 0),
    (Verbose(TryConsume(2)), 1),
    (Batch((TryConsume(2), TryConsume(2), GetAvailableTokens(), TryConsume(1))), 0),
    (Batch((TryConsume(1),) * 1000), 0),
    (Batch((ForceAddTokens(900), *(TryConsume(1),) * 1000, Reserve(7))), -7),
    (ReplaceConfiguration(BucketConfiguration.parse("100/second"), TokensInheritance.ADDITIVE), 93),
    (Batch((Reserve(25), Cancel(25, 25, ((1, 0),)))), 4),
]
"""Commands, and how many tokens of 3 they leave."""


@pytest.mark.parametrize(("command", "size"), EACH_OPERATION)
def test_each_operation(client: redis.Redis, command: Command[Any], size: int) -> None:
    assert sizes(after(client, case("10/second", (NOW, 3, 0), command=command))) == [size]


def test_no_operation_is_forgotten_here() -> None:
    sent = [case("10/second", command=command).request()[0] for command, _ in EACH_OPERATION]
    numbers = {packed[13 + 21 * place] for packed in sent for place in range(*struct.unpack_from(">H", packed, 11))}
    assert numbers == set(Operation)


def test_a_reservation_that_waits_under_several_limits_is_undone_to_the_byte(client: redis.Redis) -> None:
    limits = "1/second burst 1; 100/hour intervally"
    before = case(limits, (NOW, 1, 0), (NOW, 0, 0))
    reserved = after(client, before._replace(command=Reserve(2)))
    assert reserved.bandwidth_states == (BandwidthState(NOW, -3600, 0), BandwidthState(NOW, -2, 0))
    _, answer = execute(Reserve(2), before.plan, codec.decode(before.before or b""), NOW)
    assert answer.noted is not None
    cancel = Cancel(2, answer.noted, answer.surplus)
    undone = after(client, before._replace(before=codec.encode(reserved), command=cancel))
    assert codec.encode(undone) == before.before


@pytest.mark.parametrize(
    ("rules", "ttl"),
    [
        (Expiration.none(), -1),
        (Expiration.fixed(1.5), 1500),
        (Expiration.after_refill(60), 60_000 + 9_600_000),
        (Expiration.automatic(), 10_000 + 9_600_000),
        (Expiration("fixed", 2**53), 2**53),
        (Expiration("fixed", 2**60), 2**53),
        (Expiration("fixed", -3), -1),
        (Expiration("after_refill", MAX), 1),
    ],
)
@pytest.mark.parametrize("limits", ["9/hour", "9/hour burst 9 intervally"])
def test_the_time_to_live_of_what_is_stored(client: redis.Redis, rules: Expiration, ttl: int, limits: str) -> None:
    one = case("9/hour", (NOW, -14, 0), command=Reserve(1), expiration=rules)
    outcome = by_the_core(one)
    assert outcome is not None
    assert outcome.ttl == ttl
    if ttl != 1:  # gone before it is looked at
        after(client, one)
        after(client, case(limits, (NOW, 9, 0), expiration=rules))


@pytest.mark.parametrize("unfinished", [0, 1, 10**12 - 1, 10**12])
@pytest.mark.parametrize("missing", [500, 5000, 106_750, 106_751, 106_752, 200_000])
@pytest.mark.parametrize("limits", ["1000000/day", "1000000/day; 1000000/day"])
def test_the_time_to_live_where_a_wait_is_a_whole_number_of_milliseconds_or_just_not(
    client: redis.Redis, limits: str, missing: int, unfinished: int
) -> None:
    numbers = (NOW, 1_000_001 - missing, unfinished)
    one = case(limits, *[numbers] * (1 + limits.count(";")))
    expected = by_the_core(one)
    assert expected is not None
    assert told_ttl(client, one) == expected.ttl


def test_the_time_to_live_of_a_bucket_that_has_been_full_for_a_while_by_its_numbers(client: redis.Redis) -> None:
    unsound = (NOW, 9, 2 * SECOND + 15_000_001)  # the two missing tokens were due 1.5000001 ms ago
    one = case("10/second", unsound, expiration=Expiration.after_refill(60))
    assert told_ttl(client, one) == 60_000 - 1
    assert told_ttl(client, one._replace(expiration=Expiration.automatic())) == 10_000 + MAX // MILLISECOND


def told_ttl(client: redis.Redis, one: Case) -> int:
    """What the script gives as the time to live, exactly."""
    assert one.before is not None
    client.set("key", one.before)
    reply = client.execute_command("EVAL", TELLING, 1, "key", *one.request())
    assert isinstance(reply, list)
    assert reply[:2] == [1, one.before]
    return int(reply[2])


def test_a_bucket_that_would_not_come_back_as_it_was_is_kept(client: redis.Redis) -> None:
    poor = Bandwidth.greedy(10, 1, initial_tokens=1)
    after(client, case(poor, (NOW, 10, 0)))
    ttl = client.pttl("key")
    assert isinstance(ttl, int)
    assert 30 * 86_400_000 <= ttl + 60_000 <= 30 * 86_400_000 + 61_000


def test_a_missing_bucket_is_made_even_for_a_rejection(client: redis.Redis) -> None:
    state = after(client, case("10/second", command=TryConsume(11), wanted=4))
    assert (sizes(state), state.configuration_version) == ([10], 4)
    assert sizes(after(client, case("10/second", command=Batch((GetAvailableTokens(),))))) == [10]


def test_a_rejection_stores_not_even_the_refill(client: redis.Redis) -> None:
    rejected = case("10/second", (NOW - SECOND // 2, 0, 0), command=TryConsume(6))
    assert decided(client, rejected)[0] == 1
    assert client.get("key") == rejected.before
    ttl = client.pttl("key")
    assert isinstance(ttl, int)
    assert ttl > OLD_TTL - 60_000


def assert_handed_back(client: redis.Redis, handed_back: Case) -> None:
    assert decided(client, handed_back)[0] == 0
    assert client.get("key") == handed_back.before


def test_a_missing_bucket_that_must_exist_is_handed_back(client: redis.Redis) -> None:
    assert_handed_back(client, case("10/second", must_exist=True))
    assert client.exists("key") == 0


@pytest.mark.parametrize("inheritance", INHERITANCES)
@pytest.mark.parametrize(("version", "wanted"), [(None, 1), (1, 2), (-(2**60), 1 - 2**60), (2**60, 2**60 + 1)])
def test_a_configuration_of_a_lower_version_is_replaced(
    client: redis.Redis, version: int | None, wanted: int, inheritance: TokensInheritance
) -> None:
    lower = case("10/second", (NOW, 3, 0), version=version)
    state = after(client, lower._replace(plan=Terms(BucketConfiguration.parse("100/second"), wanted, inheritance)))
    left = {"RESET": 99, "AS_IS": 2, "ADDITIVE": 92, "PROPORTIONALLY": 29}
    assert (sizes(state), state.configuration_version) == ([left[inheritance.name]], wanted)
    assert str(state.configuration) == "100/second"


@pytest.mark.parametrize("inheritance", INHERITANCES)
def test_a_verb_replaces_the_configuration_and_keeps_the_version(
    client: redis.Redis, inheritance: TokensInheritance
) -> None:
    command = Batch((TryConsume(1), ReplaceConfiguration(BucketConfiguration.parse("100/second"), inheritance)))
    state = after(client, case("10/second", (NOW, 3, 0), version=7, command=command))
    left = {"RESET": 100, "AS_IS": 2, "ADDITIVE": 92, "PROPORTIONALLY": 20}
    assert (sizes(state), state.configuration_version) == ([left[inheritance.name]], 7)


@pytest.mark.parametrize("limits", ["é", "\ud800", "\0\U0001f600"])
def test_ids_of_any_characters_find_their_bandwidths_again(client: redis.Redis, limits: str) -> None:
    old = BucketConfiguration(Bandwidth.greedy(10, 1, id=limits), Bandwidth.greedy(50, 1))
    new = BucketConfiguration(
        Bandwidth.greedy(30, 1), Bandwidth.greedy(20, 1, id=limits), Bandwidth.greedy(5, 1, id="5")
    )
    state = after(
        client,
        case(old, (NOW, 3, 0), (NOW, 9, 0), command=ReplaceConfiguration(new, TokensInheritance.AS_IS)),
    )
    assert sizes(state) == [9, 3, 5]


@pytest.mark.parametrize("nanos", [1, SECOND // 10, SECOND, 365 * DAY, 2**53, MAX])
def test_nobody_gets_a_token_of_what_is_held_back(client: redis.Redis, nanos: int) -> None:
    limits = "10/second; 100/hour; 1000/day intervally"
    held = case(limits, *[(NOW, 3, 7)] * 2, (NOW - HOUR, 5, 0), command=HoldBack(nanos))
    state = after(client, held)
    assert state.nanos_until(1, NOW, check_capacity=False) >= nanos
    again = held._replace(before=codec.encode(state), now=NOW + 1)
    assert sizes(after(client, again._replace(command=HoldBack(max(1, nanos - 1))))) == sizes(state)


@pytest.mark.parametrize(("version", "wanted"), [(1, None), (None, None), (2, 1), (2**60, 2**60), (2**60 + 1, 2**60)])
def test_a_version_that_is_wanted_or_higher_will_do(
    client: redis.Redis, version: int | None, wanted: int | None
) -> None:
    state = after(client, case("10/second", (NOW, 3, 0), version=version, wanted=wanted))
    assert (sizes(state), state.configuration_version) == ([2], version)


@pytest.mark.parametrize("version", [None, 3])
def test_every_shorter_part_of_a_state_is_handed_back(client: redis.Redis, version: int | None) -> None:
    whole = case(Bandwidth.greedy(10, 1, id="one"), (NOW, 3, 0), version=version)
    assert whole.before is not None
    for length in range(len(whole.before)):
        assert_handed_back(client, whole._replace(before=whole.before[:length]))


@pytest.mark.parametrize(
    ("position", "byte"),
    [(3, 0), (3, 3), (7, 2), (11, 0), (15, 2), (62, 4), (66, 2), (70, 4), (98, 2), (48, 2), (57, 7), (58, 9)],
)
def test_another_format_and_odd_bytes_are_handed_back(client: redis.Redis, position: int, byte: int) -> None:
    sound = case("10/second", (NOW, 3, 0))
    assert sound.before is not None
    odd = bytearray(sound.before)
    odd[position] = byte
    assert_handed_back(client, sound._replace(before=bytes(odd)))


def test_garbage_is_handed_back(client: redis.Redis) -> None:
    for garbage in (b"", b"5", b"\0" * 107, b"\xff" * 116, b"{}" * 60):
        assert_handed_back(client, case("10/second", (NOW, 3, 0))._replace(before=garbage))


@pytest.mark.parametrize(
    "ids",
    [
        *([b"\0\0\0"], [b"\xc1\x81a"], [b"\xe0\x80\x80"], [b"\xe0\x9f\xbf"], [b"\xc3aa"], [b"aa\xc3"], [b"\x80aa"]),
        *([b"\xf0\x9f\x98"], [b"\xe2a\x82"], [b"aa\xe2"], [b"\xc3\xc3\xa9"], [b"same", b"same"]),
    ],
)
def test_ids_that_would_be_written_differently_or_clash_are_handed_back(client: redis.Redis, ids: list[bytes]) -> None:
    configuration = BucketConfiguration(
        *(Bandwidth.greedy(10, 1, id=f"{place}" * len(id)) for place, id in enumerate(ids))
    )
    before = codec.encode(BucketState(configuration, None, 0, (BandwidthState(NOW, 3, 0),) * len(ids)))
    for place, id in enumerate(ids):
        before = before.replace(f"{place}".encode() * len(id), id)
    assert_handed_back(client, case("10/second", (NOW, 3, 0))._replace(before=before))


def test_bytes_after_the_end_are_lost_at_the_next_write(client: redis.Redis) -> None:
    for version in (None, 3):
        for rest in (b"\0", b"more of it"):
            sound = case("10/second", (NOW, 3, 0), version=version)
            assert sound.before is not None
            assert sizes(after(client, sound._replace(before=sound.before + rest))) == [2]
            assert client.strlen("key") == len(sound.before)


def test_another_type_is_an_error(client: redis.Redis) -> None:
    client.hset("key", "field", "value")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        client.eval(SCRIPT.text.decode(), 1, "key", *case("10/second").request())


def test_sizes_wrap_as_everywhere(client: redis.Redis) -> None:
    largest = case("10/second", (NOW, MIN, 0), command=ConsumeIgnoringRateLimits(2))
    assert client.exists("key") == 0
    assert sizes(after(client, largest._replace(command=ForceAddTokens(MAX)))) == [-1]
    full = case("10/second", (NOW, MAX, 0))
    assert sizes(after(client, full._replace(command=ForceAddTokens(1)))) == [MAX]
    assert sizes(after(client, full._replace(command=AddTokens(1)))) == [10]
    assert sizes(after(client, full._replace(command=TryConsume(MAX)))) == [0]
