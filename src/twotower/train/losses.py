"""Logits -> loss.

Two pictures. Labelled pairs: one logit each, `binary_cross_entropy`. A contest: B positives against C candidates that
all of them share and H of their own each; `contest` makes the logits (B, C + H) a block of rows at a time and takes
the gradient in the same pass, so that nothing of B x C is kept.

The losses of a contest turn a block of logits (b, C) into the sum of its rows' losses and overwrite the logits by
their gradient. A logit of -inf is a candidate that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from twotower.config import LossConfig
from twotower.train.candidates import Candidates


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, total: float = 0.0) -> Tensor:
    """Weighted mean over B pairs of -log p(label), p = sigmoid(logit), or with `total` their part in the mean of pairs of
    that weight; a scalar.

    Use it when negatives are observed or sampled as pairs: its probabilities are calibrated to the weights.
    """
    each = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    return each / (total or weights.sum())


def mimic(augmented: Tensor, vectors: Tensor, n: int = 0) -> Tensor:
    """Mean over P positives, or their part in the mean over `n`, of the squared distance of one side's augmented vector (P, D) to the other side's vector
    (P, D), which gets no gradient; 0 without positives (DAT, Yu et al. 2021, section 3.2, its positive terms: the
    others are constant)."""
    return (augmented - vectors.detach()).square().sum() / max(1, n or len(augmented))


def softmax(logits: Tensor, positive: Tensor) -> Tensor:
    """Sum over rows of -log p(positive), p the softmax of the row; `positive` (b, 1) names a column.

    With every item as a candidate it is the full softmax; with sampled ones and their log-q subtracted it estimates
    it (Bengio and Senecal 2008; Yi et al. 2019 for two towers). Use it to rank a catalogue.
    """
    largest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, positive)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    value = (total.log() + largest - chosen).sum()
    logits.mul_(total.reciprocal())
    logits.scatter_add_(1, positive, torch.full_like(chosen, -1.0))
    return value


def bpr(logits: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Sum over rows of the weighted mean over candidates of -log sigmoid(positive - candidate); `weight` (C,) or
    (b, C) (Rendle et al. 2009, section 4.1). Use it when only the order matters and candidates are few."""
    chosen = logits.gather(1, positive)
    weight = _negative_weights(logits, positive, weight)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    above = chosen - logits
    value = -(weight * logsigmoid(above)).sum()
    gradient = weight * torch.sigmoid(-above)
    logits.copy_(gradient).scatter_(1, positive, -gradient.sum(1, keepdim=True))
    return value


def gbce(logits: Tensor, positive: Tensor, weight: Tensor, power: float) -> Tensor:
    """Sum over rows of [-power log sigmoid(positive) - sum of weight log(1 - sigmoid(candidate))] / (1 + weights).

    `power` 1 is binary cross-entropy over candidates; below 1 it undoes the overconfidence that sampling few of many
    negatives gives (gSASRec, Petrov and Macdonald 2023, section 5). Use it with uniform candidates.
    """
    chosen = logits.gather(1, positive)
    weight = _negative_weights(logits, positive, weight)
    over = 1 / (1 + weight.sum(1, keepdim=True))
    value = (weight * softplus(logits) * over).sum()
    value = value - (power * logsigmoid(chosen) * over).sum()
    logits.sigmoid_().mul_(weight * over).scatter_(1, positive, -power * torch.sigmoid(-chosen) * over)
    return value


