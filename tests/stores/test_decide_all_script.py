"""The script that decides about several buckets makes the very transition that the core makes, to the byte."""

from __future__ import annotations

import random
import struct
from collections.abc import Generator
from typing import Any, NamedTuple

import pytest
import redis

from ratelimit import BucketConfiguration, Expiration
from ratelimit.core.algorithm import State, encode
from ratelimit.core.commands import Command, Settle, Terms, TryConsumeAndReturnRemaining, Verbose
from ratelimit.core.several import execute_all
from ratelimit.core.token_bucket import codec
from ratelimit.engine.last_seen import NOTHING_SEEN
from ratelimit.engine.question import Part, Target
from ratelimit.engine.several.attempt import Held
from ratelimit.engine.several.parts import Call
from ratelimit.engine.several.script_arguments import request_for
from ratelimit.errors import CorruptStateError
from ratelimit.stores.redis.scripts import load
from tests.stores.test_decide_script import CASES, LONGEST_TTL, NOW, SECOND, SEED, Case, any_case, greedy_case

pytestmark = pytest.mark.redis

SCRIPT = load("decide_all")
ROUND_TRIP = 200


@pytest.fixture
def client(redis_url: str) -> Generator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


class Together(NamedTuple):
    """Buckets, and what several callers ask of them."""

    buckets: tuple[Case, ...]
    calls: tuple[Call, ...]
    targets: tuple[Target, ...]
    now: int
    of_people: bool

    def request(self) -> tuple[bytes, ...]:
        held = {target.stored_key: Held(target, NOTHING_SEEN) for target in self.targets}
        arguments = request_for(self.calls, held, self.now)
        assert arguments is not None
        return arguments

    @property
    def is_everyday(self) -> bool:
        """Whether nothing in it is out of the ordinary."""
        return self.of_people and all(is_usual(part.command) for call in self.calls for part in call)

    @property
    def keys(self) -> list[bytes]:
        return [target.stored_key for target in self.targets]


def is_usual(command: Command[Any]) -> bool:
    if isinstance(command, Verbose):
        return is_usual(command.command)
    if isinstance(command, Settle):
        # A debt that takes centuries to pay is computed in another way.
        return command.rest < 2**50 and command.excess < 10**6
    return command.tokens < 2**53  # type: ignore[attr-defined, no-any-return]


class Expected(NamedTuple):
    stored: list[bytes | None]
    ttls: list[int | None]


def consumption(rng: random.Random) -> Command[Any]:
    return TryConsumeAndReturnRemaining(rng.choice([1, 1, 2, rng.randint(1, 100), rng.randint(1, 2**54)]))


def settlement(rng: random.Random) -> Command[Any]:
    most = rng.choice([3, 3, 100, 1000, 2**54])
    reserved, used = rng.sample(range(most), 2)
    return Verbose(Settle(reserved, used)) if rng.random() < 0.5 else Settle(reserved, used)


def together(rng: random.Random, number: int) -> Together:
    """Return buckets of any kind, most of which the script can decide, and callers that ask for some of them."""
    of_people = rng.random() < 0.4
    count = rng.choice([1, 2, 2, 3, 3, 5])
    cases = [
        greedy_case(rng, of_people=True) if of_people else greedy_case(rng) if rng.random() < 0.8 else any_case(rng)
        for _ in range(count)
    ]
    now = cases[0].now
    targets = [
        Target(
            b"%d %d" % (number, place), b"%d %d" % (number, place), case.expiration, case.must_exist, case.must_exist
        )
        for place, case in enumerate(cases)
    ]
    calls = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        chosen = rng.sample(range(count), rng.randint(1, count))
        command = settlement if rng.random() < 0.4 else consumption
        calls.append(tuple(Part(targets[place], cases[place].plan, command(rng)) for place in chosen))
    asked = {part.target.stored_key for call in calls for part in call}
    kept = [place for place, target in enumerate(targets) if target.stored_key in asked]
    return Together(
        tuple(cases[place] for place in kept), tuple(calls), tuple(targets[place] for place in kept), now, of_people
    )


