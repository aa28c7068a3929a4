"""What a manager answers when its store does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Final, Literal

from ratelimit.errors import InvalidConfigurationError, RateLimitError
from ratelimit.keys import Key, brief


@dataclass(frozen=True, slots=True)
class OnError:
    """What becomes of a decision where the store fails: :attr:`RAISE`, :attr:`ALLOW`, :attr:`DENY` or :meth:`local`.

    It is about ``StoreError`` and its kinds, ``ContentionError`` and ``CorruptStateError``, and about the verbs that
    decide: those that consume, and ``estimate_ability_to_consume``. The others raise the error whatever is said here.
    """

    kind: Literal["raise", "allow", "deny", "local"]
    share: Fraction = Fraction(1)

    RAISE: ClassVar[OnError]
    """The caller gets the error."""
    ALLOW: ClassVar[OnError]
    """Answer as if the key were not limited: no caller is stopped while the store fails."""
    DENY: ClassVar[OnError]
    """Answer as if there were no tokens, with a wait of a second. ``consume_ignoring_rate_limits`` raises."""

    def __post_init__(self) -> None:
        if self.kind not in ("raise", "allow", "deny", "local"):
            raise InvalidConfigurationError(f"kind must be raise, allow, deny or local, not {brief(self.kind)}", "kind")

    @classmethod
    def local(cls, share: float | Fraction) -> OnError:
        """Decide by a bucket of this process, which begins as a new one, with a share of the limits.

        What is consumed of it is charged to the shared bucket when the store answers again, in debt if need be.

        :param share: this process's part of the whole, above 0 and at most 1: ``1 / instances``.
        :raises InvalidConfigurationError: for another number.
        """
        if isinstance(share, bool) or not isinstance(share, int | float | Fraction) or not 0 < share <= 1:
            raise InvalidConfigurationError(f"share must be a number above 0, at most 1, not {brief(share)}", "share")
        return cls("local", max(Fraction(share).limit_denominator(1_000_000), Fraction(1, 1_000_000)))


OnError.RAISE = OnError("raise")
OnError.ALLOW = OnError("allow")
OnError.DENY = OnError("deny")

ErrorPolicy = OnError | Callable[[Key, RateLimitError], OnError]
"""An ``OnError`` for all failures, or a callable that chooses one by the key and the error."""

RETRY_NANOS: Final = 1_000_000_000
"""The wait in nanoseconds that a refusal states while the store fails, when the true wait is unknown."""
