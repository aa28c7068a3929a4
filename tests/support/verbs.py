"""Every verb of a manager, and checks of how a verb fails and what it leaves stored."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from redis.exceptions import RedisClusterException

from ratelimit import BucketConfiguration, CorruptStateError, StoreError, TokensInheritance
from tests.support.both_faces import Manager, settled
from tests.support.reservations import reserve_and_settle

LIMITS = BucketConfiguration.parse("10/minute")
KEY = "user:42"
PREFIX = "rl:"

VERBS: dict[str, Callable[[Manager], Any]] = {
    "try_consume": lambda manager: manager.try_consume(KEY),
    "try_consume_and_return_remaining": lambda manager: manager.try_consume_and_return_remaining(KEY),
    "try_consume_as_much_as_possible": lambda manager: manager.bucket(KEY).try_consume_as_much_as_possible(2),
    "consume_ignoring_rate_limits": lambda manager: manager.bucket(KEY).consume_ignoring_rate_limits(1),
    "consume": lambda manager: manager.consume(KEY, max_wait=1),
    "reserve": lambda manager: reserve_and_settle(manager, KEY),
    "estimate_ability_to_consume": lambda manager: manager.bucket(KEY).estimate_ability_to_consume(1),
    "available_tokens": lambda manager: manager.available_tokens(KEY),
    "add_tokens": lambda manager: manager.bucket(KEY).add_tokens(1),
    "force_add_tokens": lambda manager: manager.bucket(KEY).force_add_tokens(1),
    "give_back": lambda manager: manager.bucket(KEY).give_back(1),
    "hold_back": lambda manager: manager.bucket(KEY).hold_back(1),
    "reset": lambda manager: manager.reset(KEY),
    "replace_configuration": lambda manager: manager.replace_configuration(KEY, "5/s", TokensInheritance.AS_IS),
    "snapshot": lambda manager: manager.snapshot(KEY),
    "verbose": lambda manager: manager.bucket(KEY).verbose.try_consume(),
    "configuration": lambda manager: manager.configuration(KEY),
    "remove": lambda manager: manager.remove(KEY),
}

# Every verb that reads what is stored: all but ``remove``.
READING_VERBS = {name: verb for name, verb in VERBS.items() if name != "remove"}

# Every verb that takes a number of tokens.
TOKEN_VERBS: dict[str, Callable[[Manager, Any], Any]] = {
    "try_consume": lambda manager, tokens: manager.try_consume(KEY, tokens),
    "try_consume_and_return_remaining": lambda manager, tokens: manager.try_consume_and_return_remaining(KEY, tokens),
    "consume_ignoring_rate_limits": lambda manager, tokens: manager.bucket(KEY).consume_ignoring_rate_limits(tokens),
    "consume": lambda manager, tokens: manager.consume(KEY, tokens),
    "reserve": lambda manager, tokens: manager.reserve(KEY, tokens),
    "estimate_ability_to_consume": lambda manager, tokens: manager.bucket(KEY).estimate_ability_to_consume(tokens),
    "add_tokens": lambda manager, tokens: manager.bucket(KEY).add_tokens(tokens),
    "force_add_tokens": lambda manager, tokens: manager.bucket(KEY).force_add_tokens(tokens),
    "give_back": lambda manager, tokens: manager.bucket(KEY).give_back(tokens),
    "verbose": lambda manager, tokens: manager.bucket(KEY).verbose.try_consume(tokens),
}

every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def contents(client: redis.Redis) -> dict[bytes, Any]:
    """Return what is stored, without the times to live, which run."""
    keys: Any = client.keys()
    return {key: client.dump(key) for key in keys}


@contextmanager
def nothing_written(client: redis.Redis) -> Generator[None]:
    """Check that what is stored, and how long it is to live, stays as it is."""

    def stored() -> dict[bytes, tuple[Any, int | None]]:
        return {key: (dump, end_of_life(key)) for key, dump in contents(client).items()}

    def end_of_life(key: bytes) -> int | None:
        """Return when a key expires, in milliseconds since the epoch."""
        with client.pipeline() as pipeline:
            pipeline.pttl(key)
            pipeline.time()
            ttl, (seconds, microseconds) = pipeline.execute()
        return None if ttl < 0 else seconds * 1000 + microseconds // 1000 + ttl

    before = stored()
    yield
    for key, (dump, end) in stored().items():
        assert before.pop(key) == (dump, end and pytest.approx(end, abs=1000))
    assert not before


async def check_failure(
    manager: Manager,
    kind: type[StoreError | CorruptStateError],
    match: str,
    verb: Callable[[Manager], Any] = VERBS["try_consume"],
) -> Any:
    """Check that a verb fails with just this error, which has the key as the caller gave it, and a cause."""
    with pytest.raises(kind, match=match) as caught:
        await settled(verb(manager))
    error = caught.value
    assert type(error) is kind
    assert error.key == KEY
    assert repr(KEY) in str(error)
    if isinstance(error, StoreError):
        assert isinstance(error.__cause__, redis.RedisError | RedisClusterException | OSError)
    return error
