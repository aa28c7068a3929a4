"""What an answer over HTTP says about when to come again. Everything here computes; nothing raises for what is sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fractions import Fraction
from typing import Any, Final

from ratelimit.core.duration import to_nanos
from ratelimit.integrations.extras import needing

with needing("outbound"):
    import http_sf

TOO_MANY_REQUESTS: Final = 429
SERVICE_UNAVAILABLE: Final = 503

_SMALLEST_EPOCH_SECONDS: Final = 10**9  # 2001; as a delay it would be thirty years
_SMALLEST_EPOCH_MILLIS: Final = 10**11  # 1973; as seconds since the epoch it would be the year 5138
_LONGEST_NUMBER: Final = 30  # characters; what is longer is nobody's time

_TRIPLES: Final = ("x-ratelimit", "x-rate-limit", "ratelimit")


def fields_of(headers: Mapping[str, str]) -> dict[str, str]:
    """The fields of an answer by their names in lower case; those that occur several times are one list."""
    fields: dict[str, str] = {}
    for name, value in headers.items():
        known = fields.get(name.lower())
        fields[name.lower()] = value if known is None else f"{known}, {value}"
    return fields


def nanos_to_hold(status: int, fields: Mapping[str, str], now: int) -> int | None:
    """How long nobody is to come, in nanoseconds; 0: come, None: the answer does not say.

    ``Retry-After`` of an answer that refuses goes first. The other fields count for every status, but not where the
    answer comes from a cache, as they tell of another time then.

    :param now: nanoseconds since the epoch, for an answer without a ``Date``.
    """
    present = _date(fields.get("date", ""))
    if present is None:
        present = Fraction(now, 10**9)
    if status in (TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE):
        wait = _retry_after(fields.get("retry-after", "").strip(), present)
        if wait is not None:
            return _nanos(wait)
    if fields.get("age", "0").strip() != "0":
        return None
    waits: list[Fraction | int] = [*_of_rate_limit(fields.get("ratelimit", "")), *_of_triples(fields.get, present)]
    return _nanos(max(waits)) if waits else None


def _nanos(wait: Fraction | int) -> int:
    return max(0, to_nanos(Fraction(wait)))


def _retry_after(text: str, present: Fraction) -> Fraction | int | None:
    if re.fullmatch("[0-9]+", text):
        return int(text[:_LONGEST_NUMBER])  # cut off, it is still longer than anybody is held
    at = _date(text)
    return None if at is None else at - present


def _date(text: str) -> Fraction | None:
    """Seconds since the epoch; None for what is no date of HTTP."""
    try:
        date = parsedate_to_datetime(text)
        return _seconds_since_epoch(date if date.tzinfo else date.replace(tzinfo=UTC))
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _seconds_since_epoch(date: datetime) -> Fraction:
    return Fraction((date - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())


def _of_rate_limit(text: str) -> Iterator[int]:
    """The effective windows of those service limits of which nothing is left."""
    if not text:
        return
    try:
        items: Any = http_sf.parse(text.encode(), tltype="list")
    except ValueError:
        return
    for name, parameters in items:
        left, window = parameters.get("r"), parameters.get("t")
        if isinstance(name, str) and type(left) is int and left == 0 and type(window) is int and window >= 0:
            yield window


def _of_triples(field: Callable[[str], str | None], present: Fraction) -> Iterator[Fraction]:
    """The resets of those older triples of which nothing is left."""
    for prefix in _TRIPLES:
        left, reset = (_number(field(f"{prefix}-{name}") or "") for name in ("remaining", "reset"))
        if left == 0 and reset is not None:
            yield _delay(reset, present)


def _number(text: str) -> Fraction | None:
    text = text.strip()
    return Fraction(text) if len(text) <= _LONGEST_NUMBER and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


def _delay(reset: Fraction, present: Fraction) -> Fraction:
    """Some send seconds from now, some seconds or milliseconds since the epoch; their sizes tell them apart."""
    if reset >= _SMALLEST_EPOCH_MILLIS:
        return reset / 1000 - present
    return reset - present if reset >= _SMALLEST_EPOCH_SECONDS else reset
