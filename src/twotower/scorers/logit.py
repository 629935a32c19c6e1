"""Conditional logit: weights of scores by which what users took is most likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.arrays.types import F32, F64, Floats, Shaped

FREE = 10.0
"""Prior standard deviation of weights that the rows alone determine, in standard deviations of the scores."""
BLOCK_NUMBERS = 2**24
"""Numbers of a block of rows in a Newton step."""
STEPS, HALVINGS = 30, 20
"""Maximum Newton steps, and halvings of one."""
ENOUGH = 1e-6
"""Decrease of the loss per row below which the steps end."""
LEAST = 0.01
"""Minimum standard deviation of the weighted first scores, which a score that others stand for would not have."""


class Column(NamedTuple):
    """Scores of the candidates of each row, which get a weight."""

    name: str
    scores: F32[Tensor, "n k"]
    deviation: float
    """Prior standard deviation of the weight; negative: in standard deviations of the scores."""


class TermWeights(NamedTuple):
    """Weights of the terms after the first, whose weight is 1."""

    factors: list[float]
    spreads: list[float]
    """Standard deviations of the weighted scores of each, in that of the first term; negative for a negative factor."""
    loss: float
    """Negative logarithm of the likelihood and the prior."""


def fit_weights(
    terms: Sequence[F32[Tensor, "n k"]], offsets: Shaped[Floats, "n k"], deviations: Sequence[float]
) -> TermWeights | None:
    """Return the weights of terms under which the first candidate of each row is most likely, by Newton's method.

    `deviations` are prior standard deviations of the factors of all terms, or negative in standard deviations of the
    scores. None if the first term is the same for all items. Its weight is at least LEAST."""
    x, of = torch.stack([*terms], 2), torch.from_numpy(offsets)
    counts = torch.isfinite(of)
    mean = (x * counts[:, :, None]).sum(1, keepdim=True) / counts.sum(1)[:, None, None]
    x = (x - mean).masked_fill_(~counts[:, :, None], 0.0)
    scale = (x.double().square().sum((0, 1)) / counts.sum()).sqrt()
    used = scale > 0
    if not used[0]:
        return None
    x /= scale.where(used, 1.0).float()
    prior = torch.tensor(deviations, dtype=torch.float64)
    precision = torch.where(prior > 0, prior * scale, -prior).where(used, 1.0) ** -2
    found, loss = _newton(x, of, precision)
    if not found[0] > LEAST:
        found, loss = _newton(x, of, precision, LEAST)
    spreads = (found[1:] / found[0]).where(used[1:], 0.0)
    return TermWeights((spreads * scale[0] / scale[1:].where(used[1:], 1.0)).tolist(), spreads.tolist(), loss)


def _newton(
    x: F32[Tensor, "n k T"], offsets: F32[Tensor, "n k"], precision: F64[Tensor, "T"], first: float | None = None
) -> tuple[F64[Tensor, "T"], float]:
    """Return the weights w of the least loss, and the loss: the cross-entropy of the first candidates by the logits
    x . w + offsets, plus the sum of `precision` w^2 / 2. The loss is convex. `first` holds the first weight."""
    w, free = torch.zeros(x.shape[2], dtype=torch.float64), slice(first is not None, None)
    if first is not None:
        w[0] = first
    n = max(1, BLOCK_NUMBERS // x[0].numel())
    blocks = [(x[first : first + n], offsets[first : first + n]) for first in range(0, len(x), n)]

    def loss_of(w: F64[Tensor, "T"]) -> float:
        total = sum(float((b @ w.float() + o).logsumexp(1).double().sum() - (b[:, 0] @ w.float()).double().sum())
                    for b, o in blocks)  # fmt: skip
        return total + float((precision * w.square()).sum()) / 2

    loss = loss_of(w)
    for _ in range(STEPS):
        gradient, hessian = precision * w, torch.diag(precision)
        for b, o in blocks:
            p = (b @ w.float() + o).softmax(1)
            expected = torch.bmm(p[:, None], b)[:, 0]
            gradient += (expected - b[:, 0]).double().sum(0)
            flat = b.flatten(0, 1)
            hessian += (flat.T @ (p.flatten()[:, None] * flat) - expected.T @ expected).double()
        step = torch.zeros_like(w)
        step[free] = torch.linalg.solve(hessian[free, free], gradient[free])
        before, size = loss, 1.0
        for _ in range(HALVINGS):
            if (loss := loss_of(w - size * step)) <= before:
                break
            size /= 2
        else:
            return w, before
        w = w - size * step
        if before - loss < ENOUGH * len(x):
            break
    return w, loss
