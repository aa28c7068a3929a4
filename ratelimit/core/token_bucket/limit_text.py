"""The text form of limits: ``100/minute``, ``10/second burst 50; 1000/hour id daily``.

::

    limits    = limit *( separator limit )
    separator = ";" | "," | "|" | new line      one or several; also before the first limit and after the last
    limit     = count [ requests ] ( "/" | "per" ) [ count ] unit *option
                                                the period is count units, one without a count
    option    = "burst" count            the size of the bucket; without it, the tokens of one period
              | "initial" count          what a new bucket holds
              | "intervally"             tokens come at the end of each period
              | "aligned" time           the same, the periods counted from this time
              | "adaptive"               with aligned: a new bucket holds the share of what is left of the period
              | "calendar"               a quota for each day or week of the calendar, in UTC
              | "tz" zone                the same in a time zone; also for months and years
              | "id" name
              | "sliding"                at most the count in any span of this length; without other options
    count     = digits, with "_" between them if you like
    requests  = "r" | "req" | "reqs" | "request" | "requests"
    unit      = ns | us | ms | s | m | h | d | w, or their long forms, singular or plural
              | "month" | "year"         a quota for each month or year of the calendar, in UTC where no tz is given
    zone      = a name of the time zone database, such as Europe/Berlin
    time      = ISO 8601 with an offset, to the millisecond | "@" milliseconds since the epoch
    name      = letters, digits and "_.:-" | a JSON string

Words may be written in either case. Options come in any order and once each, also on the lines below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any, NoReturn

from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

if TYPE_CHECKING:
    from ratelimit.core.token_bucket.bandwidth import Bandwidth, CalendarBandwidth

Span = tuple[int, int]

_UNITS = {
    "week": 604_800_000_000_000,
    "day": 86_400_000_000_000,
    "hour": 3_600_000_000_000,
    "minute": 60_000_000_000,
    "second": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_ALIASES = (
    {"w": "week", "weeks": "week", "d": "day", "days": "day", "h": "hour", "hr": "hour", "hrs": "hour", "hours": "hour"}
    | {"m": "minute", "min": "minute", "mins": "minute", "minutes": "minute"}
    | {"s": "second", "sec": "second", "secs": "second", "seconds": "second"}
    | {"millisecond": "ms", "milliseconds": "ms", "microsecond": "us", "microseconds": "us", "µs": "us"}
    | {"nanosecond": "ns", "nanoseconds": "ns", "\N{GREEK SMALL LETTER MU}s": "us", "months": "month", "years": "year"}
)
# These have no fixed length: what is said here serves error messages only.
_TYPICAL_DAYS = {"month": 30, "year": 365}
_CALENDAR_UNITS = ("day", "week", *_TYPICAL_DAYS)
_OPTIONS = ("burst", "initial", "intervally", "aligned", "adaptive", "calendar", "tz", "id", "sliding")
_NOT_OF_A_CALENDAR = ("burst", "initial", "intervally", "aligned", "adaptive")
_UNIT_NAMES = "ns, us, ms, second, minute, hour, day, week, month or year"

_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[;,|\s]*")
_NEXT = re.compile(r"""[^\s/;,|"]+|.?""")
_WORD = re.compile(r"""[^\s/;,|"0-9][^\s/;,|"]*""")
_REQUESTS = re.compile(r"(?:r|reqs?|requests?)(?![^\s/])", re.IGNORECASE)
_PER = re.compile(r"/|per", re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
# A comma may stand before the fraction of a second.
_TIME = re.compile(r"""[^\s/;,|"]+(?:,[0-9]+(?:Z|[+-][0-9:]+))?""")
_ZONE = re.compile(r"""[^\s;,|"]+""")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.:-]+")

