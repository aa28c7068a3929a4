"""The text form of limits: ``100/minute``, ``10/second burst 50; 1000/hour id daily``.

::

    limits   = limit *( ";" limit )
    limit    = count ( "/" | "per" ) [ count ] unit *option      the period is count units, one without a count
    option   = "burst" count            the size of the bucket; without it, the tokens of one period
             | "initial" count          what a new bucket holds
             | "intervally"             tokens come at the end of each period
             | "aligned" time           the same, the periods counted from this time
             | "adaptive"               with aligned: a new bucket holds the share of what is left of the period
             | "id" name
    count    = digits, with "_" between them if you like
    unit     = ns | us | ms | s | min | h | d | w, or their long forms, singular or plural
    time     = ISO 8601 with an offset, to the millisecond | "@" milliseconds since the epoch
    name     = letters, digits and "_.:-" | a JSON string

Words may be written in either case, options come in any order and once each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from ratelimit.errors import InvalidConfigurationError, brief

if TYPE_CHECKING:
    from ratelimit.core.bandwidth import Bandwidth

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
    {"w": "week", "weeks": "week", "d": "day", "days": "day", "h": "hour", "hr": "hour", "hours": "hour"}
    | {"min": "minute", "minutes": "minute", "s": "second", "sec": "second", "seconds": "second"}
    | {"millisecond": "ms", "milliseconds": "ms", "microsecond": "us", "microseconds": "us", "µs": "us"}
    | {"nanosecond": "ns", "nanoseconds": "ns"}
)
_OPTIONS = ("burst", "initial", "intervally", "aligned", "adaptive", "id")

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<count>[0-9]+(?:_[0-9]+)*)(?=[\s/;]|$)
      | (?P<name>"(?:[^"\\]|\\.)*")
      | (?P<sign>[/;])
      | (?P<word>[^\s/;"]+)
    )""",
    re.VERBOSE,
)
_SPACE = re.compile(r"\s*")
_COUNTED_UNIT = re.compile(r"([0-9]+(?:_[0-9]+)*)([^\W\d_]+)$")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.:-]+")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_DIGITS = 40
_LONGEST_LINE = 200  # that an error shows whole
_SHOWN_BEFORE, _SHOWN_OF_LONG = 40, 120  # of a longer one


@dataclass(frozen=True, slots=True)
class LimitSpec:
    """A limit as it was read: values for the fields of a bandwidth, and where in the text each of them stands."""

    values: dict[str, Any]
    spans: dict[str, Span]
    span: Span


def error_at(text: str, message: str, span: Span) -> InvalidConfigurationError:
    """An error whose message shows the text with the place that is wrong marked below."""
    begin, end = span
    line_begin = text.rfind("\n", 0, begin) + 1
    line = text[line_begin:].split("\n", 1)[0]
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
    if parser.sign == ";":
        parser.fail("one limit is wanted here, not several")
    return spec


def parse_several(text: str) -> list[LimitSpec]:
    """Read limits separated by semicolons; raises InvalidConfigurationError that points at the place."""
    parser = _Parser(text)
    specs = [parser.limit()]
    while parser.sign == ";":
        parser.advance()
        specs.append(parser.limit())
    return specs


def repeated_id(specs: Sequence[LimitSpec]) -> Span:
    """Where an id stands that another limit had before."""
    seen = set()
    for spec in specs:
        id = spec.values.get("id")
        if id is not None and id in seen:
            return spec.spans["id"]
        seen.add(id)
    return specs[0].span


