"""How much a manager may decide by itself, without asking the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ratelimit.core.numbers import MAX, Duration, to_nanos
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

_NO_BOUND: Final = MAX


@dataclass(frozen=True, slots=True)
class Optimization:
    """What may be decided from the state last seen, and for how long.

    Made by :meth:`skip_sync_on_zero`, :meth:`delaying`, :meth:`predicting` or :meth:`manual`. What each may admit
    beyond the limits is stated in ``docs/optimizations.md``.

    :param max_unsynchronized_tokens: tokens that may be handed out before they are reported to the store; 0: none, so
        that only refusals are decided here.
    :param max_unsynchronized_nanos: how long the state that the store has shown may be used.
    """

    kind: Literal["skip_sync_on_zero", "delaying", "predicting", "manual"]
    max_unsynchronized_tokens: int
    max_unsynchronized_nanos: int
    min_samples: int = 0
    max_samples: int = 0
    max_sample_age_nanos: int = 0

    @classmethod
    def skip_sync_on_zero(cls, recheck: Duration = 1) -> Optimization:
        """Refuse without asking, while the bucket cannot hold the tokens by the state last seen. Admits nothing more.

        :param recheck: after this long the store is asked all the same: tokens may have been put in by others.
        :raises InvalidConfigurationError: for a duration that is not above 0.
        """
        return cls("skip_sync_on_zero", 0, _nanos(recheck, "recheck"))

    @classmethod
    def delaying(cls, max_unsynchronized_tokens: int, max_unsynchronized_time: Duration) -> Optimization:
        """Hand out tokens without asking, and report them to the store later, with the next decision that asks it.

        :param max_unsynchronized_tokens: how many tokens of a bucket may be handed out before they are reported.
        :param max_unsynchronized_time: for how long after the store was asked.
        :raises InvalidConfigurationError: for fewer than 1 token, or a duration that is not above 0.
        """
        tokens, nanos = _tokens(max_unsynchronized_tokens), _nanos(max_unsynchronized_time, "max_unsynchronized_time")
        return cls("delaying", tokens, nanos)

    @classmethod
    def predicting(
        cls,
        max_unsynchronized_tokens: int,
        max_unsynchronized_time: Duration,
        *,
        min_samples: int = 2,
        max_samples: int = 10,
        max_sample_age: Duration | None = None,
    ) -> Optimization:
        """Hand out tokens like :meth:`delaying`, but ask earlier if other processes have probably taken them meanwhile.

        :param min_samples: with fewer exchanges to judge by, every consumption asks the store; 2 or more.
        :param max_samples: how many exchanges to judge by at most.
        :param max_sample_age: how old they may be; by default ``max_samples`` times ``max_unsynchronized_time``.
        :raises InvalidConfigurationError: for values out of their range.
        """
        tokens, nanos = _tokens(max_unsynchronized_tokens), _nanos(max_unsynchronized_time, "max_unsynchronized_time")
        least = _whole(min_samples, "min_samples", 2)
        most = _whole(max_samples, "max_samples", least)
        age = min(most * nanos, MAX) if max_sample_age is None else _nanos(max_sample_age, "max_sample_age")
        return cls("predicting", tokens, nanos, least, most, age)

    @classmethod
    def manual(cls) -> Optimization:
        """Decide everything by the state last seen, until ``sync()`` of a bucket or its manager is called."""
        return cls("manual", _NO_BOUND, _NO_BOUND)


def _tokens(tokens: int) -> int:
    return _whole(tokens, "max_unsynchronized_tokens", 1)


def _whole(number: int, field: str, least: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= MAX:
        raise InvalidConfigurationError(f"{field} must be an int from {least} to 2**63 - 1, not {brief(number)}", field)
    return number


def _nanos(duration: Duration, field: str) -> int:
    try:
        nanos = to_nanos(duration)
    except (TypeError, ValueError) as error:
        raise InvalidConfigurationError(f"{field} {error}", field) from None
    if nanos < 1:
        raise InvalidConfigurationError(f"{field} must be above 0, not {brief(duration)}", field)
    return nanos