_COUNT = re.compile(r"[0-9]+(?:_[0-9]+)*")
# Numbers in other forms are read, too, so that an error can say what is meant. A comma with three digits behind it is
# always a part of a number, since "1,000/minute" must not be taken for two limits.
_MARK = r"[,.'\u2019 \u00a0\u2009\u202f]"
_NUMBER = re.compile(rf"\.?[0-9]+(?:[_.][0-9]+|{_MARK}[0-9]{{3}}(?![0-9]))*")
_DECIMAL_COMMA = re.compile(r"[0-9]+,[0-9]+(?=\s*(?:/|r/|per))", re.IGNORECASE)
_GROUPED = re.compile(rf"[0-9]{{1,3}}({_MARK})[0-9]{{3}}(?:\1[0-9]{{3}})*")
_DECIMAL = re.compile(r"[0-9]*[.,][0-9]+")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Python itself refuses a number of some thousands of digits, in words of its own.
_MOST_DIGITS = 40
_LONGEST_LINE = 200  # that an error shows whole
_SHOWN_BEFORE, _SHOWN_OF_LONG = 40, 120  # of a longer one


@dataclass(frozen=True, slots=True)
class LimitSpec:
    """A limit as it was read: values for the fields of a bandwidth, and where in the text each of them stands.

    A sliding window has a capacity and a period, too.
    """

    values: dict[str, Any]
    spans: dict[str, Span]
    span: Span

    @property
    def is_sliding(self) -> bool:
        """Whether it is a sliding window."""
        return "sliding" in self.spans


def error_at(text: str, message: str, span: Span) -> InvalidConfigurationError:
    """Return an error whose message shows the text with the place that is wrong marked below."""
    begin, end = span
    line_begin = max(text.rfind("\n", 0, begin), text.rfind("\r", 0, begin)) + 1
    line = re.split(r"[\r\n]", text[line_begin:], maxsplit=1)[0]
    column = begin - line_begin
    if len(line) > _LONGEST_LINE:
        cut = max(0, column - _SHOWN_BEFORE)
        before, after = "..." * (cut > 0), "..." * (len(line) > cut + _SHOWN_OF_LONG)
        line = f"{before}{line[cut : cut + _SHOWN_OF_LONG]}{after}"
        column += len(before) - cut
    margin = "".join(character if character == "\t" else " " for character in line[:column])
    marks = "^" * max(1, min(end - begin, len(line) - column))
    return InvalidConfigurationError(f"{message}\n  {line}\n  {margin}{marks}", "text")


def parse_one(text: str) -> LimitSpec:
    """Read a single limit; raises InvalidConfigurationError that points at the place."""
    parser = _Parser(text)
    spec = parser.limit()
    if parser.another_follows():
        parser.fail("text must be one limit here; got several")
    return spec


def parse_several(text: str) -> list[LimitSpec]:
    """Read one or several limits; raises InvalidConfigurationError that points at the place."""
    parser = _Parser(text)
    specs = [parser.limit()]
    while parser.another_follows():
        specs.append(parser.limit())
    return specs


def repeated_id(specs: Sequence[LimitSpec]) -> Span:
    """Return where an id stands that another limit had before."""
    seen = set()
    for spec in specs:
        id = spec.values.get("id")
        if id is not None and id in seen:
            return spec.spans["id"]
        seen.add(id)
    return specs[0].span


@dataclass(frozen=True, slots=True)
class _Number:
    """A number as it was written, and its possible meanings.

    One that is not ``whole`` serves only for an error message.
    """

    written: str
    span: Span
    meanings: list[Fraction]
    whole: bool


