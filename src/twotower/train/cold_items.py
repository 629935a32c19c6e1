"""Bias of cold items, those that training lacks, fitted to the validation part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from twotower.arrays.types import Bools, Codes, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.moments import ContextFactors, VersionFactors
from twotower.features.values import UNKNOWN
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower
from twotower.scorers.choices import BLOCK_SCORES, later_items

log = logging.getLogger(__name__)

MIN_POSITIVES = 50
"""Validation positives of cold items below which a bias is not distinguished from chance."""
STAND_INS = 0.1
"""Share of the known items that stand for cold ones where validation has too few positives of these."""
LOWEST, HIGHEST = -2.0, 3.0
"""Biases that are tried first, in standard deviations of a user's scores."""
STEPS = (0.5, 0.25, 0.125)
"""Steps between them, and from the best of them."""
MAX_STEPS = 8
"""Steps of one size from the best of them at most."""
CLOSE = 0.01
"""Share of the score of validation by its own cold items that a bias by items which stand for them may cost."""
PAIRS = 256
"""Validation pairs whose users' scores give the standard deviation."""


@dataclass(frozen=True)
class ColdItems:
    """Items of an unknown id on validation: those that it has, or known items that stand for them."""

    rows: Shaped[Bools, "rows"]
    """True for their rows of the items `by_version`."""
    which: Shaped[Bools, "items"]
    inputs: SideTensors | None
    """All items, of which those that stand for cold ones read as unknown. None: the data's own."""

    def __str__(self) -> str:
        return f"{self.which.sum()} known items that read as cold ones" if self.inputs else "cold items"


def cold_items(model: TwoTower, dataset: Dataset, seed: int, stand_in: bool = True) -> ColdItems | str:
    """Return the items that tell the bias of cold ones on validation, or why there are none.

    An item that the test part alone has is none unless the split is in no order: it is not there yet. Where validation
    has fewer than MIN_POSITIVES positives of cold items, as in a random split, a share of the known items reads as
    unknown and stands for them, unless `stand_in` is False."""
    codes, own = _codes_and_items(model, dataset)
    cold = _rows_of_cold_items(model, dataset)
    which = _of_items(dataset, own, cold)
    if (n := _positives(dataset, which)) >= MIN_POSITIVES:
        return ColdItems(cold, which, None)
    if not stand_in:
        return f"cold items have {n} of the {MIN_POSITIVES} validation positives that are needed"
    known = np.unique(codes[codes != UNKNOWN])
    cold = np.isin(codes, np.random.default_rng(seed).permutation(known)[: int(len(known) * STAND_INS)])
    which = _of_items(dataset, own, cold)
    reason, field, side = (
        f"known items that read so have {_positives(dataset, which)}",
        model.cold_items.field,
        dataset.items.by_version(),
    )
    assert field is not None
    if any(f.history or f.computes for f in dataset.schema.tower("item")):
        reason = "histories or statistics of the items tell known ones from them"
    elif _positives(dataset, which) >= MIN_POSITIVES:
        columns = side.columns | {field.name: np.where(cold, UNKNOWN, codes).astype(codes.dtype)}
        fields = dataset.encoders.fields("item")
        return ColdItems(cold, which, SideTensors(replace(side, columns=columns), fields, model.log_temperature.device))
    return f"cold items have {n} of the {MIN_POSITIVES} validation positives that are needed, and {reason}"


