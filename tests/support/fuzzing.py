"""What holds for any input at all: for the tests, which draw inputs at random, and for fuzzers, which look for them.

Each check takes an input that somebody else may have chosen. It passes where the input is taken for what it says, or is
refused by an error of ours, in short; and fails by an ``AssertionError``, or by whatever else is raised.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ratelimit import (
    Bandwidth,
    BucketConfiguration,
    CorruptStateError,
    InvalidConfigurationError,
    ProxyManager,
    RateLimitError,
    ReservationOverflowError,
    SlidingWindow,
    SlidingWindows,
    TokensInheritance,
)
from ratelimit.core.token_bucket import codec
from ratelimit.stores.urls import async_store_from_url, store_from_url
from ratelimit.testing import ManualClock, SwappingMemoryStore

KEY: Final = "user:42"
LONGEST_MESSAGE: Final = 1_000
NOW: Final = 1_700_000_000 * 10**9


def _replace(inheritance: TokensInheritance, manager: ProxyManager) -> None:
    manager.replace_configuration(KEY, "7/hour id abc; 5/s", inheritance)


VERBS: Final[tuple[Callable[[ProxyManager], Any], ...]] = (
    lambda manager: manager.snapshot(KEY),
    lambda manager: manager.try_consume(KEY),
    lambda manager: manager.try_consume_and_return_remaining(KEY, 3),
    lambda manager: manager.bucket(KEY).estimate_ability_to_consume(2**63 - 1),
    lambda manager: manager.bucket(KEY).try_consume_as_much_as_possible(),
    lambda manager: manager.consume(KEY, 5, max_wait=1),
    lambda manager: manager.bucket(KEY).consume_ignoring_rate_limits(2**62),
    lambda manager: manager.bucket(KEY).add_tokens(7),
    lambda manager: manager.bucket(KEY).force_add_tokens(2**63 - 1),
    lambda manager: manager.bucket(KEY).give_back(2**62),
    lambda manager: manager.bucket(KEY).hold_back(1),
    lambda manager: manager.bucket(KEY).hold_back(10**9),
    lambda manager: manager.reset(KEY),
    lambda manager: manager.bucket(KEY).verbose.try_consume(2),
    *(partial(_replace, inheritance) for inheritance in TokensInheritance),
)


def check_state(data: bytes) -> None:
    """Bytes are a state, which comes back from its own bytes, or corrupt."""
    try:
        state = codec.decode(data, KEY)
    except CorruptStateError as error:
        assert (error.key, error.state) == (KEY, data)
        check_message(error)
        return
    assert codec.decode(data, KEY) == codec._decode(data, KEY) == state  # by what is known of its beginning, and not
    assert codec.decode(codec.encode(state)) == state
    assert repr(state)
    assert str(state.configuration)


def check_verbs(data: bytes) -> None:
    """A bucket that has these bytes answers every verb, or is refused and stays as it is."""
    for verb in VERBS:
        store = SwappingMemoryStore(clock=ManualClock(NOW))
        store.put(KEY, data)
        try:
            verb(ProxyManager(store, "10/minute", clock=ManualClock(NOW)))
        except (CorruptStateError, ReservationOverflowError) as error:
            assert store.get(KEY) == data
            check_message(error)


def check_limits(text: str) -> None:
    """A text is read, as something that prints itself back, or refused with the place marked."""
    for parse in (BucketConfiguration.parse, Bandwidth.parse, SlidingWindow.parse, SlidingWindows.parse):
        try:
            limits = parse(text)
        except InvalidConfigurationError as error:
            assert "^" in str(error)
            check_message(error)
        else:
            assert parse(str(limits)) == limits
            assert repr(limits) == f"{type(limits).__name__}.parse({str(limits)!r})"


def check_url(url: str, secret: str | None = None) -> None:
    """A URL names a store or is refused; and nobody is told the secret in it."""
    for open_store in (store_from_url, async_store_from_url):
        try:
            told = repr(open_store(url))
        except InvalidConfigurationError as error:
            assert error.field == "url"
            check_message(error)
            told = repr(error) + "".join(traceback.format_exception(error))
        assert secret is None or secret not in told


def check_message(error: RateLimitError) -> None:
    """An error is told in short, on a screen or in a log."""
    assert len(str(error)) <= LONGEST_MESSAGE
    assert len(repr(error)) <= 4 * LONGEST_MESSAGE  # with what has to be escaped
