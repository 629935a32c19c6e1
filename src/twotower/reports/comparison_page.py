"""Page of a comparison of several runs: metrics, differences to the first, learning curves, slices and options, offline."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from twotower import files
from twotower.config.experiment import differing_options
from twotower.evaluation.comparison import Comparison
from twotower.evaluation.config import Metrics
from twotower.evaluation.metrics.metric import Prominence
from twotower.reports.compare import DECISION_RULE, summarize
from twotower.reports.figure import Figure, Series
from twotower.reports.metric_tables import cell, columns
from twotower.reports.page import page, section
from twotower.reports.several_runs import ComparedRun
from twotower.reports.slices import FIXED, Slice, column_slices, fixed_slices
from twotower.reports.verdict import verdict

COLORS = (
    "#2f6fb0", "#d9822b", "#2e8b57", "#b3261e", "#7b5ea7", "#8c6d46", "#c2569b", "#5f6b76", "#9a9a00", "#1797a6",
)  # fmt: skip
"""Colour of each run."""
_DASH = "–"


def write_comparison(path: Path, runs: Sequence[ComparedRun]) -> None:
    """Write the page of compared runs, of which the first is the one that the others are compared with."""
    shown = [run for run in runs if not run.refusal]
    sections = [_runs(runs), _metrics(shown), _differences(shown), *_curves(shown), _slices(shown), _options(shown)]
    files.write(path, page(f"twotower: comparison of {len(runs)} runs", runs[0].data, sections))


def _runs(runs: Sequence[ComparedRun]) -> str:
    """Return the table of the runs, and a line for each that cannot be compared."""
    rows = [
        [
            _named(run),
            html.escape(run.folder),
            html.escape(run.config.loss.kind.rpartition(":")[2]),
            *(_count(run.metrics.get(f"train.{name}")) for name in ("best_epoch", "epochs", "steps")),
            f"{run.metrics['train.seconds']:,.0f}" if "train.seconds" in run.metrics else _DASH,
        ]
        for run in runs
    ]
    refusals = "".join(
        f"<p><b>{html.escape(run.label)}</b> cannot be compared with {html.escape(runs[0].label)} and is left out below: "
        f"{html.escape(run.refusal)}.</p>"
        for run in runs
        if run.refusal
    )
    head = ["run", "folder", "loss", "best epoch", "epochs", "steps", "training, s"]
    return f"<h2>Runs</h2>{_table(head, rows)}{refusals}"


def _metrics(runs: Sequence[ComparedRun]) -> str:
    """Return the table of the test metrics of each run, with their intervals, beside popularity."""
    first = runs[0]
    names = list(dict.fromkeys(name for run in runs for name in columns(run.config.evaluation)))
    rows = []
    for name in names:
        values = [run.metrics.get(f"test.{name}") for run in runs]
        measured = next(run.config.evaluation.metric_set for run in runs if name in columns(run.config.evaluation))
        choose = max if measured.find(name).higher_is_better else min
        best = choose((v for v in values if v is not None), default=None)
        cells = [_with_interval(run.metrics, name, best) for run in runs]
        rows.append([name, *cells, cell(first.metrics.get(f"baseline.popularity.{name}"))])
    text = (
        "Metrics of each run on its own catalogue, with their 95 % bootstrap intervals over users. Bold: best value of the row. "
        f"Popularity is the baseline of {html.escape(first.label)}."
    )
    verdicts = "".join(
        f"<p class=verdict><b>{html.escape(run.label)}</b>. {found.html}</p>"
        for run in runs
        if (found := verdict(run.metrics, run.config))
    )
    return f"<h2>Test metrics</h2><p>{text}</p>{verdicts}{_table(['metric', *map(_named, runs), 'popularity'], rows)}"


def _with_interval(metrics: Metrics, name: str, best: float | None) -> str:
    value, low, high = (metrics.get(f"test.{name}{end}") for end in ("", ".low", ".high"))
    interval = "" if low is None or high is None else f"<small>{cell(low)} to {cell(high)}</small>"
    shown = cell(value)
    return f"{f'<span class=best>{shown}</span>' if value is not None and value == best else shown}{interval}"


def _differences(runs: Sequence[ComparedRun]) -> str:
    """Return the paired differences to the first run: a sentence a run, a figure, and a table."""
    first, others = runs[0], runs[1:]
    sentences = "".join(
        f"<p><b>{html.escape(run.label)}</b>. {html.escape(summarize(run.comparisons))}</p>" for run in others
    )
    text = (
        f"Both runs of a pair rank the items that both know, for the same test users; a difference is that to {html.escape(first.label)}. "
        f"{html.escape(DECISION_RULE)}"
    )
    names = list(dict.fromkeys(c.metric for run in others for c in run.comparisons))
    of_runs = [{c.metric: c for c in run.comparisons} for run in others]
    rows = [[name, *(_difference(found.get(name)) for found in of_runs)] for name in names]
    drawn = [(run, [(c.metric, c) for c in run.comparisons if max(abs(c.a), abs(c.b)) <= 1]) for run in others]
    figure = _forest("Difference of metrics from 0 to 1, with 95 % intervals", first, drawn)
    return section("Differences", text, [figure]) + sentences + _table(["metric", *map(_named, others)], rows)


def _difference(c: Comparison | None) -> str:
    if c is None:
        return _DASH
    style = "" if not c.better else ' class="better"' if c.better == c.names[1] else ' class="worse"'
    interval = f"{c.low:+.4f} to {c.high:+.4f}, p {c.p:.3f}" if c.has_interval else "too few users for an interval"
    return (
        f"<b{style}>{c.difference:+.4f}</b><small>{interval}</small>"
        f"<small>{cell(c.a)} → {cell(c.b)}, {c.users:,} users</small>"
    )


def _curves(runs: Sequence[ComparedRun]) -> Iterable[str]:
    """Yield the learning curves of the runs over each other."""
    first = runs[0]
    losses = [
        run
        for run in runs
        if (run.config.loss, run.config.negatives, run.config.train.batch_size)
        == (first.config.loss, first.config.negatives, first.config.train.batch_size)
    ]
    text = "One point per epoch, each run on its own validation part; the large point is the epoch of the model."
    if left := [run.label for run in runs if run not in losses]:
        text += (
            f" The loss leaves out {html.escape(', '.join(left))}: losses are comparable only between runs of the same loss, "
            "negatives and batch size."
        )
    figures = [_curve("Loss", "train.loss", losses)] if len(losses) > 1 else []
    names = [
        name
        for run in runs
        for name in run.config.evaluation.metric_set.names(run.config.evaluation.k[:1], Prominence.EPOCH)
    ]
    figures += [_curve(name, f"validation.{name}", runs) for name in dict.fromkeys(names)]
    monitor = first.config.train.monitor
    figures.append(_curve(f"{monitor.removeprefix('validation.')} by time", monitor, runs, by_time=True))
    if figures := [f for f in figures if f.series]:
        yield section("Learning curves", text, figures)


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


def _slices(runs: Sequence[ComparedRun]) -> str:
    """Return a figure and tables of the metrics by slice of the first run."""
    first, others = runs[0], runs[1:]
    names = list(dict.fromkeys(c.metric for run in others for c in run.slices))
    shown = [of for of in _slices_of(first) if of.size]
    if not names or not shown:
        return ""
    config = first.config.evaluation
    text = (
        f"Slices of {html.escape(first.label)}, by its definitions. Differences are paired as those above: both runs of a pair rank the items that "
        f"both know, for the same test users. A slice of fewer than {config.slice_min_users} users has no interval; of many slices without a "
        "difference one in twenty has an interval that excludes zero by chance."
    )
    tables = "".join(f"<h3>{name}</h3>{_slice_table(name, shown, runs)}" for name in names)
    ranked = [name for name in names if "@" in name][:1] or names[:1]
    figures = [_slice_figure(name, shown, runs) for name in ranked]
    return section("Slices of the test part", text, figures) + tables


def _slice_table(metric: str, slices: Sequence[Slice], runs: Sequence[ComparedRun]) -> str:
    """Return the table of a metric: a row for each slice of the first run that has it, and a column for each run."""
    first, others = runs[0], runs[1:]
    of_runs = [{c.of: c for c in run.slices if c.metric == metric} for run in others]
    rows = []
    for of in slices:
        value, found = first.metrics.get(f"test.{metric}.{of.name}"), [of_run.get(of.name) for of_run in of_runs]
        if value is not None or any(found):
            rows.append([html.escape(of.text), f"{of.size:,}", cell(value), *map(_difference, found)])
    return _table(["slice", "size", *map(_named, runs)], rows)


def _slice_figure(name: str, slices: Sequence[Slice], runs: Sequence[ComparedRun]) -> Figure:
    drawn = []
    for run in runs[1:]:
        found = {c.of: c for c in run.slices if c.metric == name}
        named = ((of.text.partition(" (")[0] if of.name in FIXED else of.text, found.get(of.name)) for of in slices)
        drawn.append((run, [(text, c) for text, c in named if c]))
    return _forest(f"Difference of {name} by slice, with 95 % intervals", runs[0], drawn)


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


def _options(runs: Sequence[ComparedRun]) -> str:
    """Return the table of the options in which the runs differ."""
    found = differing_options([(run.schema, run.config) for run in runs])
    if not found:
        return "<h2>Options</h2><p>The runs have the same options.</p>"
    rows = [
        [f"<code>{html.escape(key)}</code>", *(html.escape(value) or _DASH for value in values)]
        for key, values in found.items()
    ]
    text = "Options in which the runs differ; a dash where a run has no such option. All others are equal."
    return f"<h2>Options</h2><p>{text}</p>{_table(['option', *map(_named, runs)], rows, 'texts')}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """Return a table of cells of HTML."""
    lines = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{c}</th>" for c in head)
    return f"<table{f' class={style}' if style else ''}><tr>{heads}</tr>{lines}</table>"


def _named(run: ComparedRun) -> str:
    return f'<span class="key" style="background:{_color(run)}"></span>{html.escape(run.label)}'


def _color(run: ComparedRun) -> str:
    return COLORS[ord(run.letter) - ord("A")]


def _count(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}"
