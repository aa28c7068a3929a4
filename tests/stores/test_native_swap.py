"""Swaps by a command of the server's own (``SET`` with ``IFEQ``), and how a store finds out whether there is one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
import redis
from redis import exceptions

from ratelimit import ProxyManager, RedisStore, StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.stores.protocol import Lost
from ratelimit.stores.redis.channel import Command, Replies
from ratelimit.stores.redis.circuit import CircuitStatus
from ratelimit.stores.redis.pool import PoolChannel
from tests.support import servers
from tests.support.proxies import Proxy
from tests.support.redis_monitor import monitored
from tests.support.servers import RedisServer, ServerBinary

KEY = b"key"
LIMITS = "1000/day"


class MadeUp:
    """A channel to a server that is made up, which has swapped whatever it was asked to swap."""

    def __init__(self, *, native: bool) -> None:
        self.spans_nodes = True
        self.post = None
        self.server = "made up"
        self.native = native
        self.refusal: Exception | None = None
        self.lost = False
        self.name = "one"
        self._trips: list[Sequence[Command]] = []

    def node(self, key: bytes) -> str:
        return self.name

    def circuits(self) -> dict[str, CircuitStatus]:
        return {}

    def keys(self, prefix: bytes) -> list[bytes]:
        return []

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Replies:
        self._trips.append(commands)
        if self.lost:
            raise StoreTimeoutError(key, "the reply was lost", in_doubt=True)
        return [self._answer(command) for command in commands]

    def _answer(self, command: Command) -> Any:
        match command:
            case (b"TIME",):
                return [b"1700000000", b"0"]
            case (b"SET", *_) if self.refusal is not None:
                return self.refusal
            case (b"SET", *_) if not self.native:
                return exceptions.ResponseError("syntax error")
            case (b"SET", _, _, b"IFEQ", before, *_):
                return before
            case (b"SET", *_) | (b"GETRANGE", *_):
                return None
        return 1

    def close(self) -> None:
        pass

    def trips(self) -> list[list[str]]:
        """The names of the commands of each round trip since the last call."""
        trips, self._trips = self._trips, []
        return [[command[0].decode() for command in trip if command[0] != b"TIME"] for trip in trips]


def test_the_probe_goes_along_with_the_first_swap_and_never_again() -> None:
    server = MadeUp(native=True)
    store = RedisStore.over(server)
    assert store.swap(KEY, None, b"1", 1000) is None
    assert server.trips() == [["SET", "EVAL"]]
    for number in range(50):
        assert store.swap(b"another", b"%d" % number, b"%d" % (number + 1), 1000) is None
        assert server.trips() == [["SET"]]


def test_a_read_brings_no_probe_along() -> None:
    server = MadeUp(native=True)
    RedisStore.over(server).get(KEY)
    assert server.trips() == [["GETRANGE"]]


def test_a_server_without_the_command_is_never_asked_again() -> None:
    server = MadeUp(native=False)
    # By this clock each swap asks for the time as well.
    clock = itertools.count(10**12, 2 * 10**9)
    store = RedisStore.over(server, monotonic=lambda: next(clock))
    assert store.swap(KEY, b"0", b"1", 1000) is None
    assert server.trips() == [["SET", "EVAL"]]
    for _ in range(50):
        assert store.swap(KEY, b"0", b"1", 1000) is None
        assert server.trips() == [["EVALSHA"]]


def test_each_server_is_tried_by_itself() -> None:
    server = MadeUp(native=True)
    store = RedisStore.over(server)
    store.swap(KEY, b"0", b"1", 1000)
    server.name, server.native = "two", False
    store.swap(KEY, b"0", b"1", 1000)
    server.trips()
    assert store.swap(KEY, b"0", b"1", 1000) is None
    assert server.trips() == [["EVALSHA"]]
    server.name, server.native = "one", True
    assert store.swap(KEY, b"0", b"1", 1000) is None
    assert server.trips() == [["SET"]]


def test_an_older_server_in_the_place_of_a_native_one_is_sent_a_script_within_the_same_swap() -> None:
    server = MadeUp(native=True)
    store = RedisStore.over(server)
    for _ in range(2):
        store.swap(KEY, b"0", b"1", 1000)
    server.trips()
    server.native = False
    assert store.swap(KEY, b"0", b"1", 1000) is None
    assert server.trips()[0] == ["SET"]
    assert store.swap(KEY, b"0", b"1", 1000) is None
    assert server.trips() == [["EVALSHA"]]


REFUSALS = [
    exceptions.ReadOnlyError("You can't write against a read only replica."),
    exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    exceptions.NoPermissionError("this user has no permissions to run the 'set' command"),
    exceptions.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
    exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: str(refusal)[:20])
def test_a_probe_that_is_refused_for_another_reason_leaves_the_question_open(refusal: Exception) -> None:
    server = MadeUp(native=True)
    store = RedisStore.over(server)
    server.refusal = refusal
    for _ in range(3):
        # The refusal of the probe is not the answer to the swap.
        assert store.swap(KEY, b"0", b"1", 1000) is None
        assert server.trips()[0][0] == "SET"
    server.refusal = None
    store.swap(KEY, b"0", b"1", 1000)
    assert server.trips() == [["SET", "EVALSHA"]]
    store.swap(KEY, b"0", b"1", 1000)
    assert server.trips() == [["SET"]]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: str(refusal)[:20])
def test_a_native_swap_that_is_refused_is_an_error_and_no_reason_for_scripts(refusal: Exception) -> None:
    server = MadeUp(native=True)
    store = RedisStore.over(server)
    store.swap(KEY, b"0", b"1", 1000)
    server.trips()
    server.refusal = refusal
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            store.swap(KEY, b"0", b"1", 1000)
        assert not caught.value.in_doubt
        assert server.trips() == [["SET"]]
    server.refusal = None
    assert store.swap(KEY, b"0", b"1", 1000) is None
    assert server.trips() == [["SET"]]


def test_a_probe_whose_reply_is_lost_is_sent_again() -> None:
    server = MadeUp(native=True)
    store = RedisStore.over(server)
    server.lost = True
    with pytest.raises(StoreTimeoutError):
        store.swap(KEY, b"0", b"1", 1000)
    server.lost = False
    server.trips()
    store.swap(KEY, b"0", b"1", 1000)
    assert server.trips() == [["SET", "EVAL"]]


# With a server that has the command


class Recorded(PoolChannel):
    """A channel that records what it was given."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client)
        self.commands: list[Command] = []

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Replies:
        self.commands += commands
        return super().send(key, commands, deadline)

    def sent(self) -> list[str]:
        """The names of the commands since the last call; TIME depends on the clock."""
        commands, self.commands = self.commands, []
        return [command[0].decode() for command in commands if command[0] != b"TIME"]


