"""What is made of the samples and the books: reasons why a run has failed, and a chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

Series = Sequence[tuple[float, float]]
"""Seconds since the beginning, and values."""

_WARM_UP: Final = 0.25  # of a run
_GROWTH: Final = 1.10
_COLOURS: Final = ("#c2334d", "#2f7fb5", "#d99a2b", "#3a8f5c", "#7d5ba6")
_WIDTH: Final = 860
_PANEL: Final = 150


def trend(series: Series) -> tuple[float, float] | None:
    """Return the medians of the first and the last third after a warm-up; None where there are too few samples."""
    end = series[-1][0] if series else 0
    warm = [(at, value) for at, value in series if at >= end * _WARM_UP]
    third = len(warm) // 3
    if third < 3:
        return None
    first, last = (statistics.median(value for _, value in part) for part in (warm[:third], warm[-third:]))
    return first, last


def growth(name: str, series: Series, slack: float) -> list[str]:
    """Whether something grows, by its trend.

    :param slack: what the last may be above the first, besides a tenth of it.
    """
    seen = trend(series)
    if seen is None:
        return [f"{name}: only {len(series)} samples"]
    first, last = seen
    return [f"{name} grows from {first:.1f} to {last:.1f}"] if last > first * _GROWTH + slack else []


def ledger(name: str, acknowledged: int, stored: int, in_doubt: int) -> list[str]:
    """Whether every token that somebody was told to have is stored, and no other, but for those in doubt."""
    if acknowledged <= stored <= acknowledged + in_doubt:
        return []
    return [f"{name}: {acknowledged} tokens acknowledged, {in_doubt} in doubt, {stored} stored"]


def panels(groups: Mapping[str, Mapping[str, Series]], faults: Series) -> str:
    """Charts over time below one another, as SVG; times of faults are shaded."""
    end = max((at for lines in groups.values() for series in lines.values() for at, _ in series), default=1) or 1
    height = 20 + len(groups) * (_PANEL + 50)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-size="12" role="img">',
        f'<title>soak</title><rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    left, width = 70.0, _WIDTH - 90.0
    for row, (title, lines) in enumerate(groups.items()):
        top = 44.0 + row * (_PANEL + 50)
        most = max((value for series in lines.values() for _, value in series), default=0) or 1
        for at, lasted in faults:
            x, wide = left + at / end * width, max(1.0, lasted / end * width)
            body.append(f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{_PANEL}" fill="#f3e3e6"/>')
        for share in (0.0, 0.5, 1.0):
            y = top + _PANEL * (1 - share)
            body.append(f'<path d="M{left} {y}h{width}" stroke="#d5dae1"/>')
            body.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{most * share:,.0f}</text>')
        body.append(f'<text x="12" y="{top - 14}">{escape(title)}</text>')
        for number, (name, series) in enumerate(lines.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            path = " ".join(f"{left + at / end * width:.1f},{top + _PANEL * (1 - y / most):.1f}" for at, y in series)
            body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            body.append(f'<text x="{300 + 140 * number}" y="{top - 14}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*body, f'<text x="{left}" y="{height - 4}">{end:,.0f} seconds</text>', "</svg>\n"])
