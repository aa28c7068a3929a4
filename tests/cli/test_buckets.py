"""The commands about one bucket, as their users run them: arguments in, text and an exit status out."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Generator

import pytest
import redis

from ratelimit import NEVER, Bandwidth, BucketConfiguration, Expiration, ProxyManager
from ratelimit.cli.buckets import duration
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BandwidthState, BucketState
from tests.support import servers
from tests.support.command_line import NOBODY, answer, call, complaint, run, start

EVERY_COMMAND = [
    pytest.param(("try", "--limit", "10/minute"), id="try"),
    pytest.param(("try", "--limit", "10/minute", "--wait=1"), id="try --wait"),
    pytest.param(("inspect",), id="inspect"),
    pytest.param(("inspect", "--json"), id="inspect --json"),
    pytest.param(("reset",), id="reset"),
    pytest.param(("remove",), id="remove"),
]


@pytest.fixture
def url(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database, which the commands find by their environment."""
    monkeypatch.setenv("RATELIMIT_URL", redis_url)
    return redis_url


@pytest.fixture
def client(redis_url: str) -> Generator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def manager(redis_url: str) -> Generator[ProxyManager]:
    with ProxyManager.from_url(redis_url, "5/hour") as manager:
        yield manager


@pytest.mark.redis
@pytest.mark.usefixtures("url")
class TestTry:
    def test_admits_until_the_bucket_is_empty(self) -> None:
        command = ("try", "user:42", "--limit", "2/hour")
        half, whole = r"(30 min|29 min \d+ s)", r"(1 h|59 min \d+ s)"
        assert re.fullmatch(f"admitted, 1 left, full after {half}", answer(call(*command), 0))
        assert re.fullmatch(f"admitted, 0 left, full after {whole}", answer(call(*command), 0))
        assert re.fullmatch(f"refused, 0 left, retry after {half}, full after {whole}", answer(call(*command), 1))

    def test_tokens(self) -> None:
        command = ("try", "key", "--limit", "5/day", "--tokens")
        assert "2 left" in answer(call(*command, "3"), 0)
        assert "2 left" in answer(call(*command, "3"), 1)
        assert "retry never: the bucket cannot hold so many" in answer(call(*command, "6"), 1)

    def test_json(self) -> None:
        command = ("try", "key", "--limit", "2/hour", "--json", "--tokens")
        admitted = json.loads(answer(call(*command, "2"), 0))
        assert 3_599 < admitted.pop("full_after") <= 3_600
        expected = {"key": "key", "admitted": True, "tokens": 2, "remaining": 0, "retry_after": 0, "limits": "2/hour"}
        assert admitted == expected
        refused = json.loads(answer(call(*command, "1"), 1))
        assert refused["admitted"] is False
        assert 1_790 < refused["retry_after"] <= 1_800
        assert json.loads(answer(call(*command, "3"), 1))["retry_after"] is None

    def test_waits_for_the_tokens(self) -> None:
        command = ("try", "key", "--limit", "20/second burst 1", "--wait")
        assert re.match(r"admitted after 0[.]\d+ s, \d left", answer(call(*command), 0))
        assert json.loads(answer(call(*command, "--json", "--tokens", "10"), 0))["waited"] > 0.3

    def test_refuses_at_once_what_takes_longer_than_the_wait(self, manager: ProxyManager) -> None:
        manager.try_consume("key", 5)
        told = answer(call("try", "key", "--limit", "5/hour", "--wait=10"), 1)
        assert re.fullmatch(r"refused after 0[.]\d+ s, 0 left, retry after 1\d min.*", told)
        assert manager.available_tokens("key") == 0

    @pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_gives_its_tokens_back_when_the_wait_is_interrupted(self, manager: ProxyManager, number: int) -> None:
        manager.try_consume("key", 5)
        with start("try", "key", "--limit", "5/hour", "--tokens", "2", "--wait") as waiting:
            servers.wait_until(lambda: manager.available_tokens("key") == -2, "the tokens are reserved")
            waiting.send_signal(number)
            assert waiting.communicate(timeout=30) == ("", "")
            assert waiting.returncode == 128 + number
        assert manager.available_tokens("key") == 0

    def test_says_when_the_bucket_has_other_limits(self, manager: ProxyManager) -> None:
        manager.try_consume("key")
        command = call("try", "key", "--limit", "100/hour")
        assert command.returncode == 0
        assert command.stdout.startswith("admitted, 3 left")
        assert command.stderr == "the bucket keeps the limits it was made with: 5/hour\n"

    @pytest.mark.parametrize(
        ("arguments", "fault"),
        [
            (("--limit", "1/s", "--tokens", "0"), "tokens must be an int from 1"),
            (("--limit", "1/s", "--wait=-1"), "--wait must be 0 or more"),
            (("--limit", "1/s", "--wait=nan"), "--wait must be a timedelta or a number of seconds"),
        ],
    )
    def test_what_cannot_be_is_told_in_a_line(
        self, client: redis.Redis, arguments: tuple[str, ...], fault: str
    ) -> None:
        assert fault in complaint(call("try", "key", *arguments))
        assert client.dbsize() == 0

    def test_limits_that_cannot_be_are_shown_with_the_place_that_is_wrong(self, client: redis.Redis) -> None:
        command = call("try", "key", "--limit", "1/s; 10/fortnight")
        assert (command.stdout, command.returncode) == ("", 2)
        said, limits, marks = command.stderr.splitlines()
        assert said.startswith("ratelimit: --limit: unknown unit of time 'fortnight'")
        assert limits[marks.index("^") :] == "fortnight"
        assert client.dbsize() == 0


