"""Bias of cold items, those that training lacks, fitted to the validation part."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from twotower.arrays.types import Codes, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Scorer
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower

log = logging.getLogger(__name__)

MIN_POSITIVES = 50
"""Validation positives of cold items below which a bias is not told from chance."""
STAND_INS = 0.1
"""Share of the known items that stand for cold ones where validation has too few positives of these."""
LOWEST, HIGHEST, STEP = -2.0, 3.0, 0.5
"""Biases that are tried first, in standard deviations of a user's scores."""
FINER = (0.25, 0.125)
"""Steps beside the best of them."""
MAX_BEYOND = 8
"""Steps beyond the outermost."""
PAIRS = 256
"""Validation pairs whose users' scores give the standard deviation."""


def fit_cold_item_bias(
    model: TwoTower,
    dataset: Dataset,
    scorer: Callable[[SideTensors | None], Scorer],
    score: Callable[[Scorer], float],
    context: DistributedContext,
    seed: int,
) -> None:
    """Overwrite the bias of the items whose id reads as unknown with the one whose validation score is highest.

    Where validation has fewer than MIN_POSITIVES positives of such items, as in a random split, a share of the known items reads as
    unknown during the fit. Where these have too few as well, or histories tell them from cold items, nothing changes, with a line in
    the log. `scorer` returns the scores of these items, or of the data's own for None, by the present weights, and `score` their
    validation metric, higher is better; all ranks call both.
    """
    field, items, of = model.cold_items.field, None, "cold items"
    assert field is not None
    if (n := _positives(dataset, field, np.array([UNKNOWN]))) < MIN_POSITIVES:
        codes = np.asarray(dataset.items.columns[field.name])
        known = np.unique(codes[codes != UNKNOWN])
        stand_ins = np.random.default_rng(seed).permutation(known)[: int(len(known) * STAND_INS)]
        alike = not any(f.history or f.computes for f in dataset.schema.tower("item"))
        if not alike or _positives(dataset, field, stand_ins) < MIN_POSITIVES:
            log.warning(
                f"model.cold_item_bias fits nothing: {n} validation positives are of items that training lacks, and {MIN_POSITIVES} are "
                "needed; the bias stays 0"
            )
            return
        items, of = (
            _without_ids(dataset, field, stand_ins, model.log_temperature.device),
            f"{len(stand_ins)} items that read as cold ones",
        )
    first = scorer(items)
    spread = context.broadcast(_spread(first, dataset) if context.is_main else 0.0)

    def of_bias(bias: float) -> float:
        _write(model, bias)
        return score(scorer(items))

    _write(model, chosen := best_bias(of_bias, spread))
    log.info(
        f"bias of cold items: {chosen:.2f}, by validation and {of}; the standard deviation of a user's scores is {spread:.2f}"
    )


def best_bias(score: Callable[[float], float], spread: float) -> float:
    """Return the bias of the highest score: of multiples of `spread` from LOWEST to HIGHEST, then of those beyond while the outermost is the
    best, at last of finer ones beside it. Of equal ones it is the nearest to 0."""
    tried = dict[float, float]()

    def best_with(*more: float) -> float:
        tried.update({value: score(value * spread) for value in more if value not in tried})
        return max(tried, key=lambda value: (tried[value], -abs(value)))

    best = best_with(*np.arange(LOWEST, HIGHEST + STEP / 2, STEP).tolist())
    for _ in range(MAX_BEYOND):
        if min(tried) < best < max(tried):
            break
        best = best_with(best + (STEP if best > 0 else -STEP))
    for step in FINER:
        best = best_with(best - step, best + step)
    return best * spread


def _positives(dataset: Dataset, field: InputField, codes: Shaped[Codes, "_"]) -> int:
    """Return the number of validation positives of items with some codes of their ids."""
    pairs = dataset.pairs_of(VALIDATION)
    of_pairs = np.asarray(dataset.items.columns[field.name])[pairs.item[pairs.positive]]
    return int(np.isin(of_pairs, codes).sum())


def _without_ids(dataset: Dataset, field: InputField, codes: Shaped[Codes, "_"], device: torch.device) -> SideTensors:
    """Return the items with the unknown code in place of some codes of their ids."""
    side = dataset.items.by_version()
    column = np.asarray(side.columns[field.name]).copy()
    column[np.isin(column, codes)] = UNKNOWN
    without = replace(side, columns={**side.columns, field.name: column})
    return SideTensors(without, dataset.encoders.fields("item"), device)


def _spread(scorer: Scorer, dataset: Dataset) -> float:
    """Return the standard deviation of a user's scores over all items, a mean over users of the validation part."""
    rows = dataset.part_indices(VALIDATION)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PAIRS)).astype(int)]
    return float(scorer.catalogue_scores(dataset.pairs.user[rows], rows).double().std(1).mean())


def _write(model: TwoTower, bias: float) -> None:
    with torch.no_grad():
        model.cold_items.values[UNKNOWN] = bias
