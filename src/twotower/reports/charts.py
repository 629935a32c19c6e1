"""Figures of a run's report: learning curves, negatives by source, score distributions, SENet gates."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
import torch
from pydantic import JsonValue

from twotower.data.splits import TEST
from twotower.evaluation.factors import Scorer
from twotower.evaluation.metrics.metric import Prominence
from twotower.features.side import SIDES
from twotower.model.inputs.side_tensors import SideTensors
from twotower.train.negatives.source_tally import PREFIX

if TYPE_CHECKING:
    from twotower.runs import Run

Axis = Mapping[str, JsonValue]
"""Settings of an axis by their names in plotly."""
BLUE, ORANGE, GREY, INK = "#2f6fb0", "#d9822b", "#8a94a0", "#1f2933"
SOURCE_COLORS = (BLUE, ORANGE, "#2e8b57", "#7b5ea7", "#b3261e", "#1797a6", "#8c6d46", "#c2569b", GREY)
MAX_GATE_ROWS = 20_000
"""Rows of each side whose gates are shown; of more rows a fixed random sample."""


def empty_figure(
    title: str,
    x: str,
    y: str,
    height: int = 340,
    x_axis: Axis | None = None,
    y_axis: Axis | None = None,
    vertical: float | None = None,
) -> go.Figure:
    """Return an empty figure with a title, titles and further settings of the axes, and a dotted line at `vertical`. Its template is
    added in the page."""
    # update_layout and add_vline would take many times as long, and so would a template
    dotted = {"type": "line", "x0": vertical, "x1": vertical, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
    shapes = [] if vertical is None else [dotted | {"line": {"color": GREY, "dash": "dot"}}]
    return go.Figure(layout={
        "template": {}, "shapes": shapes,
        "title": {"text": title, "font": {"size": 15, "color": INK}, "x": 0.0, "xref": "paper"}, "height": height,
        "margin": {"l": 10, "r": 10, "t": 40, "b": 10}, "plot_bgcolor": "white", "paper_bgcolor": "white",
        "font": {"color": INK, "size": 13}, "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "xaxis": {"title": x, "gridcolor": "#eef1f4", "zeroline": False, "automargin": True, **(x_axis or {})},
        "yaxis": {"title": y, "gridcolor": "#eef1f4", "zeroline": False, "automargin": True, **(y_axis or {})},
    })  # fmt: skip


def curves(run: Run) -> list[go.Figure]:
    """Return the curves of the loss and of the validation metrics over epochs."""
    epochs = [h["epoch"] for h in run.history]
    whole, best = whole_epochs(len(epochs)), run.metrics["train.best_epoch"]
    loss = empty_figure("Loss", "epoch", "loss", x_axis=whole, vertical=best)
    loss.add_scatter(x=epochs, y=[h["train.loss"] for h in run.history], name="train loss (weighted)", line_color=BLUE,
                     mode="lines+markers")  # fmt: skip
    figures = [loss]
    config = run.config.evaluation
    measured = config.metric_set
    validated = [h for h in run.history if any(name.startswith("validation.") for name in h)]
    validated_epochs = [h["epoch"] for h in validated]
    if validated and run.config.loss.pointwise:  # a contrastive loss is not comparable with a log loss
        log_loss = [h.get("validation.log_loss") for h in validated]
        loss.add_scatter(x=validated_epochs, y=log_loss, name="validation log loss",
                         line_color=ORANGE, mode="lines+markers")  # fmt: skip
    shown = measured.names(config.k[:1], Prominence.EPOCH)
    for title, at_cut_offs in (("AUC", False), ("Ranking", True)):
        names = [name for name in shown if measured.find(name).at_cut_offs == at_cut_offs]
        names = [name for name in names if any(f"validation.{name}" in h for h in validated)]
        if not names:
            continue  # AUC is undefined for pairs of one class
        figure = empty_figure(f"{title} on validation", "epoch", "", x_axis=whole, vertical=best)
        for name, color in zip(names, cycle((BLUE, ORANGE, GREY)), strict=False):
            values = [h.get(f"validation.{name}") for h in validated]
            figure.add_scatter(x=validated_epochs, y=values, name=name, line_color=color,
                               mode="lines+markers", showlegend=True)  # fmt: skip
        figures.append(figure)
    return figures


def whole_epochs(n: int) -> Axis:
    """Return the settings of an axis of `n` epochs."""
    return {"tickformat": "d", "dtick": max(1, n // 10)}


def negatives(run: Run) -> list[go.Figure]:
    """Return the shares of the gradient and of negatives above their positive, by source, over epochs; empty without negatives."""
    kinds = dict.fromkeys(
        name.removeprefix(PREFIX).rpartition(".")[0]
        for entry in run.history
        for name in entry
        if name.startswith(PREFIX)
    )
    counted = [entry for entry in run.history if any(name.startswith(PREFIX) for name in entry)]
    figures = []
    for what, title in (("share", "Share of the gradient of all negatives"), ("above", "Share above the positive")):
        shares: Axis = {"range": [0, 1], "tickformat": ".0%"}
        figure = empty_figure(title, "epoch", "share", x_axis=whole_epochs(len(run.history)), y_axis=shares)
        for kind, color in zip(kinds, cycle(SOURCE_COLORS), strict=False):
            found = [entry for entry in counted if f"{PREFIX}{kind}.{what}" in entry]
            n = found[-1][f"{PREFIX}{kind}.n"]
            figure.add_scatter(
                x=[entry["epoch"] for entry in found], y=[entry[f"{PREFIX}{kind}.{what}"] for entry in found],
                name=f"{kind.rpartition(':')[2]} ({n:,.{0 if n >= 10 else 1}f} a positive)", line_color=color, mode="lines+markers", showlegend=True,
            )  # fmt: skip
        figures.append(figure)
    return figures if kinds else []


def distributions(run: Run, factors: Scorer) -> go.Figure:
    """Return the distributions of the logits of positive and negative test pairs."""
    pairs = run.dataset.part(TEST)
    scores = factors.part_scores(run.dataset, TEST).astype(np.float64)
    low, high = np.quantile(scores, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, 61)
    middle = (edges[1:] + edges[:-1]) / 2
    figure = empty_figure("Share of pairs by logit", "logit", "share", 360)
    for name, keep, color in (("positive", pairs.positive, BLUE), ("negative", ~pairs.positive, ORANGE)):
        if keep.any():
            n, _ = np.histogram(np.clip(scores[keep], edges[0], edges[-1]), edges)
            figure.add_scatter(x=middle, y=n / n.sum(), name=f"{name} ({keep.sum():,})", line_color=color,
                               fill="tozeroy", mode="lines")  # fmt: skip
    return figure


def gates(run: Run) -> list[go.Figure]:
    """Return one bar chart per SENet gate; empty for a model without gates."""
    figures = []
    for side in SIDES:
        encoded, interactions = run.dataset.side(side), None
        context = run.dataset.context if side == "user" else {}
        rows = np.arange(len(run.dataset.pairs) if context else len(encoded))
        if len(rows) > MAX_GATE_ROWS:
            rows = np.random.default_rng(0).choice(rows, MAX_GATE_ROWS, replace=False)
        if context:  # a row is an interaction
            rows, interactions = run.dataset.pairs.user[rows].astype(np.int64), rows
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
                upwards: Axis = {"autorange": "reversed"}
                figure = empty_figure(
                    name, "weight", "", 120 + 34 * len(mean), x_axis={"range": [0, 1]}, y_axis=upwards
                )
                figure.add_bar(
                    x=mean, y=tower.field_names, orientation="h", marker_color=BLUE, width=0.6,
                    error_x={
                        "type": "data", "array": high - mean, "arrayminus": mean - low, "color": INK, "thickness": 1
                    },
                )  # fmt: skip
                figures.append(figure)
    return figures