@pytest.mark.redis
@pytest.mark.usefixtures("url")
class TestInspect:
    def test_shows_all_there_is_to_know(self, manager: ProxyManager, client: redis.Redis) -> None:
        limits = "5/hour; 100/day burst 20 id daily"
        assert manager.bucket("user:42", limits).try_consume(3)
        lines = [
            r"key       'user:42'",
            r"limit     5/hour",
            r"tokens    2 of 5, next in 1[12] min.*, full in 3\d min.*",
            r"limit     100/day burst 20 id daily",
            r"tokens    17 of 20, next in 1[45] min.*, full in 4\d min.*",
            r"consumed  3 so far",
            rf"stored    {client.strlen('user:42')} bytes, expires in 4\d min.*",
        ]
        assert re.fullmatch("\n".join(lines), answer(call("inspect", "user:42"), 0))

    def test_json(self, manager: ProxyManager, client: redis.Redis) -> None:
        manager.bucket("key", "5/hour; 100/day burst 20 id daily").try_consume(3)
        shown = json.loads(answer(call("inspect", "key", "--json"), 0))
        first, second = shown.pop("bandwidths")
        assert 0 < shown.pop("ttl") <= 43.2 * 60 + 10
        assert shown == {
            "key": "key",
            "found": True,
            "limits": "5/hour; 100/day burst 20 id daily",
            "version": None,
            "tokens": 2,
            "consumed": 3,
            "bytes": client.strlen("key"),
        }
        assert 700 < first.pop("next_token_after") <= 720
        assert 2_100 < first.pop("full_after") <= 2_160
        assert first == {"limit": "5/hour", "capacity": 5, "tokens": 2}
        assert second["limit"] == "100/day burst 20 id daily"
        assert (second["capacity"], second["tokens"]) == (20, 17)

    def test_changes_nothing(self, manager: ProxyManager, client: redis.Redis) -> None:
        manager.try_consume("key")
        state, ttl = client.get("key"), client.pttl("key")
        answer(call("inspect", "key"), 0)
        assert client.get("key") == state
        assert client.pttl("key") < ttl

    def test_a_bucket_in_debt(self, manager: ProxyManager) -> None:
        manager.bucket("key").consume_ignoring_rate_limits(8)
        assert re.search(
            r"tokens    -3 of 5, next in 4\d min.*, full in 1 h 3\d min", answer(call("inspect", "key"), 0)
        )
        (level,) = json.loads(answer(call("inspect", "key", "--json"), 0))["bandwidths"]
        assert level["tokens"] == -3
        assert 2_870 < level["next_token_after"] <= 2_880

    def test_a_full_bucket(self, manager: ProxyManager) -> None:
        manager.bucket("key").force_add_tokens(2)
        assert "tokens    7 of 5\n" in answer(call("inspect", "key"), 0)
        (level,) = json.loads(answer(call("inspect", "key", "--json"), 0))["bandwidths"]
        assert (level["next_token_after"], level["full_after"]) == (None, 0)

    def test_a_version_and_no_expiry(self, manager: ProxyManager) -> None:
        manager.bucket("key", configuration_version=7, expiration=Expiration.none()).try_consume()
        told = answer(call("inspect", "key"), 0)
        assert "\nversion   7\n" in told
        assert told.endswith(" bytes, does not expire")
        shown = json.loads(answer(call("inspect", "key", "--json"), 0))
        assert (shown["version"], shown["ttl"]) == (7, None)

    def test_a_key_that_is_missing(self) -> None:
        assert answer(call("inspect", "key"), 1) == "no bucket under the key 'key'"
        assert json.loads(answer(call("inspect", "key", "--json"), 1)) == {"key": "key", "found": False}

    def test_limits_that_no_configuration_has(self, client: redis.Redis) -> None:
        bandwidth = Bandwidth.unchecked(5, 5, 0, 5, False, None, False, None)
        state = BucketState(BucketConfiguration(bandwidth), None, 0, (BandwidthState(0, 0, 0),))
        client.set("key", codec.encode(state))
        assert "'key' cannot be read as a bucket" in complaint(call("inspect", "key"))


