"""A URL that is not valid is refused at once, by an error that shows no password."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from ratelimit import InvalidConfigurationError
from tests.support.both_faces import Face
from tests.support.verbs import LIMITS


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("", "redis://host:port/db"),
        ("localhost:6379", "redis://host:port/db"),
        ("redis//localhost", "redis must be followed by ://"),
        ("redis:/localhost", "redis must be followed by ://"),
        ("http://localhost", "the scheme must be one of memory, redis, .*; got 'http'$"),
        ("redis+sentinels://localhost/service", r"got 'redis\+sentinels'; did you mean redis\+sentinel://"),
        ("rediss+sentinal://localhost/service", r"did you mean rediss\+sentinel://"),
        ("valkey+cluster://localhost", r"did you mean redis\+cluster://"),
        ("sentinel://localhost", r"did you mean redis\+sentinel://"),
        ("redis+socket:///redis.sock", "did you mean unix://"),
        ("memory://localhost", "memory:// must stand alone"),
        ("redis://localhost:port", "the port must be a number from 1 to 65535; got text, which is hidden"),
        ("redis://ali:sesame@localhost:port", "the port must be a number from 1 to 65535; got 'port'"),
        ("redis://localhost:65536", "the port must be a number from 1 to 65535; got '65536'"),
        ("redis://localhost:0", "the port must be a number from 1 to 65535; got '0'"),
        ("redis://[::1", "the host must be a name or an address, one of IPv6 in brackets"),
        ("redis://::1:6379", "the host must be a name or an address, one of IPv6 in brackets"),
        ("redis://local host", "the host must be a name or an address"),
        (f"redis://{'a.' * 127}a", "the host must be a name of at most 253 characters"),
        ("redis+cluster://localhost:65536", "the port must be a number from 1 to 65535; got '65536'"),
        ("redis+sentinel://localhost,[::1/service", "the host must be a name or an address, one of IPv6 in brackets"),
        ("redis://localhost/one", "the database must be a number of 0 or more; got 'one'"),
        ("redis://localhost/-1", "the database must be a number of 0 or more; got '-1'"),
        ("redis://localhost?db=-1", "the database must be a number of 0 or more; got -1"),
        ("redis://localhost?db=one", "'db'"),
        ("redis://localhost?socket_timeout=soon", "'socket_timeout'"),
        ("redis://localhost?socket_timeout=-1", "socket_timeout"),
        ("redis://localhost?socket_connect_timeout=nan", "socket_connect_timeout"),
        ("redis://localhost?timeout=-1", "timeout"),
        ("redis://localhost?max_connections=-1", "max_connections"),
        ("redis://localhost?protocol=4", "protocol"),
        ("redis://localhost?nonsense=1", "nonsense"),
        ("redis://localhost?retry=3", "retry"),
        ("redis://localhost/0/1", "database"),
        ("redis://localhost?redis_connect_func=1", "redis_connect_func"),
        ("redis://localhost?encoding=nonsense", "encoding"),
        ("rediss://localhost?ssl_cert_reqs=maybe", "maybe"),
        ("unix://", "path"),
        ("redis+cluster://", "host"),
        ("redis+cluster://localhost/1", "database"),
        ("redis+cluster://localhost?dynamic_startup_nodes=perhaps", "dynamic_startup_nodes must be yes or no"),
        ("redis://localhost?dynamic_startup_nodes=no", "dynamic_startup_nodes"),
        ("redis+sentinel://localhost", "service"),
        ("redis+sentinel:///service", "hosts"),
        ("redis+sentinel://localhost:port/service", "the port must be"),
        (None, "str"),
        (b"redis://localhost", "str"),
    ],
)
def test_a_wrong_url_is_refused_at_once(face: Face, url: Any, wrong: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=wrong) as caught:
        face.from_url(url, LIMITS)
    assert caught.value.field == "url"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame@localhost:port",
        "redis://:sesame",
        "redis://:sesame/0",
        "redis://ali:1/sesame[@localhost",
        "redis://:[sesame@localhost",
        "redis+sentinel://ali:sesame/service",
        "redis//:sesame@localhost",
        "redis:/:1://sesame@localhost",
        "unix://ali:open#sesame@/redis.sock",
        "http://:sesame@localhost",
        "redis://:sesame@localhost/one",
        "redis://ali:sesame@localhost?nonsense=1",
        "redis://:open/sesame@localhost/0",
        "redis://:open#sesame@localhost/0",
        "redis://:1/sesame@localhost/0",
        "redis://:open@/sesame@localhost/0",
        "redis://:open@?sesame=1@localhost/0",
        "redis://localhost?password=sesame&nonsense=1",
        "redis+cluster://:sesame@localhost/1",
        "redis+sentinel://:sesame@localhost",
        "redis+sentinel://:open,sesame@localhost:port/service",
        "redis+sentinel://localhost/service?sentinel_password=sesame&nonsense=1",
    ],
)
def test_an_error_about_a_url_tells_no_password(face: Face, url: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        face.from_url(url, LIMITS)
    assert "sesame" not in "".join(traceback.format_exception(caught.value))
    assert "sesame" not in repr(caught.value)
