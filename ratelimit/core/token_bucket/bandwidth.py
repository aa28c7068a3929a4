"""Limits: one bandwidth, and the configuration of a bucket, which is one bandwidth or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, ClassVar, Final, NamedTuple

from ratelimit.core.algorithm import LONGEST_STATE, Algorithm
from ratelimit.core.numbers import MAX, NANOS_PER_SECOND, Duration, to_nanos
from ratelimit.core.token_bucket import limit_text, modified_utf8, periods
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

MOST_BANDWIDTHS: Final = 64
"""The most bandwidths of a configuration: it bounds the work that stored bytes can cause.

The scripts in ``lua/`` have the same number.
"""

_LONGEST_ID: Final = 1_024  # bytes
_BYTES_OF_A_BANDWIDTH: Final = 71
_OTHER_BYTES: Final = 45

_LARGEST_QUOTA: Final = 2**46  # one token per nanosecond of a short day
# Quarters of an hour, because the time zones of today are off from UTC by whole ones.
_SECONDS_OF_A_NUMBER: Final = 900

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Bandwidth:
    """One limit of a bucket: at most ``capacity`` tokens, refilled by ``refill_tokens`` every period.

    Usually made by :meth:`greedy`, :meth:`intervally`, :meth:`intervally_aligned`, :meth:`calendar` or :meth:`parse`.

    :param capacity: the size of the bucket, hence the largest burst; 1 to 2**63 - 1.
    :param refill_tokens: tokens that come back per period; from 1 to one per nanosecond. May exceed the capacity.
    :param refill_period_nanos: the period in nanoseconds; at least 1.
    :param initial_tokens: what a new bucket holds; 0 or more, the capacity when None. May exceed the capacity.
    :param refill_intervally: True: the tokens come all at once at the end of each period; False (greedy): one by one,
        as soon as each is due.
    :param first_refill_millis: the time of the first refill in milliseconds since the epoch, for periods aligned to
        the calendar; None: the periods begin when the bucket is made.
    :param adaptive_initial_tokens: with aligned periods, a new bucket holds only the share of the tokens that is due
        for what is left of the present period.
    :param id: distinguishes the bandwidths of a bucket, also when a configuration is replaced; at most
        1,024 bytes of UTF-8.
    :raises InvalidConfigurationError: naming the value that is wrong, and what is allowed.
    """

    capacity: int
    refill_tokens: int
    refill_period_nanos: int
    initial_tokens: int
    refill_intervally: bool
    first_refill_millis: int | None
    adaptive_initial_tokens: bool
    id: str | None

    def __init__(
        self,
        *,
        capacity: int,
        refill_tokens: int,
        refill_period_nanos: int,
        initial_tokens: int | None = None,
        refill_intervally: bool = False,
        first_refill_millis: int | None = None,
        adaptive_initial_tokens: bool = False,
        id: str | None = None,
    ) -> None:
        _check_integer("capacity", capacity, 1)
        _check_integer("refill_tokens", refill_tokens, 1)
        _check_integer("refill_period_nanos", refill_period_nanos, 1)
        if refill_tokens > refill_period_nanos:
            raise InvalidConfigurationError(
                f"refill_tokens must be at most one per nanosecond; got {refill_tokens} in {refill_period_nanos} ns",
                "refill_tokens",
            )
        _check_bool("refill_intervally", refill_intervally)
        _check_bool("adaptive_initial_tokens", adaptive_initial_tokens)
        if first_refill_millis is not None:
            _check_integer("first_refill_millis", first_refill_millis, 0)
            if not refill_intervally:
                raise InvalidConfigurationError(
                    "refill_intervally must be True where first_refill_millis is given; got False",
                    "first_refill_millis",
                )
        elif adaptive_initial_tokens:
            raise InvalidConfigurationError(
                "adaptive_initial_tokens must be False where first_refill_millis is None; got True",
                "adaptive_initial_tokens",
            )
        if initial_tokens is None:
            initial_tokens = capacity
        _check_integer("initial_tokens", initial_tokens, 0)
        if adaptive_initial_tokens and initial_tokens != capacity:
            raise InvalidConfigurationError(
                f"initial_tokens must be None with adaptive_initial_tokens; got {initial_tokens}", "initial_tokens"
            )
        if id is not None:
            _check_id(id)
        self._set(
            capacity,
            refill_tokens,
            refill_period_nanos,
            initial_tokens,
            refill_intervally,
            first_refill_millis,
            adaptive_initial_tokens,
            id,
        )

    @classmethod
    def unchecked(cls, *values: int | str | bool | None) -> Bandwidth:
        """Return a bandwidth found in a stored state, whose ranges are not checked.

        :param values: those of the fields, in their order.
        """
        bandwidth = object.__new__(cls)
        bandwidth._set(*values)
        return bandwidth

    def _set(self, *values: int | str | bool | None) -> None:
        for named, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, named.name, value)

    @classmethod
    def greedy(
        cls,
        capacity: int,
        period: Duration,
        *,
        refill_tokens: int | None = None,
        initial_tokens: int | None = None,
        id: str | None = None,
    ) -> Bandwidth:
        """Let tokens come back one by one, evenly over the period: the ordinary token bucket.

        :param period: a ``timedelta`` or a number of seconds.
        :param refill_tokens: tokens per period; the capacity when None.
        :raises InvalidConfigurationError: for a value out of range.
        """
        return _bandwidth(capacity, period, refill_tokens, initial_tokens, id)

    @classmethod
    def intervally(
        cls,
        capacity: int,
        period: Duration,
        *,
        refill_tokens: int | None = None,
        initial_tokens: int | None = None,
        id: str | None = None,
    ) -> Bandwidth:
        """Let tokens come back all at once, at the end of each period; the first period begins with the bucket.

        :param period: a ``timedelta`` or a number of seconds.
        :param refill_tokens: tokens per period; the capacity when None.
        :raises InvalidConfigurationError: for a value out of range.
        """
        return _bandwidth(capacity, period, refill_tokens, initial_tokens, id, refill_intervally=True)

    @classmethod
    def intervally_aligned(
        cls,
        capacity: int,
        period: Duration,
        *,
        first_refill: datetime,
        refill_tokens: int | None = None,
        initial_tokens: int | None = None,
        adaptive_initial_tokens: bool = False,
        id: str | None = None,
    ) -> Bandwidth:
        """Let tokens come back at the end of each period, the periods aligned to the calendar: a quota per day, say.

        :param period: a ``timedelta`` or a number of seconds.
        :param first_refill: an aware ``datetime`` not before 1970; the refills come at it and every period from it,
            so that any past midnight makes every midnight a refill.
        :param refill_tokens: tokens per period; the capacity when None.
        :param adaptive_initial_tokens: a bucket made in the middle of a period holds only the share of the rest.
        :raises InvalidConfigurationError: for a value out of range.
        """
        if getattr(first_refill, "tzinfo", None) is None:
            raise InvalidConfigurationError(
                f"first_refill must be a datetime with a time zone; got {brief(first_refill)}", "first_refill"
            )
        if adaptive_initial_tokens and initial_tokens is not None:
            raise InvalidConfigurationError(
                f"initial_tokens must be None with adaptive_initial_tokens; got {brief(initial_tokens)}",
                "initial_tokens",
            )
        return _bandwidth(
            capacity,
            period,
            refill_tokens,
            initial_tokens,
            id,
            refill_intervally=True,
            first_refill_millis=(first_refill - _EPOCH) // timedelta(milliseconds=1),
            adaptive_initial_tokens=adaptive_initial_tokens,
        )

    @classmethod
    def calendar(cls, capacity: int, period: str, *, tz: str = "UTC", id: str | None = None) -> Bandwidth:
        """Let a quota begin with each period of the calendar; what is left of it at the end of the period is lost.

        :param capacity: the quota; 1 to 2**46.
        :param period: ``"day"``, ``"week"`` (from Monday), ``"month"`` or ``"year"``.
        :param tz: the name of a time zone, such as ``"Europe/Berlin"``, in which periods begin at midnight.
        :param id: distinguishes quotas of the same period and time zone.
        :raises InvalidConfigurationError: for a value out of range; also where there is no time zone database, which
            the package ``tzdata`` brings.
        """
        return CalendarBandwidth(capacity=capacity, unit=period, tz=tz, id=id)

    @property
    def window_nanos(self) -> int:
        """How long it takes the capacity to come back, in nanoseconds, rounded up."""
        return -(-self.capacity * self.refill_period_nanos // self.refill_tokens)

    @classmethod
    def parse(cls, text: str) -> Bandwidth:
        """Read one limit from its text form: ``"100/minute"``, ``"10/second burst 50"``, ``"1000/day intervally"``.

        The grammar is in ``docs/choosing-limits.md``.

        :raises InvalidConfigurationError: showing the place in the text that is wrong.
        """
        return _from_spec(text, limit_text.parse_one(text))

    def __str__(self) -> str:
        """Return the text form; :meth:`parse` of it gives an equal bandwidth."""
        return limit_text.print_one(self)

    def __repr__(self) -> str:
        try:
            if Bandwidth.parse(str(self)) == self:
                return f"Bandwidth.parse({str(self)!r})"
        except InvalidConfigurationError:
            # A stored bandwidth may have values that no text form has.
            pass
        return f"Bandwidth({', '.join(f'{named.name}={getattr(self, named.name)!r}' for named in fields(self))})"


@dataclass(frozen=True, slots=True, init=False, repr=False)
class CalendarBandwidth(Bandwidth):
    """A quota for each period of the calendar; made by :meth:`Bandwidth.calendar`.

    It is never stored itself: what is stored is a bandwidth for the present period, see :meth:`in_period`. Its
    ``refill_period_nanos`` is the longest that a period can be, without clocks that are put back.
    """

    unit: str
    tz: str

    def __init__(self, *, capacity: int, unit: str, tz: str = "UTC", id: str | None = None) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or not 1 <= capacity <= _LARGEST_QUOTA:
            raise InvalidConfigurationError(
                f"capacity must be an int from 1 to 2**46 in a calendar period; got {brief(capacity)}", "capacity"
            )
        if unit not in periods.UNITS:
            raise InvalidConfigurationError(f"period must be day, week, month or year; got {brief(unit)}", "period")
        if not isinstance(tz, str):
            raise InvalidConfigurationError(f"tz must be a str; got {brief(tz)}", "tz")
        periods.zone_of(tz)
        if id is not None:
            _check_id(id)
        period = periods.LONGEST_DAYS[unit] * 86_400 * NANOS_PER_SECOND
        self._set(capacity, capacity, period, capacity, True, None, False, id, unit, tz)

    def in_period(self, period: periods.Period) -> Bandwidth:
        """Return what is stored of the quota during a period: its only refill comes at the end of this period.

        The id names the period. So in the next one the quota is another bandwidth, which inherits nothing.
        """
        begin, end, name = period
        words = [self.unit, name] + [self.tz] * (self.tz != "UTC") + [self.id or ""] * (self.id is not None)
        length, quota = (end - begin) * NANOS_PER_SECOND, self.capacity
        return Bandwidth.unchecked(quota, quota, length, quota, True, end * 1_000, False, " ".join(words))

    def __str__(self) -> str:
        return limit_text.print_calendar(self)

    # A dataclass would otherwise make its own, and forget the text form.
    __repr__ = Bandwidth.__repr__


class Dated(NamedTuple):
    """A configuration with calendar quotas, as it is stored during the present periods of all of them.

    :param begin: when the last of these periods has begun, in nanoseconds since the epoch.
    :param end: when the first of them ends.
    :param number: of the periods, from ``begin``; it is part of the stored version.
    """

    begin: int
    end: int
    configuration: BucketConfiguration
    number: int


@dataclass(frozen=True, slots=True, init=False, repr=False)
class BucketConfiguration:
    """The limits of a bucket, one bandwidth or up to 64; a token must be there in all of them.

    Frozen, hashable and comparable; the order of the bandwidths counts.

    :raises InvalidConfigurationError: without a bandwidth, with more than 64, with two of the same id, or with ids that
        make the state of a bucket longer than 16,384 bytes.
    """

    algorithm: ClassVar[Algorithm]
    """Bucket4j's token bucket; set in ``ratelimit/core/token_bucket/__init__.py``."""

    bandwidths: tuple[Bandwidth, ...]
    # These are computed once, because every decision asks for them.
    _hash: int = field(init=False, repr=False, compare=False)
    starts_full: bool = field(init=False, repr=False, compare=False)
    """Whether a new bucket holds what it can hold, in each bandwidth."""
    only_greedy: tuple[int, int, int] | None = field(init=False, repr=False, compare=False)
    """Capacity, refill tokens, and their period in nanoseconds, where there is one bandwidth and it is greedy."""
    has_periods: bool = field(init=False, repr=False, compare=False)
    """Whether a bandwidth is a calendar quota, so that what is stored changes with the periods."""
    _dated: Dated | None = field(init=False, repr=False, compare=False)

    def __init__(self, *bandwidths: Bandwidth) -> None:
        if not 1 <= len(bandwidths) <= MOST_BANDWIDTHS:
            raise InvalidConfigurationError(
                f"bandwidths must be from 1 to {MOST_BANDWIDTHS}; got {len(bandwidths)}", "bandwidths"
            )
        for bandwidth in bandwidths:
            if not isinstance(bandwidth, Bandwidth):
                raise InvalidConfigurationError(f"bandwidths must be Bandwidth; got {brief(bandwidth)}", "bandwidths")
        _check_ids(bandwidths)
        starts_full = all(one.initial_tokens == one.capacity and not one.adaptive_initial_tokens for one in bandwidths)
        object.__setattr__(self, "bandwidths", bandwidths)
        object.__setattr__(self, "_hash", hash(bandwidths))
        object.__setattr__(self, "starts_full", starts_full)
        object.__setattr__(self, "only_greedy", _greedy(bandwidths[0]) if len(bandwidths) == 1 else None)
        object.__setattr__(self, "has_periods", any(isinstance(one, CalendarBandwidth) for one in bandwidths))
        object.__setattr__(self, "_dated", None)
        if self.has_periods:
            # What is stored has to be valid as well; the ids are of one length in all periods.
            self.dated(0)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # In another process strings have other hashes.
        return BucketConfiguration, self.bandwidths

    @classmethod
    def parse(cls, text: str) -> BucketConfiguration:
        """Read limits from their text form, separated by semicolons, commas or new lines.

        An example is ``"10/second burst 50; 1000/hour"``.

        The grammar is in ``docs/choosing-limits.md``.

        :raises InvalidConfigurationError: showing the place in the text that is wrong.
        """
        specs = limit_text.parse_several(text)
        bandwidths = [_from_spec(text, spec) for spec in specs]
        try:
            return cls(*bandwidths)
        except InvalidConfigurationError as error:
            raise limit_text.error_at(text, error.message, limit_text.repeated_id(specs)) from None

    @classmethod
    def of(cls, limits: Limits) -> BucketConfiguration:
        """Return a configuration from whatever a caller may give for one.

        :param limits: a configuration, a bandwidth, the text form of either, or a list or tuple of those.
        :raises InvalidConfigurationError: for anything else, and for what :meth:`parse` refuses.
        """
        if isinstance(limits, BucketConfiguration):
            return limits
        if isinstance(limits, str):
            return _parsed(limits)
        if isinstance(limits, Bandwidth):
            return cls(limits)
        if isinstance(limits, list | tuple) and all(isinstance(one, _LIMITS) for one in limits):
            return cls(*(bandwidth for one in limits for bandwidth in cls.of(one)))
        raise InvalidConfigurationError(f"limits must be {_ALLOWED_LIMITS}; got {brief(limits)}", "configuration")

    def dated(self, now: int) -> Dated:
        """Return the configuration as it is stored at this time, for one with calendar quotas.

        :param now: in nanoseconds since the epoch.
        """
        dated = self._dated
        if dated is None or not dated.begin <= now < dated.end:
            dated = _dated(self, now)
            object.__setattr__(self, "_dated", dated)
        return dated

    def at(self, now: int) -> BucketConfiguration:
        """Return the configuration as it is stored at this time: with a bandwidth for the period of each quota.

        :param now: in nanoseconds since the epoch.
        """
        return self.dated(now).configuration if self.has_periods else self

    def __iter__(self) -> Iterator[Bandwidth]:
        return iter(self.bandwidths)

    def __len__(self) -> int:
        return len(self.bandwidths)

    def __str__(self) -> str:
        """Return the text form; :meth:`parse` of it gives an equal configuration."""
        return "; ".join(map(str, self.bandwidths))

    def __repr__(self) -> str:
        try:
            if BucketConfiguration.parse(str(self)) == self:
                return f"BucketConfiguration.parse({str(self)!r})"
        except InvalidConfigurationError:
            pass
        return f"BucketConfiguration({', '.join(map(repr, self.bandwidths))})"


