"""Tables of metrics on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower.evaluation.metrics import Metrics, Prominence, metric_names
from twotower.reports.columns import cell, columns, metric_rows


def print_metrics(metrics: Metrics, k: int) -> None:
    """Print a table of test metrics: a row for the model and each baseline."""
    names = columns(k)
    _print_table(names, metric_rows(metrics, names), 18)
    if "train.seconds" in metrics:
        print(
            f"trained in {metrics['train.seconds']:.1f} s at {metrics['train.rows_per_second']:,.0f} rows/s, "
            f"best epoch {metrics['train.best_epoch']:.0f}, peak memory {metrics['train.peak_memory_mb']:,.0f} MB"
        )


def print_served(found: Mapping[str, Metrics], cut_offs: Sequence[int]) -> None:
    """Print a table of a bundle's test metrics: a row for each way of search."""
    names = metric_names(cut_offs, Prominence.SERVED)
    ways = {"method 1, exact search": "exact", "method 1, index": "index", "method 2, index": "live"}
    _print_table(names, {label: [found[way].get(name) for name in names] for label, way in ways.items()}, 24)


def _print_table(names: Sequence[str], rows: Mapping[str, Sequence[float | None]], width: int) -> None:
    print(f"{'test':<{width}}" + "".join(f"{name:>13}" for name in names))
    for label, values in rows.items():
        print(f"{label:<{width}}" + "".join(f"{cell(value):>13}" for value in values))
