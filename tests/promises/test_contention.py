"""Buckets that others keep changing: what a decision costs, what it answers, and that everybody gets one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, product
from typing import Any, NamedTuple

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    Bandwidth,
    BucketConfiguration,
    BucketNotFoundError,
    ContentionError,
    CorruptStateError,
    Expiration,
    ProxyManager,
    Recovery,
    RedisStore,
    StoreError,
    TokensInheritance,
    VerboseResult,
)
from ratelimit.core.algorithm import encode
from ratelimit.core.commands import (
    AddTokens,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    HoldBack,
    ReplaceConfiguration,
    Reserve,
    Reserved,
    Reset,
    TakeSnapshot,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
    terms_of,
)
from ratelimit.core.numbers import NEVER
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.last_seen import NOTHING_SEEN
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided, Lost
from ratelimit.testing import ManualClock
from tests.support.both_faces import Face, closing, settled
from tests.support.decision_paths import By, Tap, Way, deciding_by
from tests.support.inside import pipeline_of
from tests.support.redis_monitor import Monitor, monitored
from tests.support.servers import RedisServer
from tests.support.workers import (
    CALLERS,
    PROCESSES,
    Access,
    Decision,
    Workers,
    contend_by_tasks,
    contend_by_threads,
    do_many_verbs_by_tasks,
    do_many_verbs_by_threads,
    patient,
)

pytestmark = pytest.mark.redis

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
GREEDY = BucketConfiguration(Bandwidth.greedy(100, 60))
TWO = BucketConfiguration(
    Bandwidth.greedy(100, 60, id="burst"), Bandwidth.intervally(1000, 3600, initial_tokens=500, id="quota")
)
OTHERS = BucketConfiguration(Bandwidth.greedy(70, 30), Bandwidth.intervally(7000, 3600, id="quota"))
FOREIGN_COMMANDS = ("SUBSTR", "PSETEX", "UNLINK", "TIME")  # of the other writers, and what a command brings along
HUGE = 10**7


class Verb(NamedTuple):
    """A verb of a bucket, with its arguments, and the command that it is."""

    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    command: Command[Any]

    def __str__(self) -> str:
        keywords = (f"{name}={value}" for name, value in self.keywords.items())
        return f"{self.name}({', '.join([*map(str, self.arguments), *keywords])})"

    async def asked(self, bucket: Any) -> Any:
        return await settled(getattr(bucket, self.name)(*self.arguments, **self.keywords))

    def answer(self, value: Any) -> Any:
        """What the verb makes of the answer of its command."""
        if isinstance(value, VerboseResult):
            return replace(value, value=self.answer(value.value))
        return value.wait != NEVER if isinstance(value, Reserved) else value


def verb(command: Command[Any], name: str, *arguments: Any, **keywords: Any) -> Verb:
    return Verb(name, arguments, keywords, command)


VERBS = [
    verb(TryConsume(3), "try_consume", 3),
    verb(TryConsume(HUGE), "try_consume", HUGE),
    verb(TryConsumeAndReturnRemaining(3), "try_consume_and_return_remaining", 3),
    verb(TryConsumeAndReturnRemaining(HUGE), "try_consume_and_return_remaining", HUGE),
    verb(ConsumeAsMuchAsPossible(), "try_consume_as_much_as_possible"),
    verb(ConsumeAsMuchAsPossible(7), "try_consume_as_much_as_possible", 7),
    verb(ConsumeIgnoringRateLimits(1000), "consume_ignoring_rate_limits", 1000),
    verb(Reserve(3), "consume", 3),
    verb(Reserve(200), "consume", 200),
    verb(Reserve(200, 10 * SECOND), "consume", 200, max_wait=10),
    verb(Reserve(200, 10_000 * SECOND), "consume", 200, max_wait=10_000),
    verb(AddTokens(5), "add_tokens", 5),
    verb(ForceAddTokens(500), "force_add_tokens", 500),
    verb(Reset(), "reset"),
    verb(GiveBack(7), "give_back", 7),
    verb(HoldBack(3600 * SECOND), "hold_back", 3600),
    *(verb(ReplaceConfiguration(OTHERS, one), "replace_configuration", OTHERS, one) for one in TokensInheritance),
    verb(EstimateAbilityToConsume(3), "estimate_ability_to_consume", 3),
    verb(GetAvailableTokens(), "available_tokens"),
    verb(TakeSnapshot(), "snapshot"),
]


@dataclass
class Scene:
    """A manager of one face, what it sends, and whoever else there is."""

    manager: Any
    clock: ManualClock
    tap: Tap
    others: redis.Redis
    monitor: Monitor
    make: Callable[..., Any]

    def state(self, key: str = "key") -> BucketState | None:
        stored = self.stored(key)
        return None if stored is None else codec.decode(stored)

    def stored(self, key: str = "key") -> bytes | None:
        stored = self.others.execute_command("SUBSTR", key, 0, -1)
        assert isinstance(stored, bytes)
        return stored or None

    def write(self, state: BucketState, key: str = "key") -> None:
        self.others.psetex(key, 3_600_000, codec.encode(state))

    def take_one(self, key: str = "key", limits: BucketConfiguration = GREEDY) -> None:
        """Another one takes a token."""
        state = self.state(key) or BucketState.initial(limits, None, self.clock.now_nanos())
        self.write(state.refilled(self.clock.now_nanos()).consumed(1), key)

    def commands(self) -> list[str]:
        """What the manager has sent, by what the server has seen."""
        return [command for command in self.monitor.sent() if command not in FOREIGN_COMMANDS]

    def remembered(self, key: str = "key") -> bytes | None:
        return pipeline_of(self.manager).last_seen.get(key.encode(), NOTHING_SEEN).stored

    async def try_consume(self, tokens: int = 1) -> bool:
        return bool(await settled(self.manager.try_consume("key", tokens)))

    async def contend(self) -> None:
        """Lose two swaps, so that the server is asked to decide."""
        for _ in range(2):
            self.take_one()
            await self.try_consume()
        self.tap.taken()
        self.commands()


@pytest.fixture
def redis_url(server: RedisServer) -> str:
    """The URL of a server that only this module uses, because the tests change its permissions."""
    with server.client() as client:
        client.flushall()
    return server.url


@pytest.fixture(params=["sync", "asyncio"])
async def scene(request: pytest.FixtureRequest, redis_url: str) -> AsyncGenerator[Scene]:
    clock = ManualClock(NOW, advance_on_sleep=False)
    with redis.Redis.from_url(redis_url) as others, monitored(redis_url) as monitor:
        if request.param == "sync":
            with redis.Redis.from_url(redis_url) as client:
                store = RedisStore(client)
                make = partial(ProxyManager, store, clock=clock)
                yield await warmed_up(Scene(make(GREEDY), clock, Tap(store), others, monitor, make))
        else:
            async with redis.asyncio.Redis.from_url(redis_url) as aclient:
                astore = AsyncRedisStore(aclient)
                amake = partial(AsyncProxyManager, astore, clock=clock)
                yield await warmed_up(Scene(amake(GREEDY), clock, Tap(astore), others, monitor, amake))
                await astore.aclose()


async def warmed_up(scene: Scene) -> Scene:
    """Let the server know the scripts, and the store the server."""
    for by in (By.SWAPS, By.SCRIPT):
        with deciding_by(by):
            for expiration in (Expiration.automatic(), Expiration.none()):
                bucket = scene.make(GREEDY).bucket(f"warm up {by} {expiration}", expiration=expiration)
                for _ in range(2):
                    await settled(bucket.try_consume())
    scene.tap.taken()
    scene.monitor.sent()
    return scene


class Disturbance:
    """Others who write before each request, and remember what they have left."""

    def __init__(self, scene: Scene, key: str, limits: BucketConfiguration, *, removes: bool, times: int) -> None:
        self.left: bytes | None = scene.stored(key)
        self._scene = scene
        self._key = key
        self._limits = limits
        self._removes = removes
        self._times = times
        self._done = 0

    def __call__(self, _kind: str) -> None:
        if self._done == self._times:
            return
        self._done += 1
        if self._removes and self.left is not None:
            self._scene.others.unlink(self._key)
        elif self._removes:
            self._scene.write(BucketState.initial(self._limits, None, NOW).consumed(self._done), self._key)
        else:
            self._scene.take_one(self._key, self._limits)
        self.left = self._scene.stored(self._key)


async def disturbed(  # all that a decision depends on
    scene: Scene, verb: Verb, plan: Terms, limits: BucketConfiguration, number: int, *, must_exist: bool = False
) -> None:
    """Let others write a bucket of these limits before each request of a decision, and check what that takes.

    :param number: its bits say whether the verb is the verbose one, the bucket is known to the manager, there is one,
        and the others remove it now and then.
    """
    verbose, known, exists, removes = (bool(number >> bit & 1) for bit in range(4))
    key = f"key {plan.inheritance} {number}"
    manager = scene.manager = scene.make(
        plan.configuration,
        configuration_version=plan.version,
        inheritance=plan.inheritance,
        recovery=Recovery.RAISE if must_exist else Recovery.RECONSTRUCT,
    )
    bucket = manager.bucket(key)
    if exists:
        scene.take_one(key, limits)
    if known:
        await settled(bucket.try_consume())
        scene.clock.advance(1)
    disturbance = Disturbance(scene, key, limits, removes=removes, times=NEVER)
    scene.tap.taken()
    scene.commands()
    scene.tap.before = disturbance
    answer, missing = None, False
    try:
        answer = await verb.asked(bucket.verbose if verbose else bucket)
    except BucketNotFoundError:
        missing = True
    finally:
        scene.tap.before = lambda _: None

    round_trips = scene.tap.taken()
    assert 1 <= len(round_trips) <= 3, round_trips
    assert len(scene.commands()) == len(round_trips)
    if missing:
        assert must_exist
        assert scene.stored(key) is None
        return
    command: Command[Any] = Verbose(verb.command) if verbose else verb.command
    before = None if disturbance.left is None else codec.decode(disturbance.left)
    after, value = execute(command, plan, before, scene.clock.now_nanos())
    assert answer == verb.answer(value)
    assert scene.stored(key) == (disturbance.left if after is None else encode(after))
    # What others write as well is not remembered.
    assert scene.remembered(key) in (scene.stored(key), None)


@pytest.mark.parametrize("limits", [GREEDY, TWO], ids=["one limit", "two limits"])
@pytest.mark.parametrize("verb", VERBS, ids=str)
async def test_a_decision_takes_three_round_trips_at_most_and_is_exact(
    scene: Scene, verb: Verb, limits: BucketConfiguration
) -> None:
    for number in range(16):
        await disturbed(scene, verb, Terms(limits), limits, number)


@pytest.mark.parametrize("verb", VERBS, ids=str)
async def test_so_does_one_that_replaces_the_limits_by_a_raised_version(scene: Scene, verb: Verb) -> None:
    for number in range(16):
        inheritance = TokensInheritance((number + number // 4) % 4)
        await disturbed(scene, verb, Terms(TWO, 2, inheritance), GREEDY, number)


@pytest.mark.parametrize("verb", VERBS, ids=str)
async def test_so_does_one_in_a_new_period_of_the_calendar(scene: Scene, verb: Verb) -> None:
    limits = BucketConfiguration.parse("100/second; 1000/day tz Europe/Berlin")
    yesterday = limits.at(NOW - 86_400 * SECOND)
    for number in range(16):
        await disturbed(scene, verb, terms_of(limits, 0, TokensInheritance.AS_IS), yesterday, number)


@pytest.mark.parametrize("verb", VERBS, ids=str)
async def test_so_does_one_whose_bucket_must_exist(scene: Scene, verb: Verb) -> None:
    for number in range(16):
        version = 2 if (number + number // 4) % 2 else None
        await disturbed(scene, verb, Terms(TWO, version), TWO, number, must_exist=True)


@pytest.mark.parametrize("removes", [False, True])
async def test_a_server_that_has_forgotten_its_scripts_costs_one_round_trip_more(scene: Scene, removes: bool) -> None:
    for times in range(4):
        key = f"key {times}"
        scene.others.script_flush()
        scene.tap.taken()
        scene.tap.before = Disturbance(scene, key, GREEDY, removes=removes, times=NEVER)
        await settled(scene.manager.try_consume(key))
        scene.tap.before = lambda _: None
        assert len(scene.tap.taken()) <= 4


async def test_what_has_no_command_takes_one_round_trip(scene: Scene) -> None:
    for expected, ask in (("get", scene.manager.configuration), ("delete", scene.manager.remove)):
        scene.take_one()
        scene.tap.before = Disturbance(scene, "key", GREEDY, removes=False, times=NEVER)
        scene.tap.taken()
        await settled(ask("key"))
        assert scene.tap.taken() == [expected]


@pytest.mark.parametrize("verb", VERBS, ids=str)
def test_a_store_that_loses_every_swap_is_asked_three_times(verb: Verb, redis_url: str) -> None:
    class Losing(RedisStore):
        trips = 0

        def usual_swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> None:
            return None

        def usual_decision(self, key: bytes, arguments: tuple[bytes, ...]) -> None:
            return None

        def get(self, key: bytes, *, deadline: float | None = None) -> bytes | None:
            self.trips += 1
            return super().get(key, deadline=deadline)

        def swapping(
            self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
        ) -> Steps[Lost | None]:
            self.trips += 1
            return Lost((yield super().get(key)))

        def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided | int]:
            self.trips += 1
            return (yield from super().deciding(key, arguments, deadline))

    with redis.Redis.from_url(redis_url) as client:
        for version, verbose in product((None, 1, 2), (False, True)):
            store = Losing(client)
            ProxyManager(RedisStore(client), GREEDY, configuration_version=1).bucket(f"{version}").reset()
            manager = ProxyManager(store, TWO, configuration_version=version, clock=ManualClock(NOW))
            bucket = manager.bucket(f"{version}")
            for _ in range(3):
                store.trips = 0
                asyncio.run(verb.asked(bucket.verbose if verbose else bucket))
                assert 1 <= store.trips <= 3


def of_no_capacity(taken: int) -> BucketState:
    """A bucket that only other software can have made; the script hands it back."""
    limits = BucketConfiguration(Bandwidth.unchecked(0, 1, SECOND, 5, False, None, False, None))
    return BucketState.initial(limits, None, NOW).consumed(taken)


async def test_what_the_server_leaves_to_swaps_ends_when_others_do(scene: Scene) -> None:
    manager = scene.make(GREEDY)
    pipeline_of(manager).requests.pause = lambda _: None
    for times in range(8):
        key = f"key {times}"
        scene.write(of_no_capacity(0), key)
        scene.tap.taken()
        states = [of_no_capacity(taken) for taken in range(times, 0, -1)]

        def disturb(_kind: str, key: str = key, states: list[BucketState] = states) -> None:
            if states:
                scene.write(states.pop(), key)

        scene.tap.before = disturb
        await settled(manager.bucket(key).force_add_tokens(1))
        scene.tap.before = lambda _: None
        assert scene.state(key) == of_no_capacity(times).force_added(1)
        assert scene.tap.taken().count("decide") == 1


async def test_what_the_server_leaves_to_swaps_is_bounded_by_attempts(scene: Scene) -> None:
    manager = scene.make(GREEDY, max_attempts=7)
    pipeline_of(manager).requests.pause = lambda _: None
    states = count()
    scene.tap.before = lambda _: scene.write(of_no_capacity(next(states)))
    with pytest.raises(ContentionError):
        await settled(manager.bucket("key").force_add_tokens(1))
    assert scene.tap.taken().count("swap") == 7


async def test_after_a_lost_swap_the_server_decides_at_once(scene: Scene) -> None:
    await scene.try_consume()
    scene.take_one()
    scene.tap.taken()
    assert await scene.try_consume()
    assert scene.tap.taken() == ["swap", "decide"]
    scene.commands()
    for _ in range(100):
        scene.take_one()
        await scene.try_consume(1000)
        assert scene.tap.taken() == ["decide"]
        assert scene.commands() == ["EVALSHA"]


async def test_what_was_seen_once_is_not_swapped_where_others_mostly_change_it(scene: Scene) -> None:
    for number in range(60):
        scene.take_one(f"key {number}")
        for _ in range(2):
            assert await settled(scene.manager.try_consume(f"key {number}"))
            scene.take_one(f"key {number}")
    taken = scene.tap.taken()
    assert taken.count("swap") < 10
    assert len(taken) == 120 + taken.count("swap")


async def test_after_a_refuted_rejection_one_lost_swap_calls_the_server(scene: Scene) -> None:
    await scene.try_consume(100)
    scene.write(BucketState.initial(GREEDY, None, NOW))
    scene.tap.taken()
    scene.tap.before = Disturbance(scene, "key", GREEDY, removes=False, times=NEVER)
    assert await scene.try_consume()
    assert scene.tap.taken() == ["get", "swap", "decide"]


@pytest.mark.usefixtures("admin")  # which empties the server
@pytest.mark.parametrize("sharing", [2, 3, 8])
async def test_managers_that_share_keys_take_hardly_more_than_one_round_trip(
    face: Face, server: RedisServer, sharing: int
) -> None:
    async with AsyncExitStack() as stack:
        managers = [
            await stack.enter_async_context(closing(face.from_url(server.url, "1000000/second")))
            for _ in range(sharing)
        ]
        taps = [Tap(manager._store) for manager in managers]
        keys, chance = [f"key {number}" for number in range(30)], random.Random(7)

        async def decide(times: int, those: list[Any]) -> list[str]:
            for _ in range(times):
                assert await settled(chance.choice(those).try_consume(chance.choice(keys)))
            return [kind for tap in taps for kind in tap.taken()]

        await decide(2_000, managers)
        assert len(await decide(4_000, managers)) <= 1.05 * 4_000
        # One of them alone: the others have gone, and all keys are its own.
        await decide(10_000, managers[:1])
        assert await decide(1_000, managers[:1]) == ["swap"] * 1_000


async def test_swaps_are_back_after_some_decisions_that_nobody_disturbed(scene: Scene) -> None:
    await scene.contend()
    for _ in range(60):
        assert await scene.try_consume()
    taken = scene.tap.taken()
    by_server = taken.count("decide")
    assert 10 <= by_server <= 50
    # Each of them takes one round trip, those by swaps as well: what is remembered is what is stored.
    assert taken == ["decide"] * by_server + ["swap"] * (60 - by_server)


@pytest.mark.parametrize("often", [0.02, 0.05, 0.1, 0.2, 0.5, 0.9])
async def test_a_bucket_that_others_write_now_and_then_takes_hardly_more_than_one_round_trip(
    scene: Scene, often: float
) -> None:
    chance = random.Random(3)
    for _ in range(1_000):
        await settled(scene.manager.bucket("key").force_add_tokens(1))
        if chance.random() < often:
            scene.take_one()
    assert len(scene.tap.taken()) <= 1.05 * 1_000


async def test_rejections_of_the_server_count_among_them(scene: Scene) -> None:
    await scene.contend()
    for _ in range(60):
        assert not await scene.try_consume(1000)
    taken = scene.tap.taken()
    by_server = taken.count("decide")
    assert 10 <= by_server <= 50
    assert taken == ["decide"] * by_server + ["get"] * (60 - by_server)


async def test_a_bucket_that_is_removed_is_made_by_the_server(scene: Scene) -> None:
    await scene.contend()
    scene.others.unlink("key")
    assert await scene.try_consume(30)
    assert scene.tap.taken() == ["decide"]
    expected = BucketState.initial(GREEDY, None, NOW).consumed(30)
    assert scene.stored() == codec.encode(expected)


async def test_the_time_to_live_is_that_of_a_swap(scene: Scene) -> None:
    for expiration in (Expiration.none(), Expiration.fixed(1000), Expiration.after_refill(50), Expiration.automatic()):
        scene.others.unlink("key")
        scene.take_one()
        for verb in ("try_consume", "consume_ignoring_rate_limits"):
            lives = []
            for by in (By.SWAPS, By.SCRIPT):
                with deciding_by(by):
                    bucket = scene.make(GREEDY).bucket("key", expiration=expiration)
                    await settled(getattr(bucket, verb)(1))
                lives.append(int(scene.others.pttl("key")))
            state = scene.state()
            assert state is not None
            assert lives[1] == pytest.approx(expiration.ttl_millis(state, NOW), abs=1000)
            assert lives[1] == pytest.approx(lives[0], abs=2000)


async def test_a_bucket_that_must_exist_is_not_made_by_the_server(scene: Scene) -> None:
    scene.manager = scene.make(GREEDY, recovery=Recovery.RAISE)
    await scene.try_consume()
    await scene.contend()
    scene.others.unlink("key")
    for _ in range(2):
        with pytest.raises(BucketNotFoundError) as caught:
            await scene.try_consume()
        assert caught.value.key == "key"
        assert scene.stored() is None
    scene.take_one()
    assert await scene.try_consume()


async def test_a_handle_knows_that_the_server_has_made_its_bucket(scene: Scene) -> None:
    scene.manager = scene.make(GREEDY, recovery=Recovery.RAISE)
    with deciding_by(By.SCRIPT, scene.manager):
        assert await scene.try_consume()
        scene.others.unlink("key")
        with pytest.raises(BucketNotFoundError):
            await scene.try_consume()


async def test_scripts_that_were_flushed_are_loaded_again(scene: Scene) -> None:
    await scene.contend()
    scene.others.script_flush()
    scene.commands()
    assert await scene.try_consume()
    assert scene.commands() == ["EVALSHA", "EVAL"]
    assert await scene.try_consume()
    assert scene.commands() == ["EVALSHA"]
    state = scene.state()
    assert state is not None
    assert state.consumed_tokens == 6


async def test_foreign_bytes_under_a_contended_key_are_left_alone(scene: Scene) -> None:
    await scene.contend()
    scene.others.psetex("key", 3_600_000, b"something else")
    for _ in range(2):
        with pytest.raises(CorruptStateError) as caught:
            await scene.try_consume()
        assert (caught.value.key, caught.value.state) == ("key", b"something else")
        assert scene.stored() == b"something else"
    scene.write(BucketState.initial(GREEDY, None, NOW))
    assert await scene.try_consume()


async def test_a_state_with_an_id_of_any_characters_is_decided_by_the_server(scene: Scene) -> None:
    limits = BucketConfiguration(Bandwidth.greedy(100, 60, id="größe"))
    manager = scene.make(limits)
    scene.take_one(limits=limits)
    scene.tap.before = Disturbance(scene, "key", limits, removes=False, times=3)
    probe = await settled(manager.try_consume_and_return_remaining("key"))
    assert (probe.consumed, probe.remaining_tokens) == (True, 97)
    assert scene.tap.taken() == ["decide"]
    assert await settled(manager.try_consume("key"))
    assert scene.tap.taken() == ["swap", "decide"]
    scene.take_one(limits=limits)
    assert not await settled(manager.try_consume("key", 1000))
    assert scene.tap.taken() == ["decide"]  # which has shown all that the answer needs


async def test_a_refusal_of_the_script_is_an_error_without_doubt(scene: Scene) -> None:
    await scene.contend()
    before = scene.stored()
    scene.others.execute_command("ACL SETUSER", "default", "-evalsha", "-eval")
    try:
        with pytest.raises(StoreError, match="may not do that") as caught:
            await scene.try_consume()
    finally:
        scene.others.execute_command("ACL SETUSER", "default", "+evalsha", "+eval")
    assert (caught.value.key, caught.value.in_doubt) == ("key", False)
    assert scene.stored() == before
    assert await scene.try_consume()


@pytest.mark.parametrize("scene", ["asyncio"], indirect=True)
async def test_a_wait_cancelled_while_the_server_decides_returns_its_tokens(scene: Scene) -> None:
    await scene.contend()
    decided, go_on = asyncio.Event(), asyncio.Event()

    async def hold(kind: str) -> None:
        if kind == "decide" and not decided.is_set():
            decided.set()
            await go_on.wait()

    scene.tap.after = hold
    before = scene.state()
    waiter = asyncio.create_task(scene.manager.consume("key", 5))
    await decided.wait()
    waiter.cancel()
    await asyncio.sleep(0)
    taken = scene.state()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert before is not None
    assert taken == before.consumed(5)
    assert scene.state() == before
    assert scene.tap.taken() == ["decide", "decide"]


@pytest.mark.parametrize("scene", ["asyncio"], indirect=True)
async def test_tasks_that_are_merged_are_answered_in_order_by_few_decisions(scene: Scene) -> None:
    scene.take_one()
    with deciding_by(By.SCRIPT, scene.manager):
        probes = await asyncio.gather(
            *(scene.manager.try_consume_and_return_remaining("key", 3) for _ in range(25)),
            *(scene.manager.try_consume("key", 3) for _ in range(25)),
        )
    assert scene.commands() == ["EVALSHA"] * 2
    assert [probe.remaining_tokens for probe in probes[:25]] == list(range(96, 21, -3))
    assert probes[25:] == [True] * 8 + [False] * 17
    assert scene.remembered() == scene.stored()


@pytest.mark.parametrize("merging", [False, True])
async def test_threads_and_tasks_on_a_contended_bucket_get_what_is_there(scene: Scene, merging: bool) -> None:
    manager = scene.manager = scene.make(GREEDY, merging=merging)
    scene.take_one()
    with deciding_by(By.SCRIPT, manager):
        if isinstance(manager, ProxyManager):
            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(manager.try_consume, ["key"] * 150))
        else:
            answers = await asyncio.gather(*(manager.try_consume("key") for _ in range(150)))
    assert sum(answers) == 99
    assert "swap" not in scene.tap.taken()
    assert scene.remembered() == scene.stored() or not merging


@pytest.mark.parametrize("workers", [Way(), Way(merging=False), Way(By.SCRIPT, merging=False)], ids=str, indirect=True)
@pytest.mark.parametrize("contend", [contend_by_threads, contend_by_tasks])
def test_nobody_starves(workers: Workers, redis_url: str, contend: Callable[..., list[list[Decision]]]) -> None:
    limits = BucketConfiguration(Bandwidth.intervally(1000, 10**6))
    access = Access(patient(redis_url), limits)
    with monitored(redis_url) as monitor:
        callers = workers.do(contend, access, 40)
        commands = [command for command in monitor.sent() if command != "TIME"]  # which others bring along
    assert [len(decisions) for decisions in callers] == [40] * PROCESSES * CALLERS
    decisions = [decision for caller in callers for decision in caller]
    assert sum(decision.taken for decision in decisions) == 1000
    assert max(decision.round_trips for decision in decisions) <= 3
    probes = PROCESSES * CALLERS  # at most: the first ones try the native swap
    assert len(commands) <= 1.5 * len(decisions) + probes
    if not workers.way.merging or contend is contend_by_threads:  # tasks that go together have no round trip of theirs
        round_trips = sum(decision.round_trips for decision in decisions)
        assert round_trips <= len(commands) <= round_trips + probes


@pytest.mark.parametrize("workers", [Way(), Way(merging=False)], ids=str, indirect=True)
@pytest.mark.parametrize("do_many_verbs", [do_many_verbs_by_threads, do_many_verbs_by_tasks])
def test_no_verb_takes_more_than_three_round_trips_while_processes_compete(
    workers: Workers, redis_url: str, do_many_verbs: Callable[..., list[list[tuple[str, int]]]]
) -> None:
    access = Access(patient(redis_url), BucketConfiguration.parse("1000000/second; 10000000/hour"))
    callers = workers.do(do_many_verbs, access, 4)
    assert len(callers) == PROCESSES * CALLERS
    assert {(verb, trips) for caller in callers for verb, trips in caller if trips > 3} == set()