@pytest.fixture(scope="module")
def native_server(native_binary: ServerBinary) -> Generator[RedisServer]:
    with RedisServer.start(native_binary) as server:
        yield server


@pytest.fixture
def client(native_server: RedisServer) -> Generator[redis.Redis]:
    with native_server.client() as client:
        client.flushdb()
        yield client


@pytest.fixture
def channel(client: redis.Redis) -> Recorded:
    return Recorded(client)


@pytest.fixture
def fresh(channel: Recorded) -> RedisStore:
    """A store that has not tried the server yet."""
    return RedisStore.over(channel)


@pytest.fixture
def store(fresh: RedisStore, channel: Recorded) -> RedisStore:
    """A store that knows that the server swaps natively."""
    fresh.swap(b"warm up", None, b"", 1000)
    assert channel.sent() == ["SET", "EVAL"]
    return fresh


def bucket(client: redis.Redis) -> None:
    ProxyManager(RedisStore(client), LIMITS).try_consume(KEY)


CONTENTS: dict[str, Callable[[redis.Redis], Any]] = {
    "nothing": lambda client: client.delete(KEY),
    "a bucket": bucket,
    "a foreign string": lambda client: client.set(KEY, "not ours"),
    "a string that expires": lambda client: client.set(KEY, "not ours", px=600_000),
    "an empty string": lambda client: client.set(KEY, b""),
    "an empty string that expires": lambda client: client.set(KEY, b"", px=600_000),
    "a number": lambda client: client.incr(KEY),
}


