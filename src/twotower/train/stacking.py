"""Stacking: weights of the terms of a score, fitted to the labels of the validation part (Wolpert 1992, Stacked Generalization)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from twotower.arrays.types import F64, Doubles, Floats, Shaped
from twotower.data.dataset import Dataset
from twotower.data.splits import VALIDATION
from twotower.distributed import DistributedContext
from twotower.model.two_tower import TwoTower

log = logging.getLogger(__name__)

PRIOR_DEVIATION = 0.5
"""Standard deviation of a weight about its present value before any label is seen, so that few labels move it little."""
ITERATIONS = 100
MIN_WEIGHT = 1e-3
"""Weight below which a term is as good as left out."""


def stack(
    model: TwoTower, scores: Callable[[], Shaped[Floats, "n"]], dataset: Dataset, context: DistributedContext
) -> None:
    """Overwrite the weights of the model's terms, and its global bias, with those under which the validation labels are most likely.

    `scores` returns the scores of the validation pairs by the model's present weights, on rank 0; all ranks call it. Labels of one
    class change nothing, with a line in the log.
    """
    weights = model.term_weights
    present, columns = weights.clone(), list[Shaped[Floats, "n"]]()
    with torch.no_grad():
        for number in range(len(weights) + 1):  # the last by no term: the global bias
            weights.copy_(torch.arange(len(weights), device=weights.device) == number)
            columns.append(np.array(scores(), np.float32))
        weights.copy_(present)
    found = context.broadcast(_fitted(columns, present, dataset, model.config.bias) if context.is_main else None)
    if found is None:
        log.warning(
            "model.stacking fits nothing: the validation part holds labels of one class; each weight stays as it is"
        )
        return
    fitted, bias = found
    with torch.no_grad():
        weights.copy_(torch.tensor(fitted))
        if model.config.bias:
            model.global_bias.fill_(bias)
    names = [f"pair {n}" for n in range(len(model.pairs))] + (
        ["user biases", "item biases"] if model.config.bias else []
    )
    if max(fitted) < MIN_WEIGHT:
        log.warning(
            "model.stacking finds no term of the score that tells the labels of the validation part apart: all weights are as good as 0"
        )
    log.info("weights by validation: " + ", ".join(f"{name} {w:.2f}" for name, w in zip(names, fitted, strict=True)))


def _fitted(
    columns: list[Shaped[Floats, "n"]], present: Shaped[Tensor, "T"], dataset: Dataset, has_bias: bool
) -> tuple[list[float], float] | None:
    """Return the weights of the terms and the global bias; None if the pairs of a weight above 0 are of one class."""
    pairs = dataset.pairs_of(VALIDATION)
    each = np.ones(len(pairs)) if pairs.weight is None else np.asarray(pairs.weight, np.float64)
    labels = np.asarray(pairs.positive, np.float64)
    if not 0 < (counted := labels[each > 0]).sum() < len(counted):
        return None
    bias = float(columns[-1][0])
    terms = np.stack(columns[:-1], 1).astype(np.float64) - bias
    return fit_weights(terms, labels, each, present.double().cpu().numpy(), bias if has_bias else None)


def fit_weights(
    terms: Shaped[Doubles, "n T"],
    labels: Shaped[Doubles, "n"],
    weights: Shaped[Doubles, "n"],
    present: Shaped[Doubles, "T"],
    bias: float | None,
) -> tuple[list[float], float]:
    """Return factors f >= 0 of the terms and a bias b that minimise the weighted log loss of sigmoid(terms . f + b), plus
    |f - present|^2 / (2 PRIOR_DEVIATION^2). The search of b begins with `bias`; None holds it at 0."""
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