class _Parser:
    """Recursive descent over one text: ``_begin`` is where the next token begins, ``_end`` where the last one ended.

    Patterns are matched at ``_begin`` and never searched for, so that the time is in proportion to the text's length.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise InvalidConfigurationError(f"text must be a str; got {brief(text)}", "text")
        self._text = text
        self._end = 0
        self._begin = 0
        self.another_follows()

    def another_follows(self) -> bool:
        """Skip separators, and return whether anything follows them."""
        self._begin = _SEPARATORS.match(self._text, self._end).end()  # type: ignore[union-attr]
        return self._begin < len(self._text)

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Return what the pattern matches here, and skip it and the space behind it; "" where it does not match."""
        match = pattern.match(self._text, self._begin)
        if match is None:
            return ""
        self._end = match.end()
        self._begin = _SPACE.match(self._text, self._end).end()  # type: ignore[union-attr]
        return match[0]

    def _next(self) -> str:
        """Return what comes next, up to a space or a sign; "" at the end."""
        return _NEXT.match(self._text, self._begin)[0]  # type: ignore[index]

    def _span(self) -> Span:
        return self._begin, self._begin + len(self._next())

    def fail(self, message: str, span: Span | None = None) -> NoReturn:
        """Refuse the text, and point at a place in it; by default at what comes next."""
        raise error_at(self._text, message, span or self._span())

    def limit(self) -> LimitSpec:
        begin = self._begin
        tokens = self._number(_DECIMAL_COMMA) or self._number(_NUMBER)
        if tokens is None:
            self.fail("a limit begins with a number of tokens, as in 100/minute")
        self._take(_REQUESTS)
        if not self._take(_PER):
            self.fail("a period must follow the number of tokens, as in 100/minute")
        period, unit, period_span = self._period(tokens)
        if not tokens.whole:
            self._refuse("the number of tokens", tokens, [(meaning, Fraction(period)) for meaning in tokens.meanings])
        capacity = int(tokens.meanings[0])
        values: dict[str, Any] = {"capacity": capacity, "refill_tokens": capacity, "refill_period_nanos": period}
        spans = {"capacity": tokens.span, "refill_tokens": tokens.span, "refill_period_nanos": period_span}
        seen: dict[str, Span] = {}
        while self._option_follows():
            self._option(values, spans, seen)
        if "sliding" in seen:
            self._check_sliding(unit, seen)
        if unit in _TYPICAL_DAYS or "calendar" in seen or "tz" in seen:
            self._check_calendar(unit, seen)
            zone, id = values.get("tz", "UTC"), values.get("id")
            return LimitSpec({"capacity": capacity, "unit": unit, "tz": zone, "id": id}, spans, (begin, self._end))
        if "adaptive" in seen and "aligned" not in seen:
            self.fail("adaptive goes with aligned", seen["adaptive"])
        return LimitSpec(values, spans, (begin, self._end))

    def _check_sliding(self, unit: str | None, seen: dict[str, Span]) -> None:
        if len(seen) > 1:
            self.fail("sliding goes without other options", seen["sliding"])
        if unit in _TYPICAL_DAYS:
            self.fail(f"sliding does not go with a {unit}, which has no fixed length", seen["sliding"])

    def _check_calendar(self, unit: str | None, seen: dict[str, Span]) -> None:
        for option in _NOT_OF_A_CALENDAR:
            if option in seen:
                self.fail(f"{option} does not go with a period of the calendar", seen[option])
        if unit is None:
            option = "tz" if "tz" in seen else "calendar"
            self.fail(f"{option} goes with a day, a week, a month or a year", seen[option])

    def _number(self, pattern: re.Pattern[str]) -> _Number | None:
        written = self._take(pattern)
        if not written:
            return None
        span = (self._end - len(written), self._end)
        if len(written) > _MOST_DIGITS:
            self.fail(f"a number must have at most {_MOST_DIGITS} digits", span)
        if _COUNT.fullmatch(written):
            return _Number(written, span, [Fraction(int(written))], whole=True)
        meanings = []
        grouped = _GROUPED.fullmatch(written)
        if grouped:
            meanings.append(Fraction(int(written.replace(grouped[1], ""))))
        if _DECIMAL.fullmatch(written) and not (grouped and grouped[1] == ","):
            meanings.append(Fraction(written.replace(",", ".")))
        number = _Number(written, span, meanings, whole=False)
        if not any(meanings):
            self._refuse("a number", number, [])
        return number

    def _refuse(self, name: str, number: _Number, rates: Sequence[tuple[Fraction, Fraction]]) -> NoReturn:
        """Refuse a number that is not whole, and write the limits that may be meant: tokens and their nanoseconds."""
        hint = " or ".join(_print_rate(tokens, nanos) for tokens, nanos in rates if tokens and nanos)
        self.fail(
            f"{name} must be a whole number in digits; got {number.written!r}{hint and ': write '}{hint}", number.span
        )

    def _period(self, tokens: _Number) -> tuple[int, str | None, Span]:
        """Read a period; return its nanoseconds, its unit if it is one day, week, month or year, and its place."""
        begin = self._begin
        number = self._number(_NUMBER)
        counts = [Fraction(1)] if number is None else number.meanings
        span = self._span()
        word = self._take(_WORD)
        unit = _ALIASES.get(word.lower(), word.lower())
        if not word:
            hint = f": write {tokens.written}/{number.written} seconds, say" if number else f": use {_UNIT_NAMES}"
            self.fail(f"a unit of time is missing{hint}", span)
        if unit not in _UNITS and unit not in _TYPICAL_DAYS:
            self.fail(f"unknown unit of time {brief(word)}: use {_UNIT_NAMES}", span)
        length = _UNITS[unit] if unit in _UNITS else _TYPICAL_DAYS[unit] * _UNITS["day"]
        periods = [count * length for count in counts]
        if number is not None and not number.whole:
            rates = [(meaning, period) for meaning in tokens.meanings for period in periods]
            self._refuse("the length of a period", number, rates)
        if unit in _TYPICAL_DAYS and counts[0] != 1:
            meant = f": write {_print_rate(tokens.meanings[0], periods[0])}, say" if periods[0] else ""
            self.fail(f"a period of the calendar must be one {unit}{meant}", (begin, self._end))
        return int(periods[0]), unit if counts[0] == 1 and unit in _CALENDAR_UNITS else None, (begin, self._end)

    def _option_follows(self) -> bool:
        """Return whether the limit goes on: also on the next line, where an option stands there."""
        word = self._next().lower()
        if word in _OPTIONS:
            return True
        gap = self._text[self._end : self._begin]
        return not ("\n" in gap or "\r" in gap or word in ("", ";", ",", "|"))

    def _option(self, values: dict[str, Any], spans: dict[str, Span], seen: dict[str, Span]) -> None:
        begin, span = self._begin, self._span()
        option = self._next().lower()
        if option not in _OPTIONS:
            self._refuse_option(option)
        if option in seen:
            self.fail(f"{option} is given twice")
        seen[option] = span
        self._take(_WORD)
        if option == "burst":
            values["capacity"], spans["capacity"] = self._count("burst")
        elif option == "initial":
            values["initial_tokens"], spans["initial_tokens"] = self._count("initial")
        elif option == "id":
            spans["id"] = self._span()
            values["id"] = self._name()
        elif option == "sliding":
            spans["sliding"] = (begin, self._end)
        elif option == "adaptive":
            values["adaptive_initial_tokens"] = True
            spans["adaptive_initial_tokens"] = (begin, self._end)
        elif option == "tz":
            values["tz"] = zone = self._zone()
            spans["tz"] = (self._end - len(zone), self._end)
        elif option != "calendar":
            self._by_periods(option, begin, values, spans)

    def _by_periods(self, option: str, begin: int, values: dict[str, Any], spans: dict[str, Span]) -> None:
        """Take what says that tokens come at the end of each period."""
        values["refill_intervally"] = True
        spans["refill_intervally"] = (begin, self._end)
        if option == "aligned":
            spans["first_refill_millis"] = self._span()
            values["first_refill_millis"] = self._time()

    def _refuse_option(self, word: str) -> NoReturn:
        if word == "/":
            self.fail("a limit has one period")
        if word in ("and", "&", "+") or _NUMBER.match(word):
            self.fail("limits must be separated by a semicolon, a comma, a vertical bar or a new line")
        burst = re.fullmatch("burst=([0-9]{1,18})", word)
        hint = f": write burst {burst[1]}, or burst {int(burst[1]) + 1} for what nginx calls {word}" if burst else ""
        self.fail(f"an option must be {', '.join(_OPTIONS[:-1])} or {_OPTIONS[-1]}; got {brief(self._next())}{hint}")

    def _count(self, option: str) -> tuple[int, Span]:
        number = self._number(_NUMBER)
        if number is None:
            self.fail(f"a number of tokens must follow {option}, as in {option} 50")
        if not number.whole:
            meant = [str(meaning) for meaning in number.meanings if meaning.denominator == 1]
            hint = f": write {' or '.join(meant)}, or put a semicolon between two limits" if meant else ""
            self.fail(f"{option} must be a whole number in digits; got {number.written!r}{hint}", number.span)
        return int(number.meanings[0]), number.span

    def _name(self) -> str:
        span = self._span()
        if self._next() == '"':
            quoted = self._take(_QUOTED)
            if not quoted:
                self.fail("this quotation mark is not closed", (self._begin, len(self._text)))
            try:
                return str(json.loads(quoted))
            except ValueError:
                self.fail("a name in quotation marks must be a JSON string", (span[0], self._end))
        name = self._take(_NEXT)
        if not _PLAIN_NAME.fullmatch(name):
            self.fail('a name must follow id: letters, digits and "_.:-", or any text in quotation marks', span)
        return name

    def _zone(self) -> str:
        begin = self._begin
        zone = self._take(_ZONE)
        if not zone:
            self.fail("a time zone must follow tz, such as Europe/Berlin", (begin, begin))
        return zone

    def _time(self) -> int:
        span = self._span()
        time = self._take(_TIME)
        if time.startswith("@") and time[1:].isdecimal() and len(time) <= _MOST_DIGITS:
            return int(time[1:])
        try:
            moment = datetime.fromisoformat(time)
        except ValueError:
            self.fail("a time must follow aligned, such as 2026-01-01T00:00Z", span)
        if moment.tzinfo is None:
            self.fail("this time needs an offset, as in 2026-01-01T00:00Z", span)
        return (moment - _EPOCH) // timedelta(milliseconds=1)


