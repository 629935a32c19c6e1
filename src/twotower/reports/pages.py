"""HTML pages: report.html of a run, and the comparison of several runs. A page loads nothing from the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from twotower import files
from twotower.config.experiment import differing_options
from twotower.evaluation.comparison import Comparison
from twotower.evaluation.config import WIDTH, Metrics, MetricSet
from twotower.evaluation.factors import Scorer
from twotower.evaluation.metrics.metric import Prominence
from twotower.evaluation.slices import COLD, COLD_ALONE
from twotower.reports.charts import calibration, curves, distributions, gates
from twotower.reports.compare import DECISION_RULE, ComparedRun, summarize
from twotower.reports.figure import Figure, Series
from twotower.reports.metric_tables import (
    FIXED,
    RANKED,
    Slice,
    cell,
    column_slices,
    columns,
    fixed_slices,
    measured_columns,
    metric_rows,
)
from twotower.reports.verdict import verdict

if TYPE_CHECKING:
    from twotower.runs import Run

COLORS = (
    "#2f6fb0", "#d9822b", "#2e8b57", "#b3261e", "#7b5ea7", "#8c6d46", "#c2569b", "#5f6b76", "#9a9a00", "#1797a6",
)  # fmt: skip
"""Colour of each compared run."""


def _color(run: ComparedRun) -> str:
    return COLORS[ord(run.letter) - ord("A")]


def template(name: str) -> Template:
    """Return a template, which escapes every value."""
    environment = Environment(
        loader=PackageLoader("twotower.reports", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"cell": cell, "color": _color}
    return environment.get_template(name)


def _best(measured: MetricSet, name: str, values: Iterable[float | None]) -> float | None:
    """Return the best of some values of a metric; None without a value."""
    choose: Callable[..., float | None] = max if measured.find(name).higher_is_better else min
    return choose((v for v in values if v is not None), default=None)


# ---- report of a run ---------------------------------------------------------------------------------------------


def write_report(path: Path, run: Run, factors: Scorer) -> None:
    """Write the page of a run, with `factors` as its vectors."""
    figures = {
        "curves": curves(run), "distributions": [distributions(run, factors)],
        "gates": gates(run), "calibration": calibration(run, factors),
    }  # fmt: skip
    files.write(path, run_page(run, figures))


def run_page(run: Run, figures: Mapping[str, Sequence[Figure]]) -> str:
    """Return the page of a run: test metrics, the figures of each section, and slices."""
    config, metrics = run.config.evaluation, run.metrics
    names = measured_columns(metrics, columns(config))
    rows = metric_rows(metrics, names)
    values = zip(names, zip(*rows.values(), strict=True), strict=True)
    return template("run.html").render(
        title=f"twotower: {run.folder.name if run.folder else 'run'}",
        run=run,
        config=config,
        verdict=verdict(metrics, run.config),
        ranked=RANKED[config.repeats],
        names=names,
        rows=rows,
        widths={name: cell(width, WIDTH) for name, (width,) in metric_rows(metrics, [WIDTH]).items()},
        best=[_best(config.metric_set, name, column) for name, column in values],
        intervals=[m.name for m in config.metric_set.of_pairs if f"test.{m.name}.low" in metrics],
        figures=figures,
        by_width=_by_width(metrics),
        slice_names=config.metric_set.sliced(config.k[0]),
        slices=_slices(run),
        columns={column: _column_slices(run, column) for column in config.slices},
    )


def _by_width(metrics: Metrics) -> dict[int, list[float | None]]:
    """Return the monitored metric by projected and by fitted vectors of each width that was tried."""
    widths = sorted({int(name.split(".")[1]) for name in metrics if name.startswith("narrow.")})
    return {width: [metrics.get(f"narrow.{width}{end}") for end in (".projected", "")] for width in widths}


_SliceRow = tuple[str, int | None, list[float | None]]
"""Name of a slice, its size, and its metrics."""


def _slice_values(run: Run, end: str) -> list[float | None]:
    """Return the test metrics of a slice, by the end of their names."""
    config = run.config.evaluation
    return [run.metrics.get(f"test.{name}{end}") for name in config.metric_set.sliced(config.k[0])]


def _slices(run: Run) -> list[_SliceRow]:
    """Return the rows of the slices by popularity and activity."""
    rows: list[_SliceRow] = [("all", len(run.dataset.test), _slice_values(run, ""))]
    of_slices = fixed_slices(run.metrics, run.config.evaluation)
    rows += [(of.text, of.size, _slice_values(run, f".{of.name}")) for of in of_slices]
    if any(alone := _slice_values(run, f".{COLD_ALONE}")):
        rows.append(("cold items, ranked among themselves", int(run.metrics[f"test.rows.{COLD}"]), alone))
    return rows


def _column_slices(run: Run, column: str) -> list[_SliceRow]:
    """Return the rows of the slices by the values of a column of the users."""
    rows: list[_SliceRow] = [
        (of.text, of.size, _slice_values(run, f".{of.name}")) for of in column_slices(run.metrics, column)
    ]
    return [*rows, ("gap", None, _slice_values(run, f".{column}.gap"))]


# ---- comparison of runs ------------------------------------------------------------------------------------------


def write_comparison(path: Path, runs: Sequence[ComparedRun]) -> None:
    """Write the page of compared runs; the first is the one that the others are compared with."""
    shown = [run for run in runs if not run.refusal]
    first, others = shown[0], shown[1:]
    best = {}
    for name in dict.fromkeys(name for run in shown for name in columns(run.config.evaluation)):
        measured = next(r.config.evaluation.metric_set for r in shown if name in columns(r.config.evaluation))
        best[name] = _best(measured, name, (run.metrics.get(f"test.{name}") for run in shown))
    of_metrics = [{c.metric: c for c in run.comparisons} for run in others]
    forest = [(run, [(c.metric, c) for c in run.comparisons if max(abs(c.a), abs(c.b)) <= 1]) for run in others]
    losses = [(run.config.loss, run.config.negatives, run.config.train.batch_size) for run in shown]
    same_loss = [run for run, settings in zip(shown, losses, strict=True) if settings == losses[0]]
    slices = [of for of in _slices_of(first) if of.size]
    page = template("comparison.html").render(
        title=f"twotower: comparison of {len(runs)} runs",
        runs=runs,
        shown=shown,
        best=best,
        verdicts=[(run, found) for run in shown if (found := verdict(run.metrics, run.config))],
        rule=DECISION_RULE,
        summaries=[(run, summarize(run.comparisons)) for run in others],
        differences={
            name: [found.get(name) for found in of_metrics]
            for name in dict.fromkeys(c.metric for run in others for c in run.comparisons)
        },
        forest=[_forest("Difference of metrics from 0 to 1, with 95 % intervals", first, forest)],
        curves=_curves(shown, same_loss),
        other_losses=", ".join(run.label for run in shown if run not in same_loss),
        slices=_slice_rows(shown, slices) if slices else {},
        slice_figures=_slice_figures(shown, slices),
        options=differing_options([(run.schema, run.config) for run in shown]),
    )
    files.write(path, page)


def _curves(runs: Sequence[ComparedRun], same_loss: Sequence[ComparedRun]) -> list[Figure]:
    """Return the learning curves of all runs in common figures."""
    figures = [_curve("Loss", "train.loss", same_loss)] if len(same_loss) > 1 else []
    names = [
        name
        for run in runs
        for name in run.config.evaluation.metric_set.names(run.config.evaluation.k[:1], Prominence.EPOCH)
    ]
    figures += [_curve(name, f"validation.{name}", runs) for name in dict.fromkeys(names)]
    monitor = runs[0].config.train.monitor
    figures.append(_curve(f"{monitor.removeprefix('validation.')} by time", monitor, runs, by_time=True))
    return [figure for figure in figures if figure.series]


def _curve(title: str, name: str, runs: Sequence[ComparedRun], by_time: bool = False) -> Figure:
    x = "train.seconds" if by_time else "epoch"
    figure = Figure(title, "seconds of training" if by_time else "epoch", whole=not by_time)
    for run in runs:
        points = [entry for entry in run.history if name in entry and x in entry]
        if not points:
            continue
        best = next((entry[x] for entry in points if entry["epoch"] == run.metrics.get("train.best_epoch")), None)
        places, values = [entry[x] for entry in points], [entry[name] for entry in points]
        figure.series.append(Series(run.label, places, values, _color(run), best=best))
    return figure


def _slice_rows(
    runs: Sequence[ComparedRun], slices: Sequence[Slice]
) -> dict[str, list[tuple[Slice, float | None, list[Comparison | None]]]]:
    """Return rows by metric: a slice, its value in the first run, and the differences of the other runs."""
    first, others, tables = runs[0], runs[1:], {}
    for name in dict.fromkeys(c.metric for run in others for c in run.slices):
        of_runs = [{c.of: c for c in run.slices if c.metric == name} for run in others]
        rows = [(of, first.metrics.get(f"test.{name}.{of.name}"), [c.get(of.name) for c in of_runs]) for of in slices]
        tables[name] = [row for row in rows if row[1] is not None or any(row[2])]
    return tables


def _slice_figures(runs: Sequence[ComparedRun], slices: Sequence[Slice]) -> list[Figure]:
    """Return a figure of the differences by slice, for the first ranking metric, else for the first metric."""
    names = [c.metric for run in runs[1:] for c in run.slices]
    if not names:
        return []
    name = next((name for name in names if "@" in name), names[0])
    drawn = []
    for run in runs[1:]:
        found = {c.of: c for c in run.slices if c.metric == name}
        named = ((of.text.partition(" (")[0] if of.name in FIXED else of.text, found.get(of.name)) for of in slices)
        drawn.append((run, [(text, c) for text, c in named if c]))
    return [_forest(f"Difference of {name} by slice, with 95 % intervals", runs[0], drawn)]


def _forest(
    title: str, first: ComparedRun, drawn: Sequence[tuple[ComparedRun, Sequence[tuple[str, Comparison]]]]
) -> Figure:
    """Return a figure with a row for each name, and in it a dot with an interval for each run."""
    rows = list(dict.fromkeys(name for _, found in drawn for name, _ in found))
    series = [
        Series(
            run.label, [c.difference for _, c in found], [name for name, _ in found], _color(run), "dot",
            [c.low for _, c in found], [c.high for _, c in found],
        )
        for run, found in drawn
    ]  # fmt: skip
    return Figure(title, f"difference to {first.letter}", rows=rows, series=series)


def _slices_of(run: ComparedRun) -> Iterable[Slice]:
    yield from fixed_slices(run.metrics, run.config.evaluation)
    for column in run.config.evaluation.slices:
        yield from (of._replace(text=f"{column} = {of.text}") for of in column_slices(run.metrics, column))