def stored(client: redis.Redis) -> Any:
    return client.type(KEY), client.dump(KEY), client.execute_command("PEXPIRETIME", KEY), client.dbsize()


@pytest.mark.redis
@pytest.mark.parametrize("contents", CONTENTS)
def test_the_probe_changes_nothing(fresh: RedisStore, channel: Recorded, client: redis.Redis, contents: str) -> None:
    CONTENTS[contents](client)
    before = stored(client)
    there: Any = client.get(KEY)
    # The script reads by GETRANGE, to which an empty string is as good as none; making the bucket then fails.
    assert fresh.swap(KEY, b"something else", b"new", 1000) == Lost(there or None)
    assert stored(client) == before
    assert channel.sent() == ["SET", "EVAL"]
    fresh.swap(b"another", None, b"1", 1000)
    # The first swap has shown that the server swaps natively.
    assert channel.sent() == ["SET"]


@pytest.mark.redis
@pytest.mark.parametrize("before", [None, b"state"])
def test_a_value_of_another_type_is_an_error_and_stays(
    fresh: RedisStore, channel: Recorded, client: redis.Redis, before: bytes | None
) -> None:
    client.rpush(KEY, "first", "second")
    there = stored(client)
    for _ in ("by the script, with a probe", "the same"):
        with pytest.raises(StoreError, match="another type"):
            fresh.swap(KEY, before, b"new", 1000)
        assert channel.sent() == ["SET", "EVAL"]
    fresh.swap(b"another", None, b"1", 1000)
    channel.sent()
    with pytest.raises(StoreError, match="another type"):
        fresh.swap(KEY, before, b"new", 1000)
    assert channel.sent() == ["SET"]
    client.delete(b"another")
    assert stored(client) == there


@pytest.mark.redis
def test_a_swap_replaces_what_it_expects_and_nothing_else(
    store: RedisStore, channel: Recorded, client: redis.Redis
) -> None:
    assert store.swap(KEY, b"1", b"2", 1000) == Lost(None)
    assert client.exists(KEY) == 0
    assert store.swap(KEY, None, b"\0\xff\r\n", 600_000) is None
    assert 0 < client.pttl(KEY) <= 600_000
    there = stored(client)
    assert store.swap(KEY, None, b"2", 1000) == Lost(b"\0\xff\r\n")
    assert store.swap(KEY, b"1", b"2", -1) == Lost(b"\0\xff\r\n")
    assert stored(client) == there
    assert store.swap(KEY, b"\0\xff\r\n", b"", 1_200_000) is None
    assert client.get(KEY) == b""
    assert client.pttl(KEY) > 600_000
    assert store.swap(KEY, b"", b"3", 1000) is None
    assert set(channel.sent()) == {"SET"}


@pytest.mark.redis
@pytest.mark.parametrize("ttl", [0, -1])
def test_a_swap_without_expiry_drops_the_one_there_was(
    store: RedisStore, channel: Recorded, client: redis.Redis, ttl: int
) -> None:
    assert store.swap(KEY, None, b"1", 600_000) is None
    assert store.swap(KEY, b"1", b"2", ttl) is None
    assert client.pttl(KEY) == -1
    assert store.swap(b"made", None, b"1", ttl) is None
    assert client.pttl(b"made") == -1
    assert set(channel.sent()) == {"SET"}


def scripts_run(client: redis.Redis) -> int:
    stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha", "script|load"))


