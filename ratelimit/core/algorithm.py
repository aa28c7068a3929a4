"""The seam of limiting algorithms: what each of them must do, and what chooses between them.

An algorithm is two kinds of values and a handful of pure functions. A *configuration* is the limits of one bucket, and
names its algorithm. A *state* is a bucket at one time: what time and consumption do to it is computed from the state
and the time alone, and makes a new state. Commands, expiration, stores and the engine speak of states and never ask
which algorithm they are of.

When a bucket is made, its configuration chooses the algorithm. When a bucket is read, the first four bytes do: they are
a number, and each number belongs to one algorithm. ``docs/bytes.md`` has the register of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple, NoReturn, Protocol, Self, TypeAlias

from ratelimit.core.inheritance import TokensInheritance
from ratelimit.errors import CorruptStateError, UnsupportedStateError
from ratelimit.keys import Key

LONGEST_STATE: Final = 16_384
"""The most bytes of a stored state, whatever its algorithm: it bounds the work that stored bytes can cause.

The scripts in ``lua/`` have the same number.
"""

_FORMAT_BYTES: Final = 4

Configuration: TypeAlias = Any
"""The limits of a bucket, of whatever algorithm.

A configuration is immutable, hashable and comparable. Its ``algorithm`` is an :class:`Algorithm`, and its text form is
what ``str`` makes of it. Iteration gives its limits, and ``len`` their number. A limit has a ``capacity`` (tokens),
``window_nanos`` (how long it takes the capacity to come back) and a text form.