@pytest.mark.redis
@pytest.mark.usefixtures("url")
class TestResetAndRemove:
    def test_reset_fills_the_bucket_by_its_own_limits(self, manager: ProxyManager) -> None:
        bucket = manager.bucket("key", "100/day burst 20", configuration_version=3)
        bucket.consume_ignoring_rate_limits(50)
        assert answer(call("reset", "key"), 0) == "the bucket 'key' is full: 100/day burst 20"
        snapshot = bucket.snapshot()
        assert (snapshot.available_tokens, snapshot.configuration_version) == (20, 3)

    def test_remove_forgets_the_bucket(self, manager: ProxyManager, client: redis.Redis) -> None:
        manager.try_consume("key", 5)
        manager.try_consume("other")
        assert answer(call("remove", "key"), 0) == "the bucket 'key' is removed"
        assert client.keys() == [b"other"]

    @pytest.mark.parametrize("command", ["reset", "remove"])
    def test_without_a_bucket(self, client: redis.Redis, command: str) -> None:
        assert answer(call(command, "key"), 1) == "no bucket under the key 'key'"
        assert client.dbsize() == 0


@pytest.mark.redis
@pytest.mark.usefixtures("url")
class TestKeys:
    @pytest.mark.parametrize("command", EVERY_COMMAND)
    def test_foreign_bytes_are_left_alone(self, client: redis.Redis, command: tuple[str, ...]) -> None:
        client.set("key", b"\0\0\0\1 something else")
        assert "the value under the key 'key' cannot be read as a bucket: " in complaint(call(*command, "key"))
        assert client.get("key") == b"\0\0\0\1 something else"

    @pytest.mark.parametrize("command", EVERY_COMMAND)
    def test_a_value_of_another_type_is_left_alone(self, client: redis.Redis, command: tuple[str, ...]) -> None:
        client.rpush("key", "a list")
        line = complaint(call(*command, "key"))
        assert "WRONGTYPE" in line
        assert "for the key 'key'" in line
        assert client.lrange("key", 0, -1) == [b"a list"]

    def test_a_prefix(self, manager: ProxyManager, redis_url: str, client: redis.Redis) -> None:
        with ProxyManager.from_url(redis_url, "5/hour", prefix="app:") as prefixed:
            prefixed.try_consume("key", 4)
        assert "0 left" in answer(call("try", "key", "--limit", "5/hour", "--prefix", "app:"), 0)
        assert "tokens    0 of 5" in answer(call("inspect", "key", "--prefix", "app:"), 0)
        assert answer(call("inspect", "key"), 1) == "no bucket under the key 'key'"
        assert answer(call("reset", "key", "--prefix", "app:"), 0)
        assert answer(call("remove", "key", "--prefix", "app:"), 0)
        assert client.dbsize() == 0

    def test_text_is_stored_as_utf_8(self, client: redis.Redis) -> None:
        answer(call("try", "ключ", "--limit", "1/hour"), 0)
        assert client.keys() == ["ключ".encode()]
        assert "'ключ'" in answer(run("inspect", "ключ", PYTHONIOENCODING="utf-8"), 0)
        assert r"'\u043a\u043b\u044e\u0447'" in answer(run("inspect", "ключ", PYTHONIOENCODING="ascii"), 0)

    @pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
    def test_bytes_that_are_no_text_are_kept_and_shown_escaped(self, client: redis.Redis) -> None:
        answer(call("try", b"\xffkey", "--limit", "1/hour"), 0)
        assert client.keys() == [b"\xffkey"]
        assert r"b'\xffkey'" in answer(call("inspect", b"\xffkey"), 0)
        assert json.loads(answer(call("inspect", b"\xffkey", "--json"), 0))["key"] == r"\xffkey"

    def test_control_characters_do_not_reach_the_terminal(self) -> None:
        assert answer(call("inspect", "a\n\x1b[2Jb"), 1) == r"no bucket under the key 'a\n\x1b[2Jb'"


