"""report.html: metrics, learning curves, score distributions, SENet gates and slices of a run, as one offline page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from twotower import files
from twotower.evaluation.cold_items import ALONE, SLICE
from twotower.evaluation.factors import Scorer
from twotower.reports.breakdowns import calibration, recalls, spectra
from twotower.reports.charts import curves, distributions, gates, negatives
from twotower.reports.metric_tables import RANKED, cell, columns, measured_columns, metric_rows
from twotower.reports.page import page, section
from twotower.reports.slices import column_slices, fixed_slices
from twotower.reports.verdict import verdict
from twotower.train.negatives.source_tally import MAX_ROWS

if TYPE_CHECKING:
    from twotower.runs import Run

_GATES = "Weight of each feature in its tower, from 0 to 1: mean over rows, and the 10 % and 90 % quantiles."
_RECALLS = (
    "Share of the test items that are among the best of their user, by group: items by training interactions, users by training "
    "interactions; groups of about the same size. Of many users a random sample."
)
_CALIBRATION = "Observed share of positives in bins of the predicted probability. On the dotted line a probability is what it says."
_SPECTRA = "Share of the variance along each principal direction. A line that falls at once shows vectors that use few of their dimensions."


def write_report(path: Path, run: Run, factors: Scorer) -> None:
    """Write the page of a run, with `factors` as its vectors. The page loads nothing from the network."""
    sections = [_summary(run)]
    sections += [
        section(title, text, figures)
        for title, text, figures in (
            ("Learning curves", _curves_text(run), curves(run)),
            ("Negatives by source", _negatives_text(run), negatives(run)),
            ("Scores of test pairs", _scores_text(run), [distributions(run, factors)]),
            ("SENet gates", _GATES, gates(run)),
            ("Recall by group", _RECALLS, recalls(run, factors)),
            ("Calibration", _CALIBRATION, calibration(run, factors)),
            ("Vectors", _SPECTRA, spectra(factors)),
        )
        if figures
    ]
    sections.append(_slices(run))
    title = f"twotower: {run.folder.name if run.folder else 'run'}"
    files.write(path, page(title, run.dataset.describe(), sections))


def _curves_text(run: Run) -> str:
    """Return the paragraph above the learning curves."""
    monitor = f"<code>{html.escape(run.config.train.monitor)}</code>"
    return f"One point per epoch. The dotted line marks the epoch with the best {monitor}, whose weights are the model."


def _negatives_text(run: Run) -> str:
    """Return the paragraph above the negatives by source."""
    pointwise = run.config.loss.pointwise
    counted = "the middle batch" if pointwise else f"up to {MAX_ROWS} positives of the middle batch"
    above = (
        "the batch's positives that score less than one, on average"
        if pointwise
        else "those that score above their positive"
    )
    return (
        f"Counted on {counted} of each epoch. First the share of the gradient by which the loss lowers the scores of negatives: a source with a "
        f"share near zero teaches nothing. Then, of the negatives of a source, the share of {above}: near zero the source is learned; a share "
        "that stays high tells of negatives that users may like, or of a model that does not fit them."
    )


def _scores_text(run: Run) -> str:
    """Return the paragraph above the score distributions."""
    if run.dataset.test.positive.all():
        return "Logits of the test pairs. All pairs are positive, so AUC is undefined."
    return "Logits of positive and negative test pairs. The less the distributions overlap, the higher the AUC."


def _summary(run: Run) -> str:
    """Return the table of test metrics: the model and the baselines."""
    measured = run.config.evaluation.metric_set
    names = measured_columns(run.metrics, columns(run.config.evaluation))
    rows, best = metric_rows(run.metrics, names), []
    for name, column in zip(names, zip(*rows.values(), strict=True), strict=True):
        choose = max if measured.find(name).higher_is_better else min
        best.append(choose((v for v in column if v is not None), default=None))
    lines = "".join(
        f"<tr><td>{name}</td>"
        + "".join(
            f"<td{' class=best' if v is not None and v == b else ''}>{cell(v)}</td>"
            for v, b in zip(vs, best, strict=True)
        )
        + "</tr>"
        for name, vs in rows.items()
    )
    intervals = "".join(
        f" 95 % bootstrap interval of {m.name} over users: {cell(low)} to {cell(run.metrics[f'test.{m.name}.high'])}."
        for m in measured.of_pairs
        if (low := run.metrics.get(f"test.{m.name}.low")) is not None
    )
    head = "".join(f"<th>{c}</th>" for c in names)
    found = verdict(run.metrics, run.config)
    weighted = " Rows count by their weights." if run.config.evaluation.weighted else ""
    return (
        f"<h2>Test metrics</h2>{f'<p class=verdict>{found.html}</p>' if found else ''}"
        "<p>Ranking metrics are computed by exact search over the whole catalogue: "
        f"{RANKED[run.config.evaluation.repeats]}.{weighted} Bold: best value of the column.{intervals}</p>"
        f"<table><tr><th>model</th>{head}</tr>{lines}</table>"
    )


def _slices(run: Run) -> str:
    """Return the table of test metrics by slice."""
    k, m = run.config.evaluation.k[0], run.metrics
    names = run.config.evaluation.metric_set.sliced(k)
    rows: list[_SliceRow] = [("all", len(run.dataset.test), [m.get(f"test.{name}") for name in names])]
    rows += [
        (of.text, of.size, [m.get(f"test.{name}.{of.name}") for name in names])
        for of in fixed_slices(m, run.config.evaluation)
    ]
    if any(alone := [m.get(f"test.{name}.{ALONE}") for name in names]):
        rows.append(("cold items, ranked among themselves", int(m[f"test.rows.{SLICE}"]), alone))
    about = f"Of an item slice the ranking metrics look for its targets alone, among the {k} best items of the whole catalogue."
    tables = "".join(_column_slices(run, column, names) for column in run.config.evaluation.slices)
    return f"<h2>Slices of the test part</h2><p>{about}</p>{_slice_table('slice', 'pairs', names, rows)}{tables}"


def _column_slices(run: Run, column: str, names: list[str]) -> str:
    """Return the table of test metrics by the values of a column of the users."""
    m = run.metrics
    rows: list[_SliceRow] = [
        (of.text, of.size, [m.get(f"test.{name}.{of.name}") for name in names]) for of in column_slices(m, column)
    ]
    rows.append(("gap", None, [m.get(f"test.{name}.{column}.gap") for name in names]))
    left_out, fewest = m.get(f"test.users.{column}.left_out", 0), run.config.evaluation.slice_min_users
    about = (
        f"Users with a ranking, by their value. The gap is the largest value minus the smallest. {left_out:,.0f} users are of "
        f"values with fewer than {fewest:,} such users, which are left out."
    )
    return f"<h3>By {html.escape(column)}</h3><p>{about}</p>{_slice_table(column, 'users', names, rows)}"


_SliceRow = tuple[str, int | None, list[float | None]]
"""Name of a slice, its size, and its metrics."""


def _slice_table(of: str, size: str, names: list[str], rows: list[_SliceRow]) -> str:
    """Return a table of slices, with their sizes and metrics."""
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{'' if count is None else f'{count:,}'}</td>"
        f"{''.join(f'<td>{cell(v)}</td>' for v in values)}</tr>"
        for name, count, values in rows
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr><th>{html.escape(of)}</th><th>{size}</th>{head}</tr>{lines}</table>"