def by_the_core(one: Together) -> Expected | None:
    """What the core makes of it; None where it is not for the script to decide."""
    try:
        before: dict[bytes, State | None] = {
            target.stored_key: None if case.before is None else codec.decode(case.before)
            for target, case in zip(one.targets, one.buckets, strict=True)
        }
        if any(state is None and case.must_exist for state, case in zip(before.values(), one.buckets, strict=True)):
            return None
        states, changed = dict(before), set()
        for call in one.calls:
            keys = [part.target.stored_key for part in call]
            afters, _ = execute_all(
                [part.command for part in call], [part.terms for part in call], [states[key] for key in keys], one.now
            )
            for key, after in zip(keys, afters, strict=True):
                if after is not None:
                    states[key] = after
                    changed.add(key)
        stored: list[bytes | None] = []
        ttls: list[int | None] = []
        for target, case in zip(one.targets, one.buckets, strict=True):
            key, state = target.stored_key, states[target.stored_key]
            if key not in changed or state is None:
                stored.append(case.before)
                ttls.append(None)
                continue
            ttl = case.expiration.ttl_millis(state, one.now)
            stored.append(encode(state))
            ttls.append(min(ttl, LONGEST_TTL) if ttl > 0 else -1)
    except (ArithmeticError, CorruptStateError):
        return None
    return Expected(stored, ttls)


class Tally:
    def __init__(self) -> None:
        self.cases = self.decided = self.charged = self.handed_back = 0

    def check(self, one: Together, reply: list[Any], stored: list[bytes | None], pttls: list[int]) -> None:
        done, *before = reply
        befores = [case.before for case in one.buckets]
        assert before == befores, one
        self.cases += 1
        expected = by_the_core(one)
        if not done:
            assert stored == befores, one
            self.handed_back += one.is_everyday and expected is not None
            return
        assert expected is not None, one
        assert stored == expected.stored, (one, expected)
        for pttl, ttl, was in zip(pttls, expected.ttls, befores, strict=True):
            if ttl is None:
                assert pttl == (-2 if was is None else -1), one
            elif ttl == -1:
                assert pttl == -1, one
            else:
                assert ttl - 60_000 <= pttl <= ttl, (one, ttl)
        self.decided += 1
        self.charged += any(after != was for after, was in zip(stored, befores, strict=True))


def compared(client: redis.Redis, script: bytes, most: int) -> Tally:
    """Run a script on cases at random, and compare what it does with what the core does."""
    rng, tally = random.Random(SEED), Tally()
    sha = client.script_load(script)
    while tally.cases < most:
        cases = [together(rng, number) for number in range(ROUND_TRIP)]
        client.flushdb()
        with client.pipeline(transaction=True) as pipe:  # in one transaction no key expires under way
            for one in cases:
                for key, case in zip(one.keys, one.buckets, strict=True):
                    if case.before is not None:
                        pipe.execute_command("SET", key, case.before)
            pipe.execute()
            for one in cases:
                pipe.execute_command("EVALSHA", sha, len(one.keys), *one.keys, *one.request())
                for key in one.keys:
                    pipe.execute_command("GET", key)
                    pipe.execute_command("PTTL", key)
            replies = iter(pipe.execute())
        for one in cases:
            reply = next(replies)
            shown = [(next(replies), next(replies)) for _ in one.keys]
            tally.check(one, reply, [stored for stored, _ in shown], [pttl for _, pttl in shown])
    return tally


