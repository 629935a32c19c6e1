"""Figures of a run's report."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch

from twotower.data.splits import TEST
from twotower.evaluation.factors import Scorer
from twotower.evaluation.metrics.metric import Prominence
from twotower.features.side import SIDES
from twotower.model.inputs.side_tensors import SideTensors
from twotower.reports.figure import BLUE, GREY, ORANGE, Figure, Series

if TYPE_CHECKING:
    from twotower.runs import Run

MAX_GATE_ROWS = 20_000
"""Rows of each side in the chart of gates; more rows are sampled."""
BINS = 20
"""Bins of the chart of calibration."""


def curves(run: Run) -> list[Figure]:
    """Return the curves of the loss and of the validation metrics over epochs; empty without an epoch."""
    if not run.history:
        return []
    epochs = [h["epoch"] for h in run.history]
    best = run.metrics["train.best_epoch"]
    loss = Figure("Loss", "epoch", whole=True, vertical=best)
    loss.series.append(Series("train loss (weighted)", epochs, [h["train.loss"] for h in run.history], BLUE))
    figures = [loss]
    config = run.config.evaluation
    measured = config.metric_set
    validated = [h for h in run.history if any(name.startswith("validation.") for name in h)]
    validated_epochs = [h["epoch"] for h in validated]
    if validated and run.config.loss.pointwise:  # a contrastive loss is not comparable with a log loss
        log_loss = [h.get("validation.log_loss") for h in validated]
        loss.series.append(Series("validation log loss", validated_epochs, log_loss, ORANGE))
    shown = measured.names(config.k[:1], Prominence.EPOCH)
    for title, at_cut_offs in (("AUC", False), ("Ranking", True)):
        names = [name for name in shown if measured.find(name).at_cut_offs == at_cut_offs]
        names = [name for name in names if any(f"validation.{name}" in h for h in validated)]
        if not names:
            continue  # AUC is undefined for pairs of one class
        figure = Figure(f"{title} on validation", "epoch", whole=True, vertical=best)
        for name, color in zip(names, cycle((BLUE, ORANGE, GREY)), strict=False):
            values = [h.get(f"validation.{name}") for h in validated]
            figure.series.append(Series(name, validated_epochs, values, color))
        figures.append(figure)
    return figures


def distributions(run: Run, factors: Scorer) -> Figure:
    """Return the distributions of the logits of positive and negative test pairs."""
    pairs = run.dataset.part(TEST)
    scores = factors.part_scores(run.dataset, TEST).astype(np.float64)
    low, high = np.quantile(scores, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, 61)
    middle = (edges[1:] + edges[:-1]) / 2
    figure = Figure("Share of pairs by logit", "logit")
    for name, keep, color in (("positive", pairs.positive, BLUE), ("negative", ~pairs.positive, ORANGE)):
        if keep.any():
            n, _ = np.histogram(np.clip(scores[keep], edges[0], edges[-1]), edges)
            name = f"{name} ({keep.sum():,})"
            figure.series.append(Series(name, middle.tolist(), (n / n.sum()).tolist(), color, "line"))
    return figure


def gates(run: Run) -> list[Figure]:
    """Return one bar chart per SENet gate; empty for a model without gates."""
    figures = []
    for side in SIDES:
        encoded = run.dataset.side(side)
        context = run.dataset.context if side == "user" else {}
        rows = np.arange(len(run.dataset.pairs) if context else len(encoded))
        if len(rows) > MAX_GATE_ROWS:
            rows = np.random.default_rng(0).choice(rows, MAX_GATE_ROWS, replace=False)
        interactions = rows
        if context:
            rows = run.dataset.pairs.user[interactions].astype(np.int64)
        device = next(run.model.parameters()).device
        tensors = SideTensors(encoded, run.dataset.encoders.fields(side), device, context=context)
        inputs = tensors.take(rows, interactions=interactions)
        for number, tower in enumerate(run.model.towers(side)):
            with torch.no_grad():
                gate_weights = tower.gates(inputs)
            for section, weights in gate_weights.items():
                gates = weights.cpu().numpy()
                mean, (low, high) = gates.mean(0), np.quantile(gates, [0.1, 0.9], axis=0)
                name = f"{side.capitalize()} tower" + (f", pair {number}" if len(run.model.pairs) > 1 else "")
                name += f", branch {section.split('.')[1]}" if section.startswith("branches.") else ""
                figure = Figure(name, "weight", rows=tower.field_names, x_range=(0, 1))
                ends = low.tolist(), high.tolist()
                figure.series.append(Series("", mean.tolist(), tower.field_names, BLUE, "bar", *ends))
                figures.append(figure)
    return figures


def calibration(run: Run, factors: Scorer) -> list[Figure]:
    """Return the share of positives by predicted probability; empty for a contrastive loss or one class of pairs."""
    positive = run.dataset.part(TEST).positive
    if not run.config.loss.pointwise or positive.all() or not positive.any():
        return []
    predicted = 1 / (1 + np.exp(-factors.part_scores(run.dataset, TEST).astype(np.float64)))
    order = np.argsort(predicted, kind="stable")
    bins = [rows for rows in np.array_split(order, BINS) if len(rows)]
    calibrated = Series("calibrated", [0, 1], [0, 1], GREY, "dashes")
    figure = Figure("Share of positives by predicted probability", "predicted", "observed", series=[calibrated])
    x, y = ([float(of[rows].mean()) for rows in bins] for of in (predicted, positive))
    figure.series.append(Series(f"test pairs, {len(bins)} bins of equal size", x, y, BLUE))
    return [figure]
