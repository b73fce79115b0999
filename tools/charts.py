"""Charts as SVG, which every browser shows and no package is needed for; colours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WIDTH, HEIGHT = 720, 300  # of one chart [px]
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 30, 44  # what surrounds the plot [px]
# Colours that also differ in black and white, and dashes for those who see no colour at all.
STYLES = (("#1b4f9c", ""), ("#d1495b", "7 3"), ("#2e7d32", "2 3"), ("#8a6d00", "9 3 2 3"))
# From dark (0) to bright (1), in steps that look alike: what pictures of spectrograms use.
HEAT = ((4, 5, 20), (70, 22, 95), (165, 45, 95), (240, 110, 50), (252, 235, 160))


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Attributes
    ----------
    curves : dict of list of (float, float)
        Points of each named curve. What is not finite is left out, here and below.
    levels : dict of float
        Named horizontal lines.
    marks : dict of float
        Named vertical lines.
    """

    title: str
    x_label: str
    curves: dict[str, list[tuple[float, float]]]
    levels: dict[str, float] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    log_x: bool = False


@dataclass(frozen=True)
class Strips:
    """A chart of many values side by side, such as the scores of songs, one strip a system.

    Attributes
    ----------
    strips : dict of list of float
        Values of each named strip. What is not finite is left out.
    """

    title: str
    strips: dict[str, list[float]]


def svg(charts: list[Chart] | list[Strips]) -> str:
    """Draw charts, one below the other.

    Returns
    -------
    str
        A whole SVG document.
    """
    height = HEIGHT * len(charts)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    bodies = [
        f'<g transform="translate(0 {i * HEIGHT})">{drawn}</g>'
        for i, drawn in enumerate(
            _draw_strips(chart) if isinstance(chart, Strips) else _draw(chart) for chart in charts
        )
    ]
    return "\n".join([head, *bodies, "</svg>\n"])


def colours(values: np.ndarray) -> np.ndarray:
    """Colour a picture of levels.

    Parameters
    ----------
    values : np.ndarray, any shape, in [0, 1]
        0 is dark, 1 bright.

    Returns
    -------
    np.ndarray, shape=(..., 3), uint8
        Red, green and blue.
    """
    import numpy as np  # here, so that a --help that knows of charts need not wait for it

    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, stops, channel) for channel in zip(*HEAT, strict=True)]
    return np.stack(channels, -1).astype(np.uint8)


def _draw(chart: Chart) -> str:
    """Draw one chart with its axes and, to the right, the names of its lines."""
    curves = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in chart.curves.items()
    }
    levels = {name: y for name, y in chart.levels.items() if math.isfinite(y)}
    marks = {name: x for name, x in chart.marks.items() if math.isfinite(x)}
    points = [point for curve in curves.values() for point in curve]
    xs = [x for x, _ in points] + list(marks.values())
    ys = [y for _, y in points] + list(levels.values())
    across = _Axis(xs, LEFT, WIDTH - RIGHT, chart.log_x)
    up = _Axis(ys, HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, TOP - 12, chart.title, "start", 'font-weight="bold"')]
    for x in across.ticks():
        parts.append(_line(across(x), HEIGHT - BOTTOM, across(x), TOP, "#ddd"))
        parts.append(_text(across(x), HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    for y in up.ticks():
        parts.append(_line(LEFT, up(y), WIDTH - RIGHT, up(y), "#ddd"))
        parts.append(_text(LEFT - 6, up(y) + 4, f"{y:g}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x_label, "middle"))
    for name, y in levels.items():
        parts.append(_line(LEFT, up(y), WIDTH - RIGHT, up(y), "#555", "1 3"))
        parts.append(_text(WIDTH - RIGHT + 6, up(y) + 4, name, "start"))
    for name, x in marks.items():
        parts.append(_line(across(x), HEIGHT - BOTTOM, across(x), TOP, "#555", "1 3"))
        parts.append(_text(across(x) + 4, TOP + 10, name, "start"))
    for i, (name, curve) in enumerate(curves.items()):
        colour, dash = STYLES[i % len(STYLES)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        if len(curve) == 1:  # a line of one point is invisible
            parts.append(f'<circle cx="{path.split(",")[0]}" cy="{path.split(",")[1]}" r="3"/>')
        y = TOP - 12 + 14 * i
        parts.append(_line(WIDTH - RIGHT + 6, y - 4, WIDTH - RIGHT + 30, y - 4, colour, dash, 2))
        parts.append(_text(WIDTH - RIGHT + 36, y, name, "start"))
    return "".join(parts)


def _draw_strips(chart: Strips) -> str:
    """Draw a circle for every value, side by side where they would meet, and a bar at the median.

    Nothing depends on colour: circles are hollow, medians black and with their number.
    """
    strips = {n: sorted(v for v in vs if math.isfinite(v)) for n, vs in chart.strips.items()}
    up = _Axis([value for values in strips.values() for value in values], HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, TOP - 12, chart.title, "start", 'font-weight="bold"')]
    for y in up.ticks():
        parts.append(_line(LEFT, up(y), WIDTH - LEFT / 2, up(y), "#ddd"))
        parts.append(_text(LEFT - 6, up(y) + 4, f"{y:g}", "end"))
    width = (WIDTH - 1.5 * LEFT) / max(1, len(strips))
    for i, (name, values) in enumerate(strips.items()):
        centre = LEFT + (i + 0.5) * width
        parts.append(_text(centre, HEIGHT - BOTTOM + 20, name, "middle"))
        rows: dict[int, list[float]] = {}
        for value in values:
            rows.setdefault(round(up(value) / 5), []).append(up(value))
        for row in rows.values():
            step = min(6.0, 0.55 * width / len(row))
            for k, y in enumerate(row):
                x = centre + (k - (len(row) - 1) / 2) * step
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="none" stroke="#555"/>'
                )
        if values:
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            half, y = 0.32 * width, up(middle)
            parts.append(_line(centre - half, y, centre + half, y, "#000", width=3))
            parts.append(_text(centre + half + 4, y + 4, f"{middle:.2f}", "start"))
        else:
            parts.append(_text(centre, HEIGHT / 2, "no scores", "middle"))
    return "".join(parts)


class _Axis:
    """Maps values to pixels, from `start` to `end`."""

    def __init__(self, values: list[float], start: float, end: float, log: bool = False) -> None:
        values = values or [0.0, 1.0]
        self._log = log and min(values) > 0
        low, high = self._scale(min(values)), self._scale(max(values))
        margin = 0.04 * (high - low)
        if margin <= 1e-9 * max(abs(low), abs(high)):  # all alike, but for rounding
            margin = max(0.5, 0.04 * abs(high))
        self._low, self._high = low - margin, high + margin
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Choose round values: powers of ten, or some 5 multiples of 1, 2 or 5."""
        low, high = self._low, self._high
        if self._log:
            powers = range(math.ceil(low), math.floor(high) + 1)
            if len(powers) > 1:
                return [10.0**i for i in powers[:: math.ceil(len(powers) / 10)]]
            low, high = 10**low, 10**high
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
        return [float(f"{i * step:.12g}") for i in numbers]  # 0.3, not 0.30000000000000004

    def _scale(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: int = 1
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}" stroke-dasharray="{dash}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    text = escape("".join(c if c.isprintable() else "\ufffd" for c in text))  # XML has no others
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{text}</text>'
