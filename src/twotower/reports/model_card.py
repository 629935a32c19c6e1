"""Model card of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import twotower
from twotower.evaluation.metrics import Metrics
from twotower.index import Index
from twotower.store.manifest import RecallCheck

if TYPE_CHECKING:
    from twotower.runs import Run


def model_card(run: Run, index: Index, recall_check: RecallCheck) -> str:
    """Return the model card: the model, its training data and its metrics."""
    metrics = run.metrics
    shown = [m for m in metrics if m.startswith("test.") and not m.endswith((".low", ".high")) and m.count(".") == 1]
    rows = "\n".join(
        f"| {m.removeprefix('test.')} | {metrics[m]:.4f} | {_metric_cell(metrics, 'popularity', m)} |" for m in shown
    )
    features = "\n".join(f"- {f.side}: `{f.name}` ({f.kind})" for f in run.dataset.schema.features)
    return f"""# Two-tower model

{run.dataset.describe()}

Split: {run.config.split.kind}. Loss: {run.config.loss.kind}. Vectors: {index.width} numbers, metric {index.metric}.
Index: {index.kind}, recall@{recall_check.k} {recall_check.recall:.4f} against exact search by {recall_check.queries} held-out users.

| test metric | model | popularity |
|---|---|---|
{rows}

Full catalogue, seen items left out; see config.toml for every setting.

Features:

{features}

Trained by twotower {twotower.__version__}. Scores are no probabilities of liking, least of all outside the population
and the time of the training data.
"""


def _metric_cell(metrics: Metrics, baseline: str, name: str) -> str:
    value = metrics.get(name.replace("test.", f"baseline.{baseline}.", 1))
    return "" if value is None else f"{value:.4f}"