def test_script_and_core_agree_to_the_byte_on_random_cases(client: redis.Redis) -> None:
    tally = compared(client, SCRIPT.text, CASES // 6)
    print(vars(tally))
    assert tally.decided > 0.5 * tally.cases
    assert tally.charged > 0.3 * tally.cases
    assert tally.handed_back == 0


MUTANTS = [
    ("admitted and bucket.available >= tokens", "admitted"),
    ("admitted and last or 0", "last"),
    ("bucket.available - tokens", "bucket.available"),
    ("bucket.taken + tokens", "tokens"),
    ("if j == 1 or size < bucket.available then", "if j == 1 then"),
    ("limit[4] - taken", "limit[4]"),
    ("bucket.consumed + taken) .. bucket.suffix", "bucket.consumed + taken)"),
    ("bucket.same_when_new and initial == capacity", "true"),
    ("if bucket.missing or bucket.changed or taken > 0 then", "if bucket.changed or taken > 0 then"),
    ("(elapsed > 0 or missing) and request:sub(1, 8)", "request:sub(1, 8)"),
    ("decidable = decidable and exact\n", "decidable = decidable\n"),
    ("bucket.consumed + taken < 2^53", "true"),
    ("size <= capacity", "true"),
    ("wait > full", "true"),
    ("tokens - (limit[4] - bucket.taken)", "tokens"),
    ("missing * limit[2] < 2^63 - 2^12", "true"),
    ("consumed - tokens, true", "consumed, true"),
    ("consumed - tokens, true", "consumed - tokens, false"),
    ("limit[1], limit[4] - bucket.taken", "limit[1], limit[4]"),
    ("bucket.consumed + bucket.taken\n", "bucket.consumed\n"),
    ("bucket.taken = 0\n", "\n"),
    ("size, limit[5] = capacity, 0", "size = capacity"),
    ("size = size + tokens", "size = size + 1"),
    ("if size >= capacity then\nsize, limit", "if size > capacity + 1 then\nsize, limit"),
    ("if j == 1 or size < bucket.available then\nbucket.available = size\nend\nend\nbucket.taken", "end\nbucket.taken"),
]


@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_a_mutant_is_found(client: redis.Redis, right: str, wrong: str) -> None:
    mutant = SCRIPT.text.replace(right.encode(), wrong.encode())
    assert mutant != SCRIPT.text
    with pytest.raises((AssertionError, redis.ResponseError)):
        compared(client, mutant, 10_000)


TENANT, USER = Target(b"t", b"t", Expiration.automatic()), Target(b"u", b"u", Expiration.automatic())
FIVE, TWO = Terms(BucketConfiguration.parse("5/minute")), Terms(BucketConfiguration.parse("2/minute"))
CALL: Call = (Part(USER, TWO, TryConsumeAndReturnRemaining(1)), Part(TENANT, FIVE, TryConsumeAndReturnRemaining(2)))


def decided(client: redis.Redis, *calls: Call, now: int = NOW) -> list[Any]:
    held = {part.target.stored_key: Held(part.target, NOTHING_SEEN) for call in calls for part in call}
    arguments = request_for(calls, held, now)
    assert arguments is not None
    reply: Any = client.execute_command("EVAL", SCRIPT.text, len(held), *held, *arguments)
    assert isinstance(reply, list)
    return reply


def consumed(client: redis.Redis, key: str) -> int:
    data = client.get(key)
    assert isinstance(data, bytes)
    return codec.decode(data).consumed_tokens


def test_callers_are_decided_one_after_the_other(client: redis.Redis) -> None:
    assert decided(client, CALL, CALL, CALL) == [1, None, None]
    # The third one finds no token of the user, and is charged in no bucket.
    assert (consumed(client, "u"), consumed(client, "t")) == (2, 4)


def test_what_was_consumed_is_settled_between_consumptions(client: redis.Redis) -> None:
    settled: Call = (Part(USER, TWO, Settle(1, 0)), Part(TENANT, FIVE, Settle(2, 3)))
    assert decided(client, CALL, CALL, settled, CALL) == [1, None, None]
    # The last one finds the user's token again, and none of the tenant's.
    assert (consumed(client, "u"), consumed(client, "t")) == (1, 5)


def test_a_debt_that_could_never_be_paid_is_not_for_the_script(client: redis.Redis) -> None:
    assert decided(client, (CALL[0], Part(TENANT, FIVE, Settle(1, 2**62)))) == [0, None, None]
    assert client.mget("u", "t") == [None, None]


def test_a_bucket_that_was_missing_is_made_even_for_a_refusal(client: redis.Redis) -> None:
    greedy: Call = (CALL[0], Part(TENANT, FIVE, TryConsumeAndReturnRemaining(6)))
    assert decided(client, greedy) == [1, None, None]
    assert (consumed(client, "u"), consumed(client, "t")) == (0, 0)


def test_a_refusal_stores_nothing_where_the_buckets_are_there(client: redis.Redis) -> None:
    decided(client, CALL, CALL)
    before = client.mget("u", "t")
    assert decided(client, CALL, now=NOW + SECOND) == [1, *before]
    assert client.mget("u", "t") == before


@pytest.mark.parametrize("odd", [b"garbage", codec.encode(FIVE.initial(NOW))[:-1], struct.pack(">i", 1) * 27])  # type: ignore[arg-type]
def test_nothing_is_changed_where_one_bucket_cannot_be_decided(client: redis.Redis, odd: bytes) -> None:
    client.set("t", odd)
    assert decided(client, CALL) == [0, None, odd]
    assert client.get("u") is None
    assert client.get("t") == odd


def test_nothing_is_changed_where_one_value_is_empty(client: redis.Redis) -> None:
    client.set("t", b"")
    assert decided(client, CALL) == [0, None, b""]
    assert client.get("u") is None
    assert client.get("t") == b""


def test_nothing_is_changed_where_a_bucket_is_missing_that_must_exist(client: redis.Redis) -> None:
    made = Target(b"t", b"t", Expiration.automatic(), must_exist_once_made=True, made=True)
    assert decided(client, (CALL[0], CALL[1]._replace(target=made))) == [0, None, None]
    assert client.mget("u", "t") == [None, None]


def test_another_type_is_an_error_and_nothing_is_changed(client: redis.Redis) -> None:
    client.rpush("t", "one")
    with pytest.raises(redis.ResponseError, match=r"WRONGTYPE|wrong kind of value"):
        decided(client, CALL)
    assert client.get("u") is None
