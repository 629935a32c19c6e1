"""Tables of metrics: rows, columns and slices, the same in every report, and the print on a terminal."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from twotower.evaluation.config import WIDTH, EvaluationConfig, Metrics, MetricSet
from twotower.evaluation.metrics.metric import Prominence
from twotower.scorers import SCORERS
from twotower.train.progress import EpochRecord

ROWS = {"model": "test", "popularity": "baseline.popularity", "user+item bias": "baseline.bias"}
"""Label of a row -> prefix of its metrics."""
WHERE_MEASURED = {kind.label: f"baseline.{kind.kind}" for kind in SCORERS if kind.label}
"""Rows that only some evaluations have: of ordered logs, of ranked repeats, of models with recent popularity."""

RANKED = {
    "exclude": "items that a user has seen are left out", "only": "only items that a user has seen are ranked",
    "allow": "items that a user has seen are ranked as all others",
}  # fmt: skip
"""Items of the rankings by `evaluation.repeats`."""

FIXED = {
    "new_user": "new users (fewer than {new_user_below} training interactions)",
    "new_item": "new items (fewer than {new_item_below} training interactions)",
    "cold_item": "cold items (no training interaction)",
    "head": "head (the most popular {head_share:.0%} of the items)",
    "tail": "tail (all other items)",
}
"""Slice by popularity or activity -> its definition, with options to fill in."""

WAYS = {
    "method 1, exact search": "exact",
    "method 1, index": "index",
    "method 2, exact search": "live_exact",
    "method 2, index": "live",
}
"""Label of a row -> way of search of `evaluate_bundle`."""


def print_metrics(metrics: Metrics, config: EvaluationConfig, names: Sequence[str] = ()) -> None:
    """Print a table of the width and test metrics, `names` or all of `columns`: a row for the model and each
    baseline."""
    names = [WIDTH, *measured_columns(metrics, names or columns(config))]
    _print_table(config, names, metric_rows(metrics, names), 18)
    if "train.seconds" in metrics:
        epochs = f" at {metrics['train.rows_per_second']:,.0f} rows/s, best epoch {metrics['train.best_epoch']:.0f}"
        print(
            f"trained in {metrics['train.seconds']:.1f} s{epochs if metrics['train.epochs'] else ''}, "
            f"peak memory {metrics['train.peak_memory_mb']:,.0f} MB"
        )


def print_served(found: Mapping[str, Metrics], config: EvaluationConfig) -> None:
    """Print a table of the width and a bundle's test metrics: a row for each measured way of search."""
    names = [WIDTH, *config.metric_set.names(config.k, Prominence.SERVED)]
    rows = {label: [found[way].get(name) for name in names] for label, way in WAYS.items() if way in found}
    _print_table(config, names, rows, 24)


def _print_table(
    config: EvaluationConfig, names: Sequence[str], rows: Mapping[str, Sequence[float | None]], width: int
) -> None:
    """Print a table. Columns are as wide as their text; on a narrow terminal they are printed below each other."""
    heading = "test, by weight" if config.weighted else "test"
    columns_of = [[name, *(cell(v, name) for v in column)] for name, *column in zip(names, *rows.values(), strict=True)]
    widths = [max(13, *(len(text) + 2 for text in column)) for column in columns_of]
    labels, width = [heading, *rows], max(width, *(len(label) + 2 for label in (heading, *rows)))
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    start = 0
    while start < len(names):
        stop = start + 1
        while stop < len(names) and width + sum(widths[start : stop + 1]) <= limit:
            stop += 1
        for i, label in enumerate(labels):
            print(f"{label:<{width}}" + "".join(f"{columns_of[n][i]:>{widths[n]}}" for n in range(start, stop)))
        start = stop


def measured_columns(metrics: Metrics, names: Sequence[str]) -> list[str]:
    """Return those `names` that the model or a baseline has."""
    known = {name for prefix in (ROWS | WHERE_MEASURED).values() for name in names if f"{prefix}.{name}" in metrics}
    return [name for name in names if name in known]


def columns(config: EvaluationConfig) -> list[str]:
    """Return the metrics in the table of a run, at the first cut-off."""
    return config.metric_set.names(config.k[:1], Prominence.REPORT)


def epoch_metrics(record: EpochRecord, measured: MetricSet) -> dict[str, float]:
    """Return the validation metrics in the line of an epoch, by name."""
    shown = {name.partition("@")[0] for name in measured.names([1], Prominence.EPOCH)}
    names = {name: name.removeprefix("validation.") for name in record if name.startswith("validation.")}
    return {metric: record[name] for name, metric in names.items() if metric.partition("@")[0] in shown}


def metric_rows(metrics: Metrics, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Return the values of metrics of a run and of each baseline, by label; None: not measured."""
    measured = {name.rpartition(".")[0] for name in metrics}
    rows = ROWS | {label: prefix for label, prefix in WHERE_MEASURED.items() if prefix in measured}
    return {label: [metrics.get(f"{prefix}.{name}") for name in names] for label, prefix in rows.items()}


def cell(value: float | None, name: str = "") -> str:
    """Format a metric with four decimals, and the width as a whole number; a dash if it is undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if name == WIDTH else f"{value:.4f}"


class Slice(NamedTuple):
    """A slice of the test part."""

    name: str
    """End of the names of its metrics: `new_user` in test.auc.new_user."""
    text: str
    """Definition in words."""
    size: int
    """Number of test pairs; for a column of the users, of users with a ranking."""


def fixed_slices(metrics: Metrics, config: EvaluationConfig) -> Iterator[Slice]:
    """Yield the slices by popularity and activity in the metrics of a run."""
    settings = config.model_dump()
    for name, text in FIXED.items():
        if f"test.rows.{name}" in metrics:
            yield Slice(name, text.format(**settings), int(metrics[f"test.rows.{name}"]))


def column_slices(metrics: Metrics, column: str) -> Iterator[Slice]:
    """Yield the slices by the values of a column of the users in the metrics of a run."""
    start = f"test.users.{column}="
    for name, size in metrics.items():
        if name.startswith(start):
            value = name.removeprefix(start)
            yield Slice(f"{column}={value}", value, int(size))