def _check_ids(bandwidths: Sequence[Bandwidth]) -> None:
    ids: set[str] = set()
    quotas: set[tuple[str, str, str | None]] = set()
    for bandwidth in bandwidths:
        if isinstance(bandwidth, CalendarBandwidth):
            quota = bandwidth.unit, bandwidth.tz, bandwidth.id
            if quota in quotas:
                raise InvalidConfigurationError(
                    f"id must differ between quotas of one period and time zone; got {brief(bandwidth.id)} twice",
                    "id",
                )
            quotas.add(quota)
        if bandwidth.id in ids:
            raise InvalidConfigurationError(f"id must differ between bandwidths; got {brief(bandwidth.id)} twice", "id")
        if bandwidth.id is not None:
            ids.add(bandwidth.id)
    if ids and _OTHER_BYTES + sum(map(_bytes_needed, bandwidths)) > LONGEST_STATE:
        raise InvalidConfigurationError(
            f"ids must be short enough for a state of {LONGEST_STATE} bytes; got too many bytes in all", "id"
        )


def _dated(configuration: BucketConfiguration, now: int) -> Dated:
    begin, end = 0, MAX
    bandwidths = []
    # Bandwidths without an id inherit from each other only where there is one of them on each side.
    nameless = sum(one.id is None and not isinstance(one, CalendarBandwidth) for one in configuration)
    for place, bandwidth in enumerate(configuration, start=1):
        if isinstance(bandwidth, CalendarBandwidth):
            period = periods.period_at(bandwidth.unit, bandwidth.tz, now // NANOS_PER_SECOND)
            begin, end = max(begin, period.begin), min(end, period.end * NANOS_PER_SECOND)
            bandwidths.append(bandwidth.in_period(period))
        elif bandwidth.id is None and nameless > 1:
            bandwidths.append(replace(bandwidth, id=f"limit {place}"))
        else:
            bandwidths.append(bandwidth)
    number = begin // _SECONDS_OF_A_NUMBER
    return Dated(begin * NANOS_PER_SECOND, end, BucketConfiguration(*bandwidths), number)


def _bytes_needed(bandwidth: Bandwidth) -> int:
    """Return how many bytes of a state are about this bandwidth."""
    return _BYTES_OF_A_BANDWIDTH + (0 if bandwidth.id is None else 2 + len(modified_utf8.encode(bandwidth.id)))


def _greedy(bandwidth: Bandwidth) -> tuple[int, int, int] | None:
    tokens, period = bandwidth.refill_tokens, bandwidth.refill_period_nanos
    # Stored bytes may say anything of the rate.
    if bandwidth.refill_intervally or tokens < 1 or period < 1:
        return None
    return bandwidth.capacity, tokens, period


@lru_cache(maxsize=256)
def _parsed(text: str) -> BucketConfiguration:
    """Parse a text once: a callable that looks up a customer's limits returns the same few texts over and over."""
    return BucketConfiguration.parse(text)


Limits = BucketConfiguration | Bandwidth | str | Sequence[BucketConfiguration | Bandwidth | str]
"""What callers may give for a configuration: itself, a limit, the text form, or a list of these for one bucket."""

_LIMITS = (BucketConfiguration, Bandwidth, str)
_ALLOWED_LIMITS = 'text such as "100/minute", a Bandwidth, a BucketConfiguration, or a list or tuple of these'


def _from_spec(text: str, spec: limit_text.LimitSpec) -> Bandwidth:
    if spec.is_sliding:
        raise limit_text.error_at(text, "a bandwidth must not be sliding: see SlidingWindow", spec.spans["sliding"])
    try:
        return CalendarBandwidth(**spec.values) if "unit" in spec.values else Bandwidth(**spec.values)
    except InvalidConfigurationError as error:
        raise limit_text.error_at(text, error.message, spec.spans.get(error.field or "", spec.span)) from None


def _bandwidth(
    capacity: int,
    period: Duration,
    refill_tokens: int | None,
    initial_tokens: int | None,
    id: str | None,
    *,
    refill_intervally: bool = False,
    first_refill_millis: int | None = None,
    adaptive_initial_tokens: bool = False,
) -> Bandwidth:
    try:
        period_nanos = to_nanos(period)
    except (TypeError, ValueError) as error:
        raise InvalidConfigurationError(f"period {error}", "period") from None
    if period_nanos < 1:
        raise InvalidConfigurationError(f"period must be at least a nanosecond; got {brief(period)}", "period")
    return Bandwidth(
        capacity=capacity,
        refill_tokens=capacity if refill_tokens is None else refill_tokens,
        refill_period_nanos=period_nanos,
        initial_tokens=initial_tokens,
        refill_intervally=refill_intervally,
        first_refill_millis=first_refill_millis,
        adaptive_initial_tokens=adaptive_initial_tokens,
        id=id,
    )


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX:
        raise InvalidConfigurationError(f"{name} must be an int from {least} to 2**63 - 1; got {brief(value)}", name)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidConfigurationError(f"{name} must be True or False; got {brief(value)}", name)


def _check_id(id: object) -> None:
    if not isinstance(id, str):
        raise InvalidConfigurationError(f"id must be a str; got {brief(id)}", "id")
    if len(id) > _LONGEST_ID or len(modified_utf8.encode(id)) > _LONGEST_ID:
        raise InvalidConfigurationError(
            f"id must be at most {_LONGEST_ID} bytes of modified UTF-8; got {brief(id)}", "id"
        )
