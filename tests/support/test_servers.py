from __future__ import annotations

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support import servers
from tests.support.servers import RedisServer, ServerBinary

pytestmark = pytest.mark.redis


def test_a_server_answers_on_its_port_and_on_its_socket(server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server:
        assert server.version == server_binary.version
        assert len(str(server.unix_socket)) < 100
        with redis.Redis.from_url(server.url) as client, redis.Redis(unix_socket_path=str(server.unix_socket)) as other:
            client.set("key", "value")
            assert other.get("key") == b"value"


def test_a_server_leaves_nothing_behind_even_when_the_test_fails(server_binary: ServerBinary) -> None:
    server = RedisServer.start(server_binary)
    pid = server.pid
    with pytest.raises(ZeroDivisionError), server:
        server.pause()
        _ = 1 / 0
    assert not psutil.pid_exists(pid)
    assert not server.directory.exists()


def test_a_server_comes_back_on_its_port_without_its_data(server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server, server.client(retry=Retry(NoBackoff(), 0)) as client:
        pid = server.pid
        client.set("key", "value")
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.restart()
        assert server.pid != pid
        assert client.get("key") is None


def test_a_paused_server_accepts_and_does_not_answer(server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary) as server,
        server.client(socket_timeout=0.1, retry=Retry(NoBackoff(), 0)) as client,
    ):
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.resume()
        assert client.ping()


def test_extra_arguments_win(server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary, "--appendonly", "yes", "--appendfsync", "always") as server:
        with server.client() as client:
            client.set("key", "value")
        server.kill()
        server.restart()
        with server.client() as client:
            assert client.get("key") == b"value"


def test_a_server_that_dies_says_why(server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary) as first,
        pytest.raises(servers.ServerError, match=r"(?i)address already in use"),
    ):
        RedisServer.start(server_binary, port=first.port)


def test_a_replica_reads_and_does_not_write(server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary) as master,
        servers.replica(master) as replica,
        master.client() as writer,
        replica.client() as reader,
    ):
        writer.set("key", "value")
        writer.wait(1, 1000)
        assert reader.get("key") == b"value"
        with pytest.raises(redis.ReadOnlyError):
            reader.set("key", "other")


@pytest.mark.parametrize("masters", [1, 3])
def test_a_cluster_spreads_keys_over_its_nodes(server_binary: ServerBinary, masters: int) -> None:
    with servers.cluster(server_binary, masters) as cluster:
        with redis.RedisCluster.from_url(cluster.url.replace("redis+cluster", "redis")) as client:
            for i in range(100):
                client.set(f"key {i}", i)
        for node in cluster.nodes:
            with node.client() as client:
                assert client.dbsize() > 0


def test_sentinel_fails_over_to_the_replica(server_binary: ServerBinary) -> None:
    with servers.sentinel(server_binary) as setup:
        assert setup.is_master(setup.master)
        setup.master.kill()
        servers.wait_until(lambda: setup.is_master(setup.replica), "failover to the replica")


def test_the_shared_database_is_empty(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")


def test_the_shared_database_is_empty_again(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


def test_a_url_of_the_environment_is_used_as_it_is(
    server_binary: ServerBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer.start(server_binary) as server:
        monkeypatch.setenv(servers.URL_VARIABLE, f"redis://127.0.0.1:{server.port}/15")
        assert servers.shared_server.__wrapped__().url == f"redis://127.0.0.1:{server.port}/15"


def test_a_program_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.BINARY_VARIABLE, "/nowhere/redis-server")
    with pytest.raises(servers.NoServerError, match="/nowhere/redis-server"):
        servers.find_server()


def test_without_any_server_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(servers.URL_VARIABLE, raising=False)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    monkeypatch.setattr(servers, "find_server", lambda: None)
    with pytest.raises(servers.NoServerError, match="apt-get install redis-server"):
        servers.shared_server.__wrapped__()