class TestStore:
    @pytest.mark.parametrize("command", EVERY_COMMAND)
    def test_no_server(self, command: tuple[str, ...]) -> None:
        line = complaint(call(*command, "key", "--url", NOBODY))
        assert re.match(r"Redis cannot be reached \(.*\), for the key 'key'", line)
        assert "secret" not in line

    @pytest.mark.parametrize("url", ["http://user:secret@host", "redis://:secret@host:port", "redis://host?x=1", ""])
    def test_a_wrong_url(self, url: str) -> None:
        line = complaint(call("inspect", "key", f"--url={url}"))
        assert "is not valid" in line
        assert "secret" not in line

    @pytest.mark.redis
    def test_a_wrong_password(self, server_binary: servers.ServerBinary) -> None:
        with servers.RedisServer.start(server_binary, "--requirepass", "right") as server:
            line = complaint(call("inspect", "key", "--url", f"redis://:secret@{server.host}:{server.port}"))
        assert "password" in line
        assert "secret" not in line

    @pytest.mark.redis
    def test_the_url_given_wins_over_the_environment(self, redis_url: str) -> None:
        assert answer(call("inspect", "key", "--url", redis_url, RATELIMIT_URL=NOBODY), 1)
        assert "cannot be reached" in complaint(call("inspect", "key", RATELIMIT_URL=NOBODY))

    def test_memory(self) -> None:
        assert "9 left" in answer(call("try", "key", "--limit", "10/minute", "--url", "memory://"), 0)

    @pytest.mark.redis
    def test_a_cluster(self, server_binary: servers.ServerBinary) -> None:
        with servers.cluster(server_binary) as cluster:
            for key in ("a", "b", "c"):
                arguments = (key, "--url", cluster.url)
                assert "admitted, 4 left" in answer(call("try", *arguments, "--limit", "5/hour"), 0)
                assert re.search(r"expires in 1\d min", answer(call("inspect", *arguments), 0))
                assert answer(call("remove", *arguments), 0)
                assert answer(call("inspect", *arguments), 1)


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "0 s"),
        (1, "0.001 s"),
        (1_500_000_000, "1.5 s"),
        (59_999_000_001, "1 min"),
        (60_000_000_001, "1 min 1 s"),
        (3_599_000_000_001, "1 h"),
        (3_600_000_000_001, "1 h 1 min"),
        (86_399_000_000_000, "24 h"),
        (10**15, "11 d 14 h"),
        (NEVER, "eternity"),
    ],
)
def test_durations_are_rounded_up(nanos: int, text: str) -> None:
    assert duration(nanos) == text
