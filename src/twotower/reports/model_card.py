"""Model card of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower.index import Index
from twotower.reports.metric_tables import RANKED, cell, metric_rows
from twotower.reports.verdict import verdict
from twotower.store.manifest import RecallCheck
from twotower.version import __version__

if TYPE_CHECKING:
    from twotower.runs import Run


def model_card(run: Run, index: Index, recall_check: RecallCheck) -> str:
    """Return the model card: the model, its training data and its metrics."""
    config = run.config.evaluation
    names = [name for name in config.metric_set.names(config.k) if f"test.{name}" in run.metrics]
    values = metric_rows(run.metrics, names)
    shown = [label for label, row in values.items() if any(v is not None for v in row)]
    table = zip(names, *(values[label] for label in shown), strict=True)
    rows = "\n".join(f"| {name} | {' | '.join(map(cell, row))} |" for name, *row in table)
    found = verdict(run.metrics, run.config)
    features = "\n".join(f"- {f.side}: `{f.name}` ({f.kind})" for f in run.dataset.schema.features)
    return f"""# Two-tower model

{run.dataset.describe()}

Split: {run.config.split.kind}. Loss: {run.config.loss.kind}. Vectors: {index.width} numbers, metric {index.metric}.
Index: {index.kind}, recall@{recall_check.k} {recall_check.recall:.4f} against exact search by {recall_check.queries} held-out users.

| test metric | {" | ".join(shown)} |
|---|{"---|" * len(shown)}
{rows}

{f"{found.text}{chr(10) * 2}" if found else ""}Full catalogue: {RANKED[run.config.evaluation.repeats]}; see config.toml for every setting.

Features:

{features}

Trained by twotower {__version__}{f"; {run.unfinished}" if run.unfinished else ""}. Scores are no probabilities of liking, least of all outside the population
and the time of the training data.
"""
