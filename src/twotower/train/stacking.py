"""Stacking: weights of the terms of a score, and of baselines added to them, fitted to the labels of the validation
part (Wolpert 1992, Stacked Generalization)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from twotower.arrays.types import F64, Codes, Doubles, Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.evaluation.baselines import baseline_of
from twotower.features.side import SIDES, SideName
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower

log = logging.getLogger(__name__)

PRIOR_DEVIATION = 0.5
"""Standard deviation of a weight about its present value before any label is seen, so that few labels move it
little."""
ITERATIONS = 100


class _Baseline(NamedTuple):
    """A term of the score that training rows give: a number for each row of a side, 0 of an unknown id."""

    name: str
    side: SideName
    values: Shaped[Doubles, "n"]


class StackWeights(NamedTuple):
    """Weights of the model's terms, then of the baselines by name, and the global bias."""

    terms: list[float]
    baselines: dict[str, float]
    bias: float


def stack(
    model: TwoTower, scores: Callable[[], Shaped[Floats, "n"]], dataset: Dataset, context: DistributedContext
) -> StackWeights | None:
    """Overwrite the weights of the model's terms, and with biases the global bias and the priors of the ids, with those
    under which the validation labels are most likely.

    Return them. `scores` returns the scores of the validation pairs by the model's present weights, on rank 0; all
    ranks call it. Labels of one class change nothing, with a line in the log.
    """
    weights = model.term_weights
    present, columns = weights.clone(), list[Shaped[Floats, "n"]]()
    with torch.no_grad():
        for number in range(len(weights) + 1):  # the last by no term: the global bias
            weights.copy_(torch.arange(len(weights), device=weights.device) == number)
            columns.append(np.array(scores(), np.float32))
        weights.copy_(present)
    found = context.broadcast(_fit(columns, present, model, dataset) if context.is_main else None)
    if found is None:
        log.warning(
            "model.stacking fits nothing: the validation part holds labels of one class; each weight stays as it is"
        )
        return None
    write(model, dataset, found)
    return found


def write(model: TwoTower, dataset: Dataset, found: StackWeights) -> None:
    """Overwrite the weights of the model's terms, and with biases the global bias and the priors of the ids, which are
    the weighted baselines of a dataset."""
    with torch.no_grad():
        model.term_weights.copy_(torch.tensor(found.terms))
        if not model.config.bias:
            return
        model.global_bias.fill_(found.bias)
        baselines = _baselines(model, dataset)
        for side in SIDES:
            values = np.zeros(len(model.prior(side).values), np.float32)
            for b in baselines:
                if b.side == side:
                    values[_codes(model, dataset, side)] += np.float32(found.baselines.get(b.name, 0.0)) * b.values
            model.prior(side).values.copy_(torch.from_numpy(values))


def _fit(
    columns: list[Shaped[Floats, "n"]], present: Shaped[Tensor, "T"], model: TwoTower, dataset: Dataset
) -> StackWeights | None:
    """Return the fit to the labels of validation; None if the pairs of a weight above 0 are of one class."""
    pairs, has_bias = dataset.pairs_of(VALIDATION), model.config.bias
    each = np.asarray(pairs.weight, np.float64)
    labels = np.asarray(pairs.positive, np.float64)
    if not 0 < (counted := labels[each > 0]).sum() < len(counted):
        return None
    each = each / each[each > 0].mean()  # the pull to the present weights is that of a number of rows
    bias = float(columns[-1][0])
    baselines = _baselines(model, dataset) if has_bias else []
    terms = [column.astype(np.float64) - bias for column in columns[:-1]]
    terms += [b.values[pairs.user if b.side == "user" else pairs.item] for b in baselines]
    before = np.r_[present.double().cpu().numpy(), np.zeros(len(baselines))]
    found, bias = fit_weights(np.stack(terms, 1), labels, each, before, bias if has_bias else None)
    names = [f"pair {n}" for n in range(len(model.pairs))] + ["user biases", "item biases"] * has_bias
    names += [b.name for b in baselines]
    log.info("weights by validation: " + ", ".join(f"{name} {w:.2f}" for name, w in zip(names, found, strict=True)))
    n = len(present)
    return StackWeights(found[:n], {b.name: w for b, w in zip(baselines, found[n:], strict=True)}, bias)


def _baselines(model: TwoTower, dataset: Dataset) -> list[_Baseline]:
    """Return the baselines of a report (`evaluation/baselines.py`) as terms, of the sides whose ids the model reads:
    the logarithm of an item's popularity, in positives of the mean weight, and the ridge means of users and items in
    the unit of a logit at the mean of the labels. An unknown item is as popular as known ones are in the mean, and an
    unknown id has the mean of all rows."""
    train, sums = dataset.train, dataset.item_positive_counts.astype(np.float64)
    share = sums.sum() / float(train.weight.sum(dtype=np.float64))
    if not 0 < share < 1:
        return []
    means, slope = baseline_of("bias", dataset), share * (1 - share)  # slope of a probability by its logit
    codes = {side: _codes(model, dataset, side) for side in SIDES}
    found = list[_Baseline]()
    if (of_items := codes["item"]) is not None and (known := of_items != UNKNOWN).any():
        popularity = np.log1p(sums * (len(dataset.positive_indices) / sums.sum()))
        found.append(_Baseline("popularity", "item", popularity - popularity[known].mean()))
    if codes["user"] is not None:
        found.append(_Baseline("means of users", "user", (means.users[:, 0].double().numpy() - share) / slope))
    if codes["item"] is not None:
        found.append(_Baseline("means of items", "item", means.items[:, 1].double().numpy() / slope))
    return [b._replace(values=np.where(codes[b.side] == UNKNOWN, 0.0, b.values)) for b in found]


def _codes(model: TwoTower, dataset: Dataset, side: SideName) -> Shaped[Codes, "n"] | None:
    """Return the codes of the ids of a side's rows, None if the model does not read them."""
    field = model.prior(side).field
    codes: Codes | None = np.asarray(dataset.side(side).columns[field.name]) if field else None
    return codes


def fit_weights(
    terms: Shaped[Doubles, "n T"],
    labels: Shaped[Doubles, "n"],
    weights: Shaped[Doubles, "n"],
    present: Shaped[Doubles, "T"],
    bias: float | None,
) -> tuple[list[float], float]:
    """Return factors f >= 0 of the terms and a bias b that minimise the weighted log loss of sigmoid(terms . f + b),
    plus |f - present|^2 / (2 PRIOR_DEVIATION^2). The search of b begins with `bias`; None holds it at 0."""
    x, y, w, prior = (torch.from_numpy(np.ascontiguousarray(a)) for a in (terms, labels, weights, present))
    roots = prior.clamp(min=1e-4).sqrt().requires_grad_()  # their squares are not below 0, and 0 has no gradient
    intercept = torch.tensor(bias or 0.0, dtype=torch.float64, requires_grad=bias is not None)
    optimizer = torch.optim.LBFGS(
        [roots] if bias is None else [roots, intercept],
        max_iter=ITERATIONS,
        tolerance_grad=1e-10,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        factors = roots.square()
        likelihood = binary_cross_entropy_with_logits(x @ factors + intercept, y, w, reduction="sum")
        value: F64[Tensor, ""] = (likelihood + (factors - prior).square().sum() / (2 * PRIOR_DEVIATION**2)) / len(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return roots.detach().square().tolist(), intercept.item()