def print_one(bandwidth: Bandwidth) -> str:
    """Return the text form of a bandwidth, in the shortest words that :func:`parse_one` reads as an equal one."""
    words = [f"{bandwidth.refill_tokens}/{_print_period(bandwidth.refill_period_nanos)}"]
    if bandwidth.capacity != bandwidth.refill_tokens:
        words.append(f"burst {bandwidth.capacity}")
    if bandwidth.initial_tokens != bandwidth.capacity:
        words.append(f"initial {bandwidth.initial_tokens}")
    if bandwidth.first_refill_millis is not None:
        words.append(f"aligned {_print_time(bandwidth.first_refill_millis)}")
    elif bandwidth.refill_intervally:
        words.append("intervally")
    if bandwidth.adaptive_initial_tokens:
        words.append("adaptive")
    return " ".join(words + _print_id(bandwidth))


def print_calendar(bandwidth: CalendarBandwidth) -> str:
    """Return the text form of a quota for each period of the calendar."""
    words = [f"{bandwidth.capacity}/{bandwidth.unit}"]
    if bandwidth.tz != "UTC":
        words.append(f"tz {bandwidth.tz}")
    elif bandwidth.unit not in _TYPICAL_DAYS:
        words.append("calendar")
    return " ".join(words + _print_id(bandwidth))