def fit_cold_item_bias(
    model: TwoTower,
    dataset: Dataset,
    scorer: Callable[[SideTensors | None], Factors | ContextFactors],
    score: Callable[[Scorer], float],
    context: DistributedContext,
    seed: int,
) -> None:
    """Overwrite the bias of the items whose id reads as unknown with the one whose validation score is highest.

    Where nothing tells it (`cold_items`), nothing changes, with a line in the log. `scorer` returns the scores of these
    items, or of the data's own for None, and `score` their validation metric, higher is better; all ranks call both. A
    bias by items that stand for cold ones costs validation no more than CLOSE by the cold items that it has.
    """
    cold = cold_items(model, dataset, seed)
    if isinstance(cold, str):
        log.warning(f"model.cold_item_bias fits nothing, and the bias stays 0: {cold}")
        return
    found = scorer(cold.inputs)
    if cold.inputs is not None:  # no cold item is in a history, or popular
        without = (a.without(cold.which) if isinstance(a, SparseScores) else a for a in found.added)
        found = replace(found, added=tuple(without))
    spread = context.broadcast(spread_of_scores(found, dataset) if context.is_main else 0.0)
    if not spread > 0:
        log.warning("model.cold_item_bias fits nothing, and the bias stays 0: each user scores all items alike")
        return
    of_bias = _score_of_bias(found, cold.rows, score)
    bias, *others = best_biases(of_bias, spread)
    if cold.inputs is not None and (own := _rows_of_cold_items(model, dataset)).any():
        of_own = _score_of_bias(scorer(None), own, score)
        least = of_own(0.0) - CLOSE * abs(of_own(0.0))
        bounded = next(one for one in (bias, *others, 0.0) if not one or of_own(one) >= least)
        if bounded != bias:
            log.info(
                f"bias of cold items: {bias:.2f} is best by {cold}, and costs validation more than {CLOSE:.0%}, as "
                f"hardly anybody takes the items without a row there are; {bounded:.2f} in its place"
            )
            bias = bounded
    with torch.no_grad():
        model.cold_items.values[UNKNOWN] = bias
    log.info(
        f"bias of cold items: {bias:.2f}, the standard deviation of a user's scores is {spread:.2f}; by {cold} the "
        f"monitored metric of validation is {abs(of_bias(bias)):.4f}, without the bias {abs(of_bias(0.0)):.4f}"
    )


def _score_of_bias(
    found: Factors | ContextFactors, rows: Shaped[Bools, "rows"], score: Callable[[Scorer], float]
) -> Callable[[float], float]:
    """Return the score of validation as a function of a bias of some rows of the items."""
    raised = torch.from_numpy(rows).to(found.items.device)

    @cache
    def of_bias(bias: float) -> float:
        vectors = found.items.clone()
        vectors[:, -1] += bias * raised
        return score(replace(found, items=vectors))

    return of_bias


def best_biases(score: Callable[[float], float], spread: float) -> list[float]:
    """Return biases, the one of the highest score first: multiples of `spread` from LOWEST to HIGHEST, and more by ever
    smaller steps from the best one while it gets better. Of equal ones it is the nearest to 0."""
    tried = dict[float, float]()

    def best_of(more: Iterable[float]) -> float:
        tried.update({value: score(value * spread) for value in more if value not in tried})
        return _ranked(tried)[0]

    best = best_of(np.arange(LOWEST, HIGHEST + STEPS[0] / 2, STEPS[0]).tolist())
    for step in STEPS:
        for _ in range(MAX_STEPS):
            before, best = best, best_of((best - step, best + step))
            if best == before:
                break
    return [value * spread for value in _ranked(tried)]


def _ranked(scores: dict[float, float]) -> list[float]:
    return sorted(scores, key=lambda value: (-scores[value], abs(value)))


def _codes_and_items(model: TwoTower, dataset: Dataset) -> tuple[Shaped[Codes, "rows"], Shaped[Ints, "rows"]]:
    """Return the code of the id and the item of each row of the items `by_version`."""
    field, side = model.cold_items.field, dataset.items.by_version()
    assert field is not None
    own: Ints = np.arange(len(side)) if side.owners is None else side.owners
    return np.asarray(side.columns[field.name]), own


def _rows_of_cold_items(model: TwoTower, dataset: Dataset) -> Shaped[Bools, "rows"]:
    """Return True for rows of an unknown id, but of `later_items`."""
    codes, own = _codes_and_items(model, dataset)
    cold: Bools = (codes == UNKNOWN) & ~later_items(dataset)[own]
    return cold


def _of_items(dataset: Dataset, items: Shaped[Ints, "n"], rows: Shaped[Bools, "n"]) -> Shaped[Bools, "items"]:
    """Return True for the items of some rows `by_version`."""
    out = np.zeros(len(dataset.items), bool)
    out[items[rows]] = True
    return out


def _positives(dataset: Dataset, items: Shaped[Bools, "items"]) -> int:
    """Return the number of validation positives of some items."""
    pairs = dataset.pairs_of(VALIDATION)
    return int(items[pairs.item[pairs.positive]].sum())


def spread_of_scores(found: Factors | ContextFactors, dataset: Dataset) -> float:
    """Return the standard deviation of a user's products over all items, a mean over users of the validation part."""
    scorer = VersionFactors.of_part(replace(found, added=()), dataset, VALIDATION)
    rows = dataset.part_indices(VALIDATION)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), PAIRS)).astype(int)]
    users, size = dataset.pairs.user[rows], max(1, BLOCK_SCORES // len(dataset.items))
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    each = [scorer.catalogue_scores(users[some], rows[some]).std(1) for some in blocks]
    return float(torch.cat(each).double().mean())