@pytest.mark.redis
def test_without_contention_no_script_is_run(native_server: RedisServer, client: redis.Redis) -> None:
    with ProxyManager.from_url(native_server.url, LIMITS) as manager:
        for number in range(5):
            assert manager.try_consume(f"key {number}")
        client.script_flush()
        client.config_resetstat()
        for number in range(50):
            assert manager.try_consume(f"key {number % 5}")
        assert manager.available_tokens("key 0") == 989
        assert scripts_run(client) == 0
        assert client.info("commandstats")["cmdstat_set"]["calls"] == 50


@pytest.mark.redis
def test_under_contention_the_server_decides_by_a_script(native_server: RedisServer, client: redis.Redis) -> None:
    with (
        ProxyManager.from_url(native_server.url, LIMITS) as manager,
        ProxyManager.from_url(native_server.url, LIMITS) as other,
    ):
        client.config_resetstat()
        for _ in range(20):
            assert manager.try_consume("key")
            assert other.try_consume("key")
        assert manager.available_tokens("key") == 960
        assert scripts_run(client) > 20


@pytest.mark.redis
def test_a_swap_whose_reply_is_lost_is_known_by_its_own_bytes_when_it_is_repeated(
    native_server: RedisServer, client: redis.Redis
) -> None:
    client.flushdb()
    with (
        Proxy(native_server.port) as proxy,
        ProxyManager.from_url(f"redis://127.0.0.1:{proxy.port}", LIMITS) as manager,
    ):
        for key in ("warm up", "key"):
            manager.try_consume(key)
        with monitored(native_server.url) as monitor:
            proxy.lose_replies = 1
            assert manager.try_consume("key", 7)
            assert [command for command in monitor.sent() if command != "TIME"] == ["SET", "SET"]
        assert proxy.lost == 1
        assert manager.snapshot("key").consumed_tokens == 8


@pytest.mark.redis
def test_a_replica_refuses_the_probe_and_is_tried_again_once_it_is_the_master(native_server: RedisServer) -> None:
    with servers.replica(native_server) as replica, replica.client() as client:
        channel = Recorded(client)
        store = RedisStore.over(channel)
        with pytest.raises(StoreUnavailableError, match="read-only"):
            store.swap(KEY, None, b"1", 1000)
        client.replicaof("NO", "ONE")
        channel.sent()
        assert store.swap(b"fresh", None, b"1", 1000) is None
        assert store.swap(b"fresh", b"1", b"2", 1000) is None
        assert channel.sent() == ["SET", "EVAL", "SET"]


@pytest.mark.redis
def test_a_server_that_comes_back_as_an_older_one_costs_no_error(native_binary: ServerBinary) -> None:
    older = servers.find_scripted_server()
    if older is None:
        pytest.skip("all servers of this machine know SET IFEQ")
    with RedisServer.start(native_binary) as server, ProxyManager.from_url(server.url, LIMITS) as manager:
        for _ in range(3):
            assert manager.try_consume("key")
        server.stop()
        with RedisServer.start(older, port=server.port) as successor, successor.client() as client:
            assert manager.try_consume("key")
            assert scripts_run(client) >= 1
            before = client.info("commandstats")["cmdstat_set"]["failed_calls"]
            assert before <= 1
            assert manager.try_consume("key")
            assert client.info("commandstats")["cmdstat_set"]["failed_calls"] == before


@pytest.mark.redis
def test_a_server_without_the_command_is_found_out_by_asking(server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server, server.client() as client:
        store = RedisStore.over(channel := Recorded(client))
        for number in range(3):
            assert store.swap(KEY, b"%d" % number if number else None, b"%d" % (number + 1), 1000) is None
        last = "SET" if servers.swaps_natively(client) else "EVALSHA"
        assert channel.sent()[:2] == ["SET", "EVAL"]
        store.swap(KEY, b"3", b"4", 1000)
        assert channel.sent() == [last]