def _print_id(bandwidth: Bandwidth) -> list[str]:
    if bandwidth.id is None:
        return []
    return [f"id {bandwidth.id if _PLAIN_NAME.fullmatch(bandwidth.id) else json.dumps(bandwidth.id)}"]


def print_sliding(capacity: int, nanos: int) -> str:
    """Return the text form of a sliding window."""
    return f"{capacity}/{_print_period(nanos)} sliding"


def _print_rate(tokens: Fraction, nanos: Fraction) -> str:
    """Return the text of a rate, multiplied so that both of its numbers are whole."""
    factor = lcm(tokens.denominator, nanos.denominator)
    return f"{tokens * factor}/{_print_period(int(nanos * factor))}"


def _print_period(nanos: int) -> str:
    for unit, length in _UNITS.items():
        if nanos >= length and nanos % length == 0:
            count = nanos // length
            long_form = len(unit) > 2
            return unit if count == 1 else f"{count} {unit}{'s' if long_form else ''}"
    return f"{nanos} ns"


def _print_time(millis: int) -> str:
    try:
        time = _EPOCH + timedelta(milliseconds=millis)
    except OverflowError:
        return f"@{millis}"
    return time.isoformat(timespec="milliseconds" if millis % 1000 else "seconds").replace("+00:00", "Z")
