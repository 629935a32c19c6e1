"""Figures of reports as SVG."""

from __future__ import annotations

import math
import re

import pytest

from twotower.reports.figure import HEIGHT, TOP, Figure, Series, _Axis


def numbers(svg: str, pattern: str) -> list[tuple[float, ...]]:
    """Return the numbers of the groups of each match."""
    return [tuple(map(float, found)) for found in re.findall(pattern, svg)]


def test_points_lie_where_the_axes_say_and_a_missing_value_ends_a_line() -> None:
    figure = Figure("f", y_range=(0, 1), series=[Series("s", [0, 1, 2, 3, 4], [0.0, 1.0, None, 0.5, math.nan], "red")])
    svg = figure.svg()
    points = numbers(svg, r"cx='([\d.]+)' cy='([\d.]+)'")
    assert [y for _, y in points] == [TOP + HEIGHT, TOP, TOP + HEIGHT / 2]
    (left, _), (next_one, _), (last, _) = points
    assert last - left == pytest.approx(3 * (next_one - left), abs=0.2)
    lines = re.findall(r"<polyline points='([^']+)'", svg)
    assert [len(line.split()) for line in lines] == [2, 1]


def test_bars_begin_at_zero_and_intervals_cross_them() -> None:
    series = [
        Series("", [0.5, -0.25], ["a", "b"], "red", "bar", [0.4, -0.5], [1.0, 0.0]),
        Series("t", [0.5], ["b"], "blue", "dot"),
    ]
    svg = Figure("f", rows=["a", "b"], series=series).svg()
    (a, a_width), (b, b_width) = numbers(svg, r"<rect x='([\d.]+)' y='[\d.]+' width='([\d.]+)'")
    assert a_width == pytest.approx(2 * b_width, abs=0.2)
    assert b + b_width == pytest.approx(a, abs=0.2)
    interval = numbers(svg.partition("</rect>")[2], r"^<line x1='([\d.]+)' y1='[\d.]+' x2='([\d.]+)'")
    assert interval[0] == pytest.approx((a + 0.8 * a_width, a + 2 * a_width), abs=0.2)
    first, second = (y for _, y in numbers(svg, r"<rect x='([\d.]+)' y='([\d.]+)'"))
    ((_, dot),) = numbers(svg, r"cx='([\d.]+)' cy='([\d.]+)'")
    assert first < second < dot, "rows from the top, and the second series below the first"


@pytest.mark.parametrize(
    ("values", "whole", "ticks"),
    [
        ([1, 2, 3], True, [1, 2, 3]),
        ([1, 40], True, [10, 20, 30, 40]),
        ([0.1, 0.32], False, [0.1, 0.15, 0.2, 0.25, 0.3]),
        ([-0.3, 0.1], False, [-0.3, -0.2, -0.1, 0.0, 0.1]),
        ([7.0], False, [6.6, 6.8, 7.0, 7.2, 7.4]),
        ([None, math.nan], False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_numbers_and_whole_ones_of_epochs(
    values: list[float | None], whole: bool, ticks: list[float]
) -> None:
    assert _Axis.of(values, 0, 100, None, whole).ticks == pytest.approx(ticks)


def test_names_are_text_and_long_ones_are_cut() -> None:
    name = "<b>" + 40 * "x"
    figure = Figure("<i>", x="<u>", rows=[name], series=[Series("<s>", [1.0], [name], "red", "bar")])
    page = figure.__html__()
    assert not re.search("<(i|u|s|b)>", page.replace("<b>&lt;i&gt;</b>", ""))
    assert f"&lt;b&gt;{22 * 'x'}…</text>" in page
    cut = Figure("f", rows=["类" * 20]).svg()
    assert f">{'类' * 12}…</text>" in cut
    (end,) = re.findall(r"<text x='([\d.]+)' [^>]*text-anchor='end'", cut)
    assert float(end) > 25 * 6, "a wide character is as wide as two"
