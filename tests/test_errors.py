from __future__ import annotations

import pickle

import pytest

from ratelimit import (
    BucketNotFoundError,
    ConsumptionProbe,
    ContentionError,
    CorruptStateError,
    InvalidArgumentError,
    InvalidConfigurationError,
    RateLimitError,
    RateLimitExceeded,
    ReservationOverflowError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    UnsupportedStateError,
)

ERRORS = [
    InvalidConfigurationError("capacity must be positive", "capacity"),
    InvalidArgumentError("tokens must be positive"),
    BucketNotFoundError("key"),
    ContentionError("key", 7),
    CorruptStateError("key", b"state", "the data ends"),
    UnsupportedStateError("key", b"state", "a state in format 9", 9),
    ReservationOverflowError("never"),
    RateLimitExceeded("key", 1.5),
    RateLimitExceeded("key", None, ConsumptionProbe(False, 3, 2**63 - 1, 60)),
    StoreError("key", "refused"),
    StoreUnavailableError("key", "gone", in_doubt=True),
    StoreTimeoutError(b"key", "slow"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_whole_from_another_process(error: RateLimitError) -> None:
    if isinstance(error, StoreError | CorruptStateError):
        error.key = "changed on its way up"
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_the_tree_is_as_documented() -> None:
    assert all(isinstance(error, RateLimitError) for error in ERRORS)
    assert issubclass(InvalidConfigurationError, ValueError)
    assert issubclass(InvalidArgumentError, ValueError)
    assert issubclass(UnsupportedStateError, CorruptStateError)
    assert issubclass(StoreTimeoutError, StoreError)
    assert issubclass(StoreUnavailableError, StoreError)
    assert not issubclass(CorruptStateError, StoreError)


@pytest.mark.parametrize("key", ["k" * 10**6, b"\xff\n" * 10**6])
def test_a_huge_key_is_cut_short_in_messages(key: str | bytes) -> None:
    message = str(BucketNotFoundError(key))
    assert len(message) < 400
    assert "\n" not in message
    assert str(len(key)) in message


def test_what_is_in_doubt_is_said() -> None:
    assert "may have been carried out" in str(StoreUnavailableError("key", "gone", in_doubt=True))
    assert "may have been carried out" not in str(StoreUnavailableError("key", "gone"))
