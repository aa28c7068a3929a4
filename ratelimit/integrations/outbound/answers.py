"""What an answer over HTTP says about when to come again. Nothing here raises an error, whatever a server sends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fractions import Fraction
from typing import Any, Final

from ratelimit.core.numbers import to_nanos
from ratelimit.integrations.extras import needing

with needing("outbound"):
    import http_sf

TOO_MANY_REQUESTS: Final = 429
# GitHub refuses with 403 as well, Anthropic with 529.
_REFUSALS: Final = (403, TOO_MANY_REQUESTS, 503, 529)

_RETRY_AFTER: Final = ("retry-after-ms", "x-ms-retry-after-ms", "retry-after", "x-retry-after")
_TRIPLES: Final = ("x-ratelimit", "x-rate-limit", "ratelimit")
_PARTS: Final = ("x-ratelimit-remaining-", "anthropic-ratelimit-")

_SMALLEST_EPOCH_SECONDS: Final = 10**9  # 2001; as a delay it would be thirty years
_SMALLEST_EPOCH_MILLIS: Final = 10**11  # 1973; as seconds since the epoch it would be the year 5138
_LONGEST_NUMBER: Final = 30  # characters; longer numbers are not times

_NUMBER: Final = r"[0-9]+(?:\.[0-9]+)?"
_UNITS: Final = {
    "d": Fraction(86_400),
    "h": Fraction(3_600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 10**3),
    "us": Fraction(1, 10**6),
}
_DURATION: Final = rf"({_NUMBER})(ms|us|[dhms])"


def fields_of(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of an answer by their names in lower case; fields of one name are joined into one."""
    fields: dict[str, str] = {}
    for name, value in headers.items():
        known = fields.get(name.lower())
        fields[name.lower()] = value if known is None else f"{known}, {value}"
    return fields


def nanos_to_hold(status: int, fields: Mapping[str, str], now: int) -> int | None:
    """Return for how many nanoseconds to send nothing; 0: go on, None: the answer does not say.

    ``Retry-After`` of an answer that refuses goes first. The other fields are ignored in an answer from a
    cache, because they were true when it was stored.

    :param now: nanoseconds since the epoch, for an answer without a ``Date``.
    """
    present = _date(fields.get("date", ""))
    if present is None:
        present = Fraction(now, 10**9)
    refuses = status in _REFUSALS
    if refuses:
        for name in _RETRY_AFTER:
            wait = _retry_after(name, fields.get(name, "").strip(), present)
            if wait is not None:
                return _nanos(wait)
    if fields.get("age", "0").strip() != "0":
        return None
    waits = [*_of_rate_limit(fields.get("ratelimit", "")), *_of_triples(fields, present, status)]
    if refuses:
        waits += _of_parts(fields, present)
    return _nanos(max(waits)) if waits else None


def _nanos(wait: Fraction | int) -> int:
    return max(0, to_nanos(Fraction(wait)))


def _retry_after(name: str, text: str, present: Fraction) -> Fraction | None:
    """Return the wait of a field; the longest of several, since a proxy may have added one."""
    if name == "x-retry-after":
        return _reset(text, present)
    waits = [_seconds(each.strip()) for each in text.split(",")]
    longest = max((wait for wait in waits if wait is not None), default=None)
    if longest is None or None in waits:
        at = _date(text)
        return None if at is None else at - present
    return longest / 1000 if name.endswith("-ms") else longest


def _seconds(text: str) -> Fraction | None:
    """Read a number of seconds, or a duration as Go prints it: ``6m0s``, ``20ms``; None for anything else."""
    if re.fullmatch("[0-9]+", text):
        # A number that is cut off is still longer than any hold.
        return Fraction(int(text[:_LONGEST_NUMBER]))
    if len(text) > _LONGEST_NUMBER:
        return None
    if re.fullmatch(_NUMBER, text):
        return Fraction(text)
    if re.fullmatch(f"(?:{_DURATION})+", text):
        return sum((Fraction(number) * _UNITS[unit] for number, unit in re.findall(_DURATION, text)), Fraction(0))
    return None


def _date(text: str) -> Fraction | None:
    """Return seconds since the epoch; None for what is neither a date of HTTP nor one of ISO 8601."""
    try:
        is_iso = re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}T", text)
        date = datetime.fromisoformat(text) if is_iso else parsedate_to_datetime(text)
        return _seconds_since_epoch(date if date.tzinfo else date.replace(tzinfo=UTC))
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _seconds_since_epoch(date: datetime) -> Fraction:
    return Fraction((date - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())


def _of_rate_limit(text: str) -> Iterator[Fraction]:
    """Yield the effective windows of those service limits of which nothing is left."""
    try:
        items: Any = http_sf.parse(text.encode(), tltype="list") if text else ()
    except ValueError:
        yield from _of_older_rate_limit(text)
        return
    for name, parameters in items:
        left, window = parameters.get("r"), parameters.get("t")
        if isinstance(name, str) and _is_over(left, window):
            yield Fraction(window)


def _of_older_rate_limit(text: str) -> Iterator[Fraction]:
    """Yield what the seventh draft says: ``limit=100, remaining=0, reset=50``."""
    try:
        members: Any = http_sf.parse(text.encode(), tltype="dictionary")
    except ValueError:
        return
    left, window = (members.get(name, (None,))[0] for name in ("remaining", "reset"))
    if _is_over(left, window):
        yield Fraction(window)


def _is_over(left: object, window: object) -> bool:
    return type(left) is int and left == 0 and type(window) is int and window >= 0


def _of_triples(fields: Mapping[str, str], present: Fraction, status: int) -> Iterator[Fraction]:
    """Yield the resets of those older triples of which nothing is left."""
    for prefix in _TRIPLES:
        left = fields.get(f"{prefix}-remaining")
        if left is None and status != TOO_MANY_REQUESTS:
            continue
        count, _, parameters = ("0" if left is None else left).partition(";")
        if _seconds(count.strip()) != 0:
            continue
        resets = [fields[name] for name in (f"{prefix}-reset-after", f"{prefix}-reset") if name in fields]
        reset = _reset(resets[0], present) if resets else None
        if reset is not None:
            yield reset
        window = re.fullmatch(r"\s*w=([0-9]{1,15})\s*", parameters)
        if window and not resets and status in _REFUSALS:
            # Docker Hub gives the length of the window only: the wait cannot take longer than that.
            yield Fraction(window[1])


def _of_parts(fields: Mapping[str, str], present: Fraction) -> Iterator[Fraction]:
    """Yield the resets of those parts of a limit (requests, tokens) of which nothing is left.

    A reset says when the part is whole again. An answer that does not refuse must not make callers wait that long.
    """
    for name, left in fields.items():
        if name.startswith(_PARTS) and "remaining" in name and _seconds(left.strip()) == 0:
            reset = _reset(fields.get(name.replace("remaining", "reset"), ""), present)
            if reset is not None:
                yield reset


def _reset(text: str, present: Fraction) -> Fraction | None:
    """Return the seconds until a reset; None where the text is not a time.

    Servers send seconds from now, a duration, seconds or milliseconds since the epoch, or a date. Numbers are told
    apart by their size.
    """
    text = text.strip()
    number = _seconds(text) if len(text) <= _LONGEST_NUMBER else None
    if number is None:
        at = _date(text)
        return None if at is None else at - present
    if number >= _SMALLEST_EPOCH_MILLIS:
        return number / 1000 - present
    return number - present if number >= _SMALLEST_EPOCH_SECONDS else number