def _negative_weights(logits: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """(b, C) weights of the candidates that are there, the positive's 0."""
    return (weight * (logits > -torch.inf)).scatter(1, positive, 0.0)


def gbce_beta(calibration: float, candidates: float, n_items: int) -> float:
    """The exponent of gBCE: 1 - t (1 - alpha), alpha the share of the other items that are among the `candidates`
    (equation 12)."""
    return 1 - calibration * (1 - min(1.0, candidates / max(1, n_items - 1)))


def contrastive_loss(
    users: Tensor,
    items: Tensor,
    candidates: Candidates,
    config: LossConfig,
    n_items: int,
    margin: float = 0.0,
    dtype: torch.dtype = torch.float32,
    of: int = 0,
) -> Tensor:
    """Mean loss of B positives, or their part in the mean `of` so many; a scalar.

    `users` (B, D) are the positives' users, `items` (I + M, D) the vectors of `candidates.items` and of its memory.
    A mined candidate must score `margin` below the positive, if margin > 0. `dtype` is the precision of the products.
    """
    c = candidates
    shared = items[: len(c.log_q)] if not len(c.memory) else torch.cat([items[: c.shared], items[len(c.items) :]])
    own = None
    if c.own.shape[1]:
        rows = items.index_select(0, c.own.clamp(min=0).flatten()).view(*c.own.shape, -1)
        own = torch.einsum("bd,bhd->bh", users, rows).masked_fill(c.own < 0, -torch.inf)
    correction = c.log_q if config.log_q else torch.zeros_like(c.log_q)
    offset = c.drawn.log() - correction
    drawn = torch.cat([c.drawn, torch.ones(c.own.shape[1], device=c.drawn.device)])

    def score(logits: Tensor, own: Tensor | None, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        positive = c.positive[rows, None]
        chosen = logits.gather(1, positive)
        if config.kind == "softmax":
            logits += offset
        c.ban(logits, rows)
        if own is not None and margin and c.hard:
            own[:, -c.hard :].masked_fill_(own[:, -c.hard :] > chosen - margin, -torch.inf)
        logits.scatter_(1, positive, chosen - (correction[positive] if config.kind == "softmax" else 0.0))
        if own is not None and config.kind == "softmax":
            # An own candidate is as sure to be there as the positive, and is measured against it alone.
            own -= correction[positive]
        everything = logits if own is None else torch.cat([logits, own], 1)
        if config.kind == "softmax":
            value = softmax(everything, positive)
        elif config.kind == "bpr":
            value = bpr(everything, positive, drawn)
        else:
            power = gbce_beta(config.calibration, float((drawn > 0).sum()), n_items)
            value = gbce(everything, positive, drawn, power)
        n = logits.shape[1]
        return value, everything[:, :n], None if own is None else everything[:, n:]

    loss: Tensor = _ContrastiveLoss.apply(users, shared, own, score, dtype, of or len(users))  # type: ignore[no-untyped-call]
    return loss


Score = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor, Tensor | None]]
BLOCK = 2**21
"""Logits that are held at a time."""


class _ContrastiveLoss(torch.autograd.Function):
    """The mean of a loss over rows of logits users @ shared.T, block by block, gradients in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, shared: Tensor, own: Tensor | None, score: Score, dtype: torch.dtype, n: int
    ) -> Tensor:
        u, v = users.to(dtype), shared.to(dtype)
        vt = v.T.contiguous()
        du, dv = torch.empty_like(users), torch.zeros(shared.shape, dtype=torch.float32, device=shared.device)
        down = None if own is None else torch.empty_like(own)
        total = torch.zeros((), dtype=torch.float64 if users.device.type == "cpu" else torch.float32)
        total = total.to(users.device)
        step = max(16, BLOCK // len(shared))
        for start in range(0, len(users), step):
            rows = slice(start, start + step)
            logits = (u[rows] @ vt).float()
            mine = None if own is None else own[rows].clone()
            value, gradient, own_gradient = score(logits, mine, rows)
            total += value
            g = gradient.to(dtype)
            du[rows] = g @ v
            dv += g.T @ u[rows]
            if down is not None and own_gradient is not None:
                down[rows] = own_gradient
        ctx.save_for_backward(du.div_(n), dv.div_(n), *([] if down is None else [down.div_(n)]))
        return (total / n).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        du, dv, *down = ctx.saved_tensors
        g = grads[0]
        return du * g, dv * g, down[0] * g if down else None, None, None, None
