"""Figures of a run's report that part a number: recall by popularity and by activity, calibration, the spectrum of vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Bools, Float, Ints, Shaped
from twotower.data.splits import TEST
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.ranking import EvaluationQueries, evaluation_queries
from twotower.reports.figure import BLUE, GREY, ORANGE, Figure, Series

if TYPE_CHECKING:
    from twotower.runs import Run

MAX_RANKED, MAX_ROWS, MAX_SQUARE = 5_000, 5_000, 1_000
"""Users that are ranked, vectors whose spectrum is taken, and those of more numbers than the last; of more a fixed random sample."""
DECILES, BINS = 10, 20


def recalls(run: Run, factors: Scorer) -> list[Figure]:
    """Return recall by the popularity of the items looked for, and by the activity of the users. Hits and targets of a group are
    added over its users, so that groups of few targets do not jump; empty without a user to rank."""
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
        (f"{low:,}–{high:,}" if low < high else f"{low:,}", recall)
        for low, high, recall in (_user_recall(queries, hit, activity, group) for group in groups(activity, DECILES))
    ]
    return [
        _bars(f"recall@{k} by popularity of the item", "training interactions of the items", by_item),
        _bars(f"recall@{k} by activity of the user", "training interactions of the users", by_user),
    ]


def groups(numbers: Shaped[Ints, "n"], n_groups: int) -> list[Bools]:
    """Return masks of at most `n_groups` groups of rising numbers, of about the same size; equal numbers share a group."""
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, n_groups + 1), method="lower"))
    places = np.searchsorted(edges[1:-1], numbers, side="right") if len(edges) > 2 else np.zeros(len(numbers), np.int64)
    return [found for n in range(max(1, len(edges) - 1)) if (found := places == n).any()]


def item_recall(
    queries: EvaluationQueries, best: Shaped[Ints, "Q K"], hit: Shaped[Bools, "Q K"], popularity: Shaped[Ints, "I"], group: Bools
) -> tuple[str, float]:  # fmt: skip
    """Return the range of popularity of a group of items, and the share of the targets among them that are hit; NaN without one."""
    low, high = int(popularity[group].min()), int(popularity[group].max())
    n_targets = int(queries.count_targets(group).sum())
    hits = int((hit & group[best]).sum())
    return f"{low:,}–{high:,}" if low < high else f"{low:,}", hits / n_targets if n_targets else float("nan")


def _user_recall(
    queries: EvaluationQueries, hit: Shaped[Bools, "Q K"], activity: Shaped[Ints, "Q"], group: Bools
) -> tuple[int, int, float]:
    return (
        int(activity[group].min()),
        int(activity[group].max()),
        float(hit[group].sum() / queries.n_targets[group].sum()),
    )


def calibration(run: Run, factors: Scorer) -> list[Figure]:
    """Return the share of positives by predicted probability, for a loss of labelled pairs; empty for another, and for test
    pairs of one class."""
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
    """Return the share of variance along each principal direction of the user and item vectors; empty for vectors that are not
    one a row."""
    if not isinstance(factors, Factors):
        return []
    figure = Figure("Share of variance by principal direction", "direction", whole=True, y_tick="1e{:.3g}")
    for name, rows, color in (("users", factors.users, BLUE), ("items", factors.items, ORANGE)):
        shares = variance_shares(rows)
        logarithms = [math.log10(share) for share in shares]
        figure.series.append(Series(name, list(range(1, len(shares) + 1)), logarithms, color, "line"))
    return [figure]


def variance_shares(rows: Float[Tensor, "n D"]) -> list[float]:
    """Return the shares of variance along the principal directions, falling, without those that are none."""
    kept = MAX_ROWS if rows.shape[1] <= MAX_SQUARE else MAX_SQUARE
    if len(rows) > kept:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:kept].to(rows.device)]
    centred = rows.double().cpu() - rows.double().cpu().mean(0)
    products = centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred
    squares = torch.linalg.eigvalsh(products).flip(0).clamp(min=0)
    shares = squares / squares.sum().clamp(min=1e-300)
    return [float(share) for share in shares if share > 1e-9]


def _bars(title: str, y: str, found: list[tuple[str, float]]) -> Figure:
    names, values = zip(*found, strict=True)
    return Figure(title, y=y, rows=names, series=[Series("", values, names, BLUE, "bar")])