A configuration whose ``has_periods`` is true is stored in another form in each period of the calendar: its
``dated(now)`` has this ``configuration``, and the ``number`` of the period, which grows; its ``at(now)`` is this
configuration alone. ``initial`` and ``replaced`` below are given either.
"""


def stored_form(configuration: Configuration, now: int) -> Configuration:
    """Return the form in which a configuration is stored at this time, in nanoseconds since the epoch."""
    return configuration.at(now) if getattr(configuration, "has_periods", False) else configuration


Surplus: TypeAlias = tuple[int, int]
"""What a reservation took from one limit besides its tokens: two numbers that only the algorithm understands."""


class State(Protocol):
    """A bucket at one time, under its configuration.

    States are immutable. Methods that take ``now``, in nanoseconds since the epoch, may be given any time: a clock that
    went back neither gives tokens nor takes them. Unless said otherwise they are asked of a state that has been
    refilled at this time.

    Methods raise ``ArithmeticError`` where stored numbers make no sense, such as a period of zero.
    """

    @property
    def configuration(self) -> Configuration:
        """The limits that the bucket has."""
        ...

    @property
    def configuration_version(self) -> int | None:
        """The version that is stored with the configuration, if any."""
        ...

    @property
    def consumed_tokens(self) -> int:
        """The tokens consumed since the bucket was made, a number of 64 bits that wraps around."""
        ...

    @property
    def bandwidth_states(self) -> tuple[Any, ...]:
        """What is kept of each limit, in their order. The ``current_size`` of each is its tokens, negative in debt."""
        ...

    @property
    def available_tokens(self) -> int:
        """The tokens that can be consumed, those of the scarcest limit; negative in debt."""
        ...

    @property
    def is_new_when_full(self) -> bool:
        """Whether this bucket will equal a new one as soon as it is full, so that it can be forgotten then."""
        ...

    @property
    def reserves_beyond_capacity(self) -> bool:
        """Whether more than a limit can hold may be reserved, after a wait that is longer by as much."""
        ...

    def refilled(self, now: int) -> Self:
        """Return the state with everything that has come in until this time."""
        ...

    def refilled_and_consumed(self, tokens: int, now: int) -> Self | None:
        """Refill and consume in one step, the commonest of all; None where the tokens are not all there."""
        ...

    def consumed(self, tokens: int) -> Self:
        """Return the state less these tokens, whether they are there or not."""
        ...

    def reserved(self, tokens: int, wait: int, now: int) -> tuple[Self, tuple[Surplus, ...]]:
        """Return the state less these tokens, which are used after this wait only, and what was taken besides them."""
        ...

    def cancelled(self, tokens: int, noted: int, surplus: tuple[Surplus, ...]) -> Self | None:
        """Return the state without a reservation; None where later reservations count on its place.

        :param noted: what was counted as consumed right after the reservation.
        :param surplus: what was taken besides the tokens.
        """
        ...

    def given_back(self, tokens: int) -> Self:
        """Return the state with these tokens put back, up to the capacity, and not counted as consumed."""
        ...

    def added(self, tokens: int) -> Self:
        """Return the state with these tokens put in, up to the capacity."""
        ...

    def force_added(self, tokens: int) -> Self:
        """Return the state with these tokens put in, above the capacity if need be."""
        ...

    def reset(self) -> Self:
        """Return the state with every limit at its capacity."""
        ...

    def held_back(self, nanos: int, now: int) -> Self | None:
        """Return the state whose next token comes no sooner than this long from now; None where this one is such."""
        ...

    def nanos_until(self, tokens: int, now: int, *, check_capacity: bool) -> int:
        """Return how long until this many tokens are there; ``NEVER`` where that does not fit into 64 bits.

        :param check_capacity: answer ``NEVER`` also where more is wanted than a limit can hold.
        """
        ...

    def nanos_until_full(self, now: int) -> int:
        """Return how long until every limit is at its capacity."""
        ...

    def shows(self, before: State | None, now: int) -> bool:
        """Return whether the bytes of this state hold this very reading of the clock.

        If they do, and no other writer reads the clock alike, the bytes can be nobody else's.

        :param before: the state that this one was computed from, refilled or not; None: the bucket was made.
        """
        ...


class Level(NamedTuple):
    """How full one limit of a bucket is, as if it stood alone.

    :param limit: one of the limits that the configuration gives.
    :param tokens: the tokens that are there; negative in debt.
    :param nanos_until_next: how long until one token more than now can be consumed; ``NEVER`` when it is full.
    :param nanos_until_full: how long until the limit is at its capacity.
    """

    limit: Any
    tokens: int
    nanos_until_next: int
    nanos_until_full: int


class Everyday(NamedTuple):
    """The commonest decision of an algorithm, from bytes to bytes: tokens are consumed that are there.

    :param head_of: ``head_of(configuration, version)`` returns what never changes of such a bucket; None where its
        decisions are not of that kind. It has ``is_new_when_full``.
    :param consumed: ``consumed(head, stored, tokens, now)`` returns the new bytes, the tokens that remain, and the
        nanoseconds until the bucket is full; False where there are too few tokens; None where anything is unusual.
    """

    head_of: Callable[[Configuration, int | None], Any]
    consumed: Callable[[Any, bytes, int, int], tuple[bytes, int, int] | bool | None]


@dataclass(frozen=True, slots=True, eq=False)
class Algorithm:
    """What an algorithm does besides what its states do: plain functions, so that a call costs nothing extra."""

    name: str
    """What it is called in messages."""

    formats: tuple[int, ...]
    """The numbers that its stored states begin with."""

    initial: Callable[[Configuration, int | None, int], State]
    """``initial(configuration, version, now)`` returns the state of a bucket made at this time, before any refill."""

    replaced: Callable[[State, Configuration, int | None, TokensInheritance, int], State]
    """``replaced(state, configuration, version, inheritance, now)`` puts a configuration of this algorithm in place.

    The state has been refilled at this time, and keeps what it has counted as consumed. From a state of another
    algorithm nothing is inherited: the limits begin as those of a new bucket do, whatever the inheritance.
    """

    encode: Callable[[Any], bytes]
    """``encode(state)`` returns the bytes to store."""

    decode: Callable[[bytes, Key], State]
    """``decode(data, key)`` returns the state that bytes of one of the formats hold.

    It raises ``CorruptStateError`` for bytes that hold none, and names the key.
    """

    share_of: Callable[[Configuration, Fraction], Configuration]
    """``share_of(configuration, share)`` returns limits for one of several processes that decide without each other."""

    levels: Callable[[Configuration, tuple[Any, ...], int], tuple[Level, ...]]
    """``levels(configuration, bandwidth_states, now)`` returns how full each limit is."""

    everyday: Everyday | None = None
    """The commonest decision in short; None: there is no short form."""

    script: str | None = None
    """The script by which a server decides alone; None: states of this algorithm are always swapped."""


class _Decoders(dict[bytes, Callable[[bytes, Key], Any]]):
    """The functions that decode what is stored, by its first four bytes."""

    def __missing__(self, first: bytes) -> Callable[[bytes, Key], NoReturn]:
        return _refuse


decoders: Final = _Decoders()
"""``decoders[data[:4]](data, key)`` is :func:`decode` without a further call, for loops in which that counts."""


def register(algorithm: Algorithm) -> None:
    """Let the formats of an algorithm be decoded.

    :raises ValueError: for a format that is taken.
    """
    firsts = [format.to_bytes(_FORMAT_BYTES, "big", signed=True) for format in algorithm.formats]
    if any(first in decoders for first in firsts):
        raise ValueError(f"formats must be free; got {algorithm.formats} of {algorithm.name}")
    decoders.update(dict.fromkeys(firsts, algorithm.decode))


def encode(state: State) -> bytes:
    """Return the bytes to store for a state; loops in which a call counts load ``encode`` from its algorithm."""
    data: bytes = state.configuration.algorithm.encode(state)
    return data


def decode(data: bytes, key: Key = "") -> State:
    """Return the state that stored bytes hold, whatever its algorithm.

    :param key: where the bytes were found, for the error.
    :raises CorruptStateError: for bytes that hold no state; ``UnsupportedStateError`` for a format that is not known.
    """
    state: State = decoders[data[:_FORMAT_BYTES]](data, key)
    return state


def _refuse(data: bytes, key: Key) -> NoReturn:
    if len(data) > LONGEST_STATE:
        raise CorruptStateError(key, data, f"it has more than {LONGEST_STATE} bytes")
    if len(data) < _FORMAT_BYTES:
        reason = f"the data ends after {len(data)} bytes, where {_FORMAT_BYTES} or more are needed"
        raise CorruptStateError(key, data, reason)
    format = int.from_bytes(data[:_FORMAT_BYTES], "big", signed=True)
    raise UnsupportedStateError(key, data, f"a state in format {format}, known is {_known_formats()}", format)


def _known_formats() -> str:
    """Return the formats of all algorithms as text, neighbours as a range."""
    ranges: list[list[int]] = []
    for format in sorted(int.from_bytes(first, "big", signed=True) for first in decoders):
        if ranges and format == ranges[-1][1] + 1:
            ranges[-1][1] = format
        else:
            ranges.append([format, format])
    return ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in ranges)


def out_of_range(data: bytes, key: Key) -> CorruptStateError:
    """Return the error for stored limits that make no sense: they can be decoded, but arithmetic fails."""
    return CorruptStateError(key, data, "its limits are out of range")


class _Shown(Protocol):
    """A state, a snapshot, or a verbose answer."""

    @property
    def configuration(self) -> Configuration: ...

    @property
    def bandwidth_states(self) -> tuple[Any, ...]: ...


def levels(shown: _Shown, now: int) -> tuple[Level, ...]:
    """Return how full each limit is of a state, a snapshot or a verbose answer; nothing where nothing is limited.

    :param now: the time at which ``shown`` was refilled.
    :raises ArithmeticError: where stored numbers make no sense.
    """
    configuration = shown.configuration
    if configuration is None:
        return ()
    found: tuple[Level, ...] = configuration.algorithm.levels(configuration, shown.bandwidth_states, now)
    return found
