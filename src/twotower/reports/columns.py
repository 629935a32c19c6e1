"""Rows and columns of the tables of metrics, the same in every report."""

from __future__ import annotations

import math

from twotower.evaluation.metrics import Metrics, Prominence, metric_names
from twotower.train.progress import EpochRecord

ROWS = {"model": "test", "popularity": "baseline.popularity", "user+item bias": "baseline.bias"}
"""Label of a row -> prefix of its metrics."""


def columns(k: int) -> list[str]:
    """Return the metrics of a run that a table shows, at the cut-off `k`."""
    return metric_names([k], Prominence.REPORT)


def epoch_metrics(record: EpochRecord) -> dict[str, float]:
    """Return the validation metrics that the line of an epoch shows, by name."""
    shown = {name.partition("@")[0] for name in metric_names([1], Prominence.EPOCH)}
    names = {name: name.removeprefix("validation.") for name in record if name.startswith("validation.")}
    return {metric: record[name] for name, metric in names.items() if metric.partition("@")[0] in shown}


def metric_rows(metrics: Metrics, names: list[str]) -> dict[str, list[float | None]]:
    """Return the values of some metrics of a run and of each baseline, by label; None: not measured."""
    return {label: [metrics.get(f"{prefix}.{name}") for name in names] for label, prefix in ROWS.items()}


def cell(value: float | None) -> str:
    """Format a metric with four decimals; a dash if it is undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"
