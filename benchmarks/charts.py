"""Charts as SVG, on a background of their own, so that they can be read on a dark page, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from benchmarks.model import Kind

WIDTH: Final = 860
_LEFT: Final = 255  # of the bars
_RIGHT: Final = 110  # for the values
_ROW: Final = 20
_BEGIN: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    ' font-family="sans-serif" font-size="12" role="img">'
)
_HEAD: Final = 44

COLOURS: Final = {
    Kind.OURS: "#c2334d",
    Kind.PEER: "#2f7fb5",
    Kind.TEXTBOOK: "#d99a2b",
    Kind.FLOOR: "#8a94a6",
    Kind.PART: "#d98ba0",
}
LEGEND: Final = {
    Kind.OURS: "this library",
    Kind.PEER: "published library",
    Kind.TEXTBOOK: "textbook script",
    Kind.FLOOR: "floor",
    Kind.PART: "some of this library",
}
_LINES: Final = (
    "#c2334d",
    "#2f7fb5",
    "#d99a2b",
    "#3a8f5c",
    "#7d5ba6",
    "#8a94a6",
    "#6b4423",
    "#17a2a2",
    "#b5479b",
    "#9aa520",
    "#34495e",
    "#e07b54",
    "#5dade2",
)


@dataclass(frozen=True)
class Bar:
    """A median, with the least and the most of its rounds."""

    label: str
    kind: Kind
    value: float
    low: float
    high: float


def bars(title: str, unit: str, groups: Mapping[str, Sequence[Bar]], form: str = "{:,.0f}") -> str:
    """Horizontal bars in groups, each group on a scale of its own."""
    body: list[str] = []
    y = _HEAD + 22.0
    for name, group in groups.items():
        if not group:
            continue
        y += 22
        body.append(_text(12, y - 6, name, weight="bold"))
        most = max((bar.high for bar in group), default=1.0) or 1.0
        scale = (WIDTH - _LEFT - _RIGHT) / most
        for bar in group:
            middle = y + _ROW / 2
            length = max(1.0, bar.value * scale)
            body.append(_text(_LEFT - 8, middle + 4, bar.label, anchor="end"))
            body.append(_rect(_LEFT, y + 3, length, _ROW - 6, COLOURS[bar.kind]))
            if bar.high > bar.low:
                body.append(_line(_LEFT + bar.low * scale, _LEFT + bar.high * scale, middle, "#1f2933", 1.5))
            body.append(_text(_LEFT + max(length, bar.high * scale) + 6, middle + 4, form.format(bar.value)))
            y += _ROW
        y += 8
    kinds = [kind for kind in Kind if any(bar.kind is kind for group in groups.values() for bar in group)]
    head = [_text(12, 24, f"{title} ({unit})", size=16, weight="bold")]
    x = 12.0
    for kind in kinds:
        head += [_rect(x, 38, 12, 12, COLOURS[kind]), _text(x + 17, 48, LEGEND[kind])]
        x += 30 + 7 * len(LEGEND[kind])
    return _svg(y + 12, title, head + body)


def lines(title: str, unit: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """Lines over a logarithmic axis, from zero upwards."""
    points = [point for line in series.values() for point in line]
    if not points:
        return _svg(60, title, [_text(12, 24, f"{title} ({unit})", size=16, weight="bold")])
    places_of_names = _legend(list(series))
    left, top, width, height = 80.0, 84.0 + max(down for _, down in places_of_names), WIDTH - 120.0, 260.0
    first, last = (math.log10(choose(x for x, _ in points)) for choose in (min, max))
    most = _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - first) / (last - first) if last > first else 0.5
        return left + across * width, top + height - y / most * height

    body = [_text(12, 24, f"{title} ({unit})", size=16, weight="bold")]
    for step in range(5):
        value = most * step / 4
        y = top + height - height * step / 4
        body += [
            _line(left, left + width, y, "#d5dae1", 1),
            _text(left - 8, y + 4, f"{value:,.0f}" if most >= 10 else f"{value:.3g}", anchor="end"),
        ]
    for x in sorted({x for x, _ in points}):
        across, _ = place(x, 0)
        body += [_text(across, top + height + 18, f"{x:,.0f}", anchor="middle")]
    body.append(_text(left + width / 2, top + height + 38, x_label, anchor="middle"))
    for number, ((name, line), (x, down)) in enumerate(zip(series.items(), places_of_names, strict=True)):
        colour = _LINES[number % len(_LINES)]
        places = [place(*point) for point in line]
        path = " ".join(f"{across:.1f},{below:.1f}" for across, below in places)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        body += [f'<circle cx="{across:.1f}" cy="{below:.1f}" r="3.5" fill="{colour}"/>' for across, below in places]
        body += [_rect(x, 38 + down, 12, 12, colour), _text(x + 17, 48 + down, name)]
    return _svg(top + height + 50, title, body)


def _legend(names: Sequence[str]) -> list[tuple[float, float]]:
    """Return where each name begins, and how far below the first row, in as many rows as it takes."""
    places: list[tuple[float, float]] = []
    x, down = 12.0, 0.0
    for name in names:
        width = 30 + 7 * len(name)
        if x > 12 and x + width > WIDTH:
            x, down = 12.0, down + 20
        places.append((x, down))
        x += width
    return places


def _round_up(value: float) -> float:
    """To 1, 2, 4, or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((power * step for step in (1.0, 2.0, 4.0, 8.0) if value <= power * step), power * 10.0)


def _svg(height: float, title: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            _BEGIN.format(width=WIDTH, height=height),
            f"<title>{escape(title)}</title>",
            _rect(0, 0, WIDTH, height, "#ffffff"),
            *body,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="#1f2933" text-anchor="{anchor}" font-size="{size}"'
        f' font-weight="{weight}">{escape(text)}</text>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _line(x1: float, x2: float, y: float, colour: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="{width}"/>'
