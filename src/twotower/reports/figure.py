"""Figures of reports: lines over numbers, and bars or dots in named rows, as SVG without a script."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple
from unicodedata import east_asian_width

BLUE, ORANGE, GREY, INK, GRID = "#2f6fb0", "#d9822b", "#8a94a0", "#1f2933", "#e4e7eb"
DASHES = "stroke-dasharray='3 3'"
WIDTH, TOP, HEIGHT, MARK = 400, 8, 210, 10
"""Pixels: width of a figure, space above its lines, their height, height of a bar or a dot."""
CHARACTER, MAX_LABEL = 6.5, 26
"""Mean width of a character in pixels; longest name of a row, in narrow characters."""


class Series(NamedTuple):
    """Numbers with a name and a colour."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | str | None]
    """Numbers, or names of rows."""
    color: str
    mark: Literal["points", "line", "dashes", "bar", "dot"] = "points"
    """A line with points, a line, a dashed line, bars from zero, or dots."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """Ends of the interval of each x."""
    best: float | None = None
    """x of a point that is drawn larger."""


@dataclass
class Figure:
    """Series over common axes. The vertical axis has numbers, or the names of `rows`, the first on top."""

    title: str
    x: str = ""
    y: str = ""
    rows: Sequence[str] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    whole: bool = False
    """True if the ticks of the horizontal axis are whole numbers."""
    y_tick: str = "{:,.6g}"
    vertical: float | None = None
    """x of a dotted line."""
    series: list[Series] = field(default_factory=list)

    def __html__(self) -> str:
        """Return the figure as HTML, which a template inserts as it is: title, SVG, names of the series."""
        keys = "".join(
            f'<span><i class="key" style="background:{s.color}"></i>{html.escape(s.name)}</span> '
            for s in self.series
            if s.name
        )
        above = f"<small>{html.escape(self.y)}</small>" if self.y else ""
        return f"<figure><b>{html.escape(self.title)}</b>{above}{self.svg()}<p>{keys}</p></figure>"

    def svg(self) -> str:
        """Return the axes and the series as SVG."""
        names, n = [*self.rows], len(self.series)
        bottom = TOP + ((MARK * n + 12) * len(names) if names else HEIGHT)
        y = _Axis.of((v for s in self.series for v in s.y), bottom, TOP, self.y_range, margin=0.05)
        labels = [self.y_tick.format(v) for v in y.ticks]
        if names:
            y = _Axis(0, len(names), [i + 0.5 for i in range(len(names))], TOP, bottom)
            labels = [_cut(name) for name in names]
        ends = [*(v for s in self.series for v in (*s.x, *s.low, *s.high)), *([0.0] if names else [])]
        left, right = 14 + CHARACTER * max(map(_size, labels), default=0), WIDTH - 16
        x = _Axis.of(ends, left, right, self.x_range, self.whole)
        out = [_line(x.at(v), TOP, x.at(v), bottom, GREY if names and not v else GRID) for v in x.ticks]
        out += [_text(x.at(v), bottom + 16, f"{v:,.6g}", "middle") for v in x.ticks]
        out += [] if names else [_line(left, y.at(v), right, y.at(v), GRID) for v in y.ticks]
        out += [_text(left - 7, y.at(v) + 4, label, "end") for v, label in zip(y.ticks, labels, strict=True)]
        out.append(_text((left + right) / 2, bottom + 34, self.x, "middle"))
        if self.vertical is not None:
            out.append(_line(x.at(self.vertical), TOP, x.at(self.vertical), bottom, GREY, DASHES))
        for number, s in enumerate(self.series):
            down = MARK * (number - (n - 1) / 2)
            places = [y.at(names.index(v) + 0.5) + down if isinstance(v, str) else y.at(v) for v in s.y]
            out += _shapes(s, x, places)
        named = html.escape(self.title)
        return f"<svg viewBox='0 0 {WIDTH} {bottom + 40}' role='img' aria-label='{named}'>{''.join(out)}</svg>"


class _Axis(NamedTuple):
    """Bounds of an axis, the values at its ticks, and the pixels of its ends."""

    low: float
    high: float
    ticks: list[float]
    start: float
    end: float

    @classmethod
    def of(
        cls, values: Iterable[float | str | None], start: float, end: float, bounds: tuple[float, float] | None,
        whole: bool = False, margin: float = 0.0,
    ) -> _Axis:  # fmt: skip
        """Return an axis over `bounds`, or over the finite values widened by `margin`, a share of their range."""
        known = [v for v in values if isinstance(v, float | int) and math.isfinite(v)]
        low, high = bounds or (min(known, default=0.0), max(known, default=1.0))
        if low == high:
            low, high = low - 0.5, high + 0.5
        low, high = (low, high) if bounds else (low - margin * (high - low), high + margin * (high - low))
        unit = 10.0 ** math.floor(math.log10((high - low) / 5))
        step = next(unit * m for m in (1, 2, 5, 10) if high - low <= 5.001 * unit * m)
        step = max(step, 1.0) if whole else step
        ticks = [step * n + 0.0 for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        return cls(low, high, ticks, start, end)

    def at(self, value: float | None) -> float:
        """Return the pixel of a value; NaN of a missing one."""
        share = ((math.nan if value is None else value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _shapes(s: Series, x: _Axis, places: Sequence[float]) -> Iterator[str]:
    """Yield the lines, bars and points of a series at the heights `places`. A missing value ends a line."""
    points = [(x.at(v), y) for v, y in zip(s.x, places, strict=True)]
    if s.mark in ("points", "line", "dashes"):
        of_value = groupby(points, lambda point: math.isfinite(sum(point)))
        for path in (
            " ".join(f"{across:.1f},{down:.1f}" for across, down in some) for known, some in of_value if known
        ):
            dashes = DASHES if s.mark == "dashes" else ""
            yield f"<polyline points='{path}' fill='none' stroke='{s.color}' stroke-width='2' {dashes}/>"
    for i, (across, down) in enumerate(points):
        if s.mark in ("line", "dashes") or not math.isfinite(across + down):
            continue
        named = ", ".join(
            v if isinstance(v, str) else f"{v:.6g}" for v in (s.name, s.x[i], s.y[i]) if v not in ("", None)
        )
        said = f"<title>{html.escape(named)}</title>"
        if s.mark == "bar":
            left, right = sorted((x.at(0.0), across))
            at = f"x='{left:.1f}' y='{down - 4:.1f}' width='{right - left:.1f}'"
            yield f"<rect {at} height='8' fill='{s.color}'>{said}</rect>"
        else:
            radius = 5 if s.mark == "dot" or s.x[i] == s.best else 2.5
            yield f"<circle cx='{across:.1f}' cy='{down:.1f}' r='{radius}' fill='{s.color}'>{said}</circle>"
        if s.low and math.isfinite(s.low[i]):
            yield _line(x.at(s.low[i]), down, x.at(s.high[i]), down, INK)


def _size(text: str) -> int:
    """Return the width of a text in narrow characters."""
    return sum(2 if east_asian_width(c) in "FW" else 1 for c in text)


def _cut(name: str) -> str:
    while _size(name) > MAX_LABEL:
        name = f"{name[:-2]}…"
    return name


def _line(x: float, y: float, to_x: float, to_y: float, color: str, more: str = "") -> str:
    return f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{to_x:.1f}' y2='{to_y:.1f}' stroke='{color}' {more}/>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{html.escape(text)}</text>"
