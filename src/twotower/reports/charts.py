"""Figures of a run's report, from learning curves to the spectrum of its vectors."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Bools, Float, Ints, Shaped
from twotower.data.splits import TEST
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.metrics.metric import Prominence
from twotower.evaluation.ranking import EvaluationQueries, evaluation_queries
from twotower.features.side import SIDES
from twotower.model.inputs.side_tensors import SideTensors
from twotower.reports.figure import BLUE, GREY, ORANGE, Figure, Series

if TYPE_CHECKING:
    from twotower.runs import Run

MAX_GATE_ROWS = 20_000
"""Rows of each side in the chart of gates; more rows are sampled."""
MAX_RANKED, MAX_ROWS, MAX_SQUARE = 5_000, 5_000, 1_000
"""Users in the charts of recall; vectors in a spectrum, narrower and wider than MAX_SQUARE. More are sampled."""
DECILES, BINS = 10, 20


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
                figure = Figure(name, "weight", rows=tower.field_names, x_range=(0, 1))
                ends = low.tolist(), high.tolist()
                figure.series.append(Series("", mean.tolist(), tower.field_names, BLUE, "bar", *ends))
                figures.append(figure)
    return figures


def recalls(run: Run, factors: Scorer) -> list[Figure]:
    """Return recall by the popularity of the targets and by the activity of the users; empty without a user to rank.

    Recall of a group is its hits divided by its targets, summed over users, which steadies groups of few targets."""
    dataset, k = run.dataset, run.config.evaluation.k[0]
    train = dataset.train
    settings = run.config.evaluation.model_copy(update={"max_users": run.config.evaluation.max_users or MAX_RANKED})
    queries = evaluation_queries(dataset, TEST, settings)
    if not len(queries.users):
        return []
    best = queries.top_k(factors, k)
    hit = queries.hits(best)
    popularity = np.bincount(train.item, minlength=len(dataset.items))
    activity = np.bincount(train.user, minlength=len(dataset.users))[queries.users]
    by_item = [item_recall(queries, best, hit, popularity, group) for group in groups(popularity, DECILES)]
    by_user = [
        (_range(activity[group]), float(hit[group].sum() / queries.n_targets[group].sum()))
        for group in groups(activity, DECILES)
    ]
    return [
        _bars(f"recall@{k} by popularity of the item", "training interactions of the items", by_item),
        _bars(f"recall@{k} by activity of the user", "training interactions of the users", by_user),
    ]


def groups(numbers: Shaped[Ints, "n"], n_groups: int) -> list[Bools]:
    """Return masks of at most `n_groups` groups of rising numbers and similar size; equal numbers share a group."""
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, n_groups + 1), method="lower"))
    places = np.searchsorted(edges[1:-1], numbers, side="right") if len(edges) > 2 else np.zeros(len(numbers), np.int64)
    return [found for n in range(max(1, len(edges) - 1)) if (found := places == n).any()]


def item_recall(
    queries: EvaluationQueries, best: Shaped[Ints, "Q K"], hit: Shaped[Bools, "Q K"], popularity: Shaped[Ints, "I"],
    group: Bools,
) -> tuple[str, float]:  # fmt: skip
    """Return the range of popularity of a group of items, and the recall of its targets; NaN without a target."""
    n_targets = int(queries.count_targets(group).sum())
    hits = int((hit & group[best]).sum())
    return _range(popularity[group]), hits / n_targets if n_targets else float("nan")


def _range(numbers: Shaped[Ints, "n"]) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low:,}–{high:,}" if low < high else f"{low:,}"


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


def spectra(factors: Scorer) -> list[Figure]:
    """Return the share of variance along each principal direction of users and items; empty without fixed vectors."""
    if not isinstance(factors, Factors):
        return []
    figure = Figure("Share of variance by principal direction", "direction", whole=True, y_tick="1e{:.3g}")
    for name, rows, color in (("users", factors.users, BLUE), ("items", factors.items, ORANGE)):
        shares = variance_shares(rows)
        logarithms = [math.log10(share) for share in shares]
        figure.series.append(Series(name, list(range(1, len(shares) + 1)), logarithms, color, "line"))
    return [figure]


def variance_shares(rows: Float[Tensor, "n D"]) -> list[float]:
    """Return the shares of variance along the principal directions, falling, without zeros."""
    n = MAX_ROWS if rows.shape[1] <= MAX_SQUARE else MAX_SQUARE
    if len(rows) > n:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n].to(rows.device)]
    centred = rows.double().cpu() - rows.double().cpu().mean(0)
    products = centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred
    squares = torch.linalg.eigvalsh(products).flip(0).clamp(min=0)
    shares = squares / squares.sum().clamp(min=1e-300)
    return [float(share) for share in shares if share > 1e-9]


def _bars(title: str, y: str, found: list[tuple[str, float]]) -> Figure:
    names, values = zip(*found, strict=True)
    return Figure(title, y=y, rows=names, series=[Series("", values, names, BLUE, "bar")])