class _Parser:
    """Recursive descent over one text; ``kind`` and ``token`` are what comes next, at ``span``."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise InvalidConfigurationError(f"the text of a limit must be a str, not {brief(text)}", "text")
        self.text = text
        self._end = 0
        self.advance()

    def advance(self) -> None:
        begin = _SPACE.match(self.text, self._end).end()  # type: ignore[union-attr]
        match = _TOKEN.match(self.text, self._end)
        if match is None or match.lastgroup is None:
            self.kind, self.token, self._end = "end", "", begin
            if begin < len(self.text):
                self.span = (begin, len(self.text))
                self.fail("this quotation mark is not closed")
        else:
            self.kind, self.token, self._end = match.lastgroup, match[match.lastgroup], match.end()
        self.span = (begin, self._end)

    @property
    def sign(self) -> str:
        return self.token if self.kind == "sign" else ""

    @property
    def word(self) -> str:
        return self.token.lower() if self.kind == "word" else ""

    def fail(self, message: str, span: Span | None = None) -> NoReturn:
        raise error_at(self.text, message, span or self.span)

    def limit(self) -> LimitSpec:
        begin = self.span[0]
        tokens, tokens_span = self._count("a limit begins with a number of tokens, as in 100/minute")
        if self.sign != "/" and self.word != "per":
            self.fail("after the number of tokens a period is wanted, as in 100/minute")
        self.advance()
        period, period_span = self._period()
        values: dict[str, Any] = {"capacity": tokens, "refill_tokens": tokens, "refill_period_nanos": period}
        spans = {"capacity": tokens_span, "refill_tokens": tokens_span, "refill_period_nanos": period_span}
        seen: set[str] = set()
        while self.kind not in ("end", "sign"):
            self._option(values, spans, seen)
        if self.sign == "/":
            self.fail("a limit has one period")
        if "adaptive" in seen and "aligned" not in seen:
            self.fail("adaptive goes with aligned", spans["adaptive_initial_tokens"])
        return LimitSpec(values, spans, (begin, max(span[1] for span in spans.values())))

    def _count(self, wanted: str) -> tuple[int, Span]:
        if self.kind != "count":
            self.fail(wanted)
        count, span = self._number(self.token), self.span
        self.advance()
        return count, span

    def _number(self, digits: str) -> int:
        if len(digits) > _MOST_DIGITS:  # Python itself refuses some thousands of them, in words of its own
            self.fail("this number is too large")
        return int(digits)

    def _period(self) -> tuple[int, Span]:
        begin = self.span[0]
        count = 1
        if self.kind == "count":
            count, _ = self._count("")
        elif match := _COUNTED_UNIT.match(self.token):
            count = self._number(match[1])  # 5min, without a space
            self.token = match[2]
            self.span = (self.span[1] - len(match[2]), self.span[1])
        unit = _ALIASES.get(self.word, self.word)
        if unit not in _UNITS:
            wanted = "ns, us, ms, second, minute, hour, day or week"
            self.fail(
                f"unknown unit of time {brief(self.token)}: use {wanted}" if self.token else f"a unit of time: {wanted}"
            )
        span = (begin, self.span[1])
        self.advance()
        return count * _UNITS[unit], span

    def _option(self, values: dict[str, Any], spans: dict[str, Span], seen: set[str]) -> None:
        option, begin = self.word, self.span[0]
        if option not in _OPTIONS:
            self.fail(f"{brief(self.token)} is no option: use burst, initial, intervally, aligned, adaptive or id")
        if option in seen:
            self.fail(f"{option} is given twice")
        seen.add(option)
        self.advance()
        if option == "burst":
            values["capacity"], spans["capacity"] = self._count("burst wants the size of the bucket, as in burst 50")
        elif option == "initial":
            values["initial_tokens"], spans["initial_tokens"] = self._count("initial wants a number of tokens")
        elif option == "id":
            spans["id"] = self.span
            values["id"] = self._name()
        elif option == "adaptive":
            values["adaptive_initial_tokens"] = True
            spans["adaptive_initial_tokens"] = (begin, begin + len(option))
        else:
            values["refill_intervally"] = True
            spans["refill_intervally"] = (begin, begin + len(option))
            if option == "aligned":
                spans["first_refill_millis"] = self.span
                values["first_refill_millis"] = self._time()

    def _name(self) -> str:
        token, kind = self.token, self.kind
        if kind == "name":
            try:
                name = json.loads(token)
            except ValueError:
                self.fail("a name in quotation marks is written like a JSON string")
        elif kind in ("word", "count") and _PLAIN_NAME.fullmatch(token):
            name = token
        else:
            self.fail('id wants a name of letters, digits and "_.:-", or any text in quotation marks')
        self.advance()
        return str(name)

    def _time(self) -> int:
        token = self.token
        if token.startswith("@") and token[1:].isdecimal() and len(token) <= _MOST_DIGITS:
            millis = int(token[1:])
        else:
            try:
                time = datetime.fromisoformat(token)
            except ValueError:
                self.fail("aligned wants a time such as 2026-01-01T00:00Z")
            if time.tzinfo is None:
                self.fail("this time needs an offset, as in 2026-01-01T00:00Z")
            millis = (time - _EPOCH) // timedelta(milliseconds=1)
        self.advance()
        return millis


def print_one(bandwidth: Bandwidth) -> str:
    """The text form of a bandwidth, in the shortest words that :func:`parse_one` reads the same."""
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
    if bandwidth.id is not None:
        plain = _PLAIN_NAME.fullmatch(bandwidth.id)
        words.append(f"id {bandwidth.id if plain else json.dumps(bandwidth.id)}")
    return " ".join(words)


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
