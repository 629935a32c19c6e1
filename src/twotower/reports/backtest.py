"""Report of a backtest: a table of its periods for the terminal, and a page with a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from twotower import files
from twotower.arrays.types import Bools, Doubles, Shaped
from twotower.evaluation.bootstrap import bootstrap_counts
from twotower.evaluation.part_evaluation import MODEL
from twotower.reports.figure import BLUE, GREY, ORANGE, Figure, Series
from twotower.reports.pages import template

KNOWN = "known"
"""Column of the values: true for a user with a row before the cut."""
RESAMPLES = 2_000
"""Resamples of the users of each period."""
RECENT = {"popularity of 7 days": 7, "popularity of 28 days": 28}
"""Days before a cut whose popularity is a baseline, by its name."""
COLORS = dict(zip(("popularity", *RECENT), (GREY, "#2e8b57", "#7b5ea7"), strict=True))
"""Colour of each baseline that every chart has."""


@dataclass
class Fold:
    """A cut of a log, and the values of the users of the period after it."""

    date: str
    """Day of the cut."""
    until: str
    """Day after the last of the period."""
    known: int
    """Rows before this time are known at the cut: microseconds since 1970, as the others."""
    begin: int
    end: int
    rows: int
    """Rows of the period."""
    new: int
    """Rows of the period of items without a row before the cut."""
    values: pl.DataFrame = field(default_factory=pl.DataFrame)
    """A row for each user with something to find: user, KNOWN, and a column for each scorer and metric."""

    def of(self, scorer: str, metric: str, kept: Shaped[Bools, "n"] | None = None) -> Shaped[Doubles, "n"]:
        """Return a metric of the users that are kept, by default all."""
        found: Doubles = self.values[f"{scorer} {metric}"].to_numpy()
        return found if kept is None else found[kept]


class Interval(NamedTuple):
    """A mean over users with its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """Return the three numbers."""
        mean, low, high = (f"{value:{sign}.4f}" if value == value else "–" for value in self)
        return f"{mean} [{low}, {high}]"


def interval(of_folds: Sequence[Shaped[Doubles, "n"]]) -> Interval:
    """Return the mean over the users of all folds, with its interval by a bootstrap over the users of each fold."""
    n = sum(map(len, of_folds))
    if not n:
        return Interval(*[float("nan")] * 3)
    sums = np.zeros(RESAMPLES)
    for seed, values in enumerate(of_folds):
        if len(values):
            sums += np.concatenate([counts @ values for counts in bootstrap_counts(len(values), RESAMPLES, seed)])
    low, high = np.quantile(sums / n, [0.025, 0.975])
    return Interval(float(sum(values.sum() for values in of_folds)) / n, float(low), float(high))


class Row(NamedTuple):
    """A row of the table."""

    name: str
    rows: int | None
    new: int | None
    users: int
    model: Interval
    simple: Interval
    difference: Interval


@dataclass(frozen=True)
class Backtest:
    """The folds of a backtest, and the metric that its tables show first, such as ndcg@10."""

    folds: list[Fold]
    metric: str
    rising: bool = True
    """True if higher values of this metric are better."""

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics, the shown one first."""
        names = [c.removeprefix(f"{MODEL} ") for c in self.folds[0].values.columns if c.startswith(f"{MODEL} ")]
        return sorted(names, key=lambda name: name != self.metric)

    @cached_property
    def simple(self) -> list[str]:
        """Baselines that each fold has, the best one by the shown metric over all folds first."""
        end = f" {self.metric}"
        names = [c.removesuffix(end) for c in self.folds[0].values.columns if c.endswith(end)]
        names = [n for n in names if n != MODEL and all(f"{n}{end}" in fold.values.columns for fold in self.folds)]
        return sorted(names, key=lambda name: self.total(name).mean, reverse=self.rising)

    def total(self, scorer: str, metric: str = "") -> Interval:
        """Return a metric of a scorer over all folds."""
        return interval([fold.of(scorer, metric or self.metric) for fold in self.folds])

    def row(self, name: str, folds: Sequence[Fold], metric: str, known: bool | None = None) -> Row:
        """Return a row of some folds, of all users or of those with a history or without."""
        kept = [None if known is None else fold.values[KNOWN].to_numpy() == known for fold in folds]
        model, simple = (
            [fold.of(scorer, metric, of) for fold, of in zip(folds, kept, strict=True)]
            for scorer in (MODEL, self.simple[0])
        )
        differences = [a - b for a, b in zip(model, simple, strict=True)]
        of = (interval(model), interval(simple), interval(differences))
        n, rows, new = (sum(each) for each in zip(*((len(f.values), f.rows, f.new) for f in folds), strict=True))
        if known is not None:
            return Row(name, None, None, sum(map(len, model)), *of)
        return Row(name, rows, new, n, *of)

    def rows(self, metric: str) -> list[Row]:
        """Return a row for each fold, for all of them, and for their users with and without a history."""
        return [
            *(self.row(fold.date, [fold], metric) for fold in self.folds),
            self.row("all periods", self.folds, metric),
            self.row("users with a history", self.folds, metric, True),
            self.row("users without", self.folds, metric, False),
        ]

    @property
    def conclusion(self) -> str:
        """The difference to the best baseline in one sentence."""
        found, best = self.row("", self.folds, self.metric).difference, self.simple[0]
        said = "level with"
        if found.low > 0 or found.high < 0:
            said = "better than" if (found.low > 0) == self.rising else "worse than"
        return f"{self.metric}: the model is {said} {best}, the strongest simple scorer: {found.text('+')}."

    def lines(self) -> Iterator[str]:
        """Yield printable lines: the table of the shown metric, the totals of all scorers, and the conclusion."""
        heads = (self.metric, "rows", "new items", "users", MODEL, self.simple[0], "difference")
        yield "{:<21}{:>8}{:>10}{:>8}  {:<25}{:<25}{}".format(*heads)
        for row in self.rows(self.metric):
            counts = ("" if n is None else f"{n:,}" for n in (row.rows, row.new, row.users))
            yield "{:<21}{:>8}{:>10}{:>8}  {:<25}{:<25}{}".format(
                row.name, *counts, row.model.text(), row.simple.text(), row.difference.text("+")
            )
        yield ""
        yield "{:<26}".format("all periods") + "".join(f"{name:<27}" for name in self.metrics[:3])
        for name in (MODEL, *self.simple):
            yield f"{name:<26}" + "".join(f"{self.total(name, m).text():<27}" for m in self.metrics[:3])
        yield self.conclusion


def write_page(path: Path, found: Backtest, title: str) -> None:
    """Write the page of a backtest: the chart and the table of the shown metric, and the totals of all scorers."""
    shown = {MODEL: BLUE, found.simple[0]: ORANGE}
    shown |= {name: color for name, color in COLORS.items() if name in found.simple and name not in shown}
    dates = [fold.date for fold in found.folds]
    figure = Figure(found.metric, x="mean over users, with its 95 % interval", rows=dates)
    for name, color in shown.items():
        values = [interval([fold.of(name, found.metric)]) for fold in found.folds]
        ends = [v.low for v in values], [v.high for v in values]
        figure.series.append(Series(name, [v.mean for v in values], dates, color, "dot", *ends))
    page = template("backtest.html").render(
        title=title, found=found, figures=[figure], rows=found.rows(found.metric), model=MODEL,
        totals={name: [found.total(name, m) for m in found.metrics] for name in (MODEL, *found.simple)},
    )  # fmt: skip
    files.write(path, page)
