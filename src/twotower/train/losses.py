"""Losses: logits to a scalar, in two families.

Pointwise: one logit for each labelled (user, item) pair, `binary_cross_entropy`.

Contrastive: B positives, each against C shared negatives, which are columns of all rows, and H negatives of its own.
`contrastive_loss` makes the logits (B, C + H) one block of rows at a time and computes the gradient in the same pass, so
that the full matrix is never held.

Each contrastive loss (`softmax`, `bpr`, `gbce`) takes a block of logits (b, C + H), returns the sum of its rows' losses,
and overwrites the logits with their gradient. A logit of -inf is a candidate that is left out.

`mimic` is an extra term beside either family, for models with augmented vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from twotower.section import Section
from twotower.train.candidates import Candidates

MAX_BLOCK_LOGITS = 2**21
"""Logits that `contrastive_loss` holds at a time, by default: 8 MiB of float32."""


class LossConfig(Section):
    """The loss over logits."""

    kind: Literal["bce", "softmax", "gbce", "bpr"] = Field(
        "bce",
        description="Loss. bce: pointwise, over labelled pairs. softmax, gbce and bpr: contrastive, each positive "
        "against candidates.",
    )
    log_q: bool = Field(
        True,
        description="Correction of each candidate's logit by the log of its sampling rate (softmax; Yi et al. 2019).",
    )
    calibration: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Calibration t of gbce (gSASRec). 0: plain BCE over candidates. 1: fully calibrated.",
    )
    mimic: float = Field(
        0.0,
        ge=0,
        description="Weight of the adaptive-mimic loss: squared distance of augmented vectors to the other tower's. "
        "0: off.",
    )


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, total_weight: float = 0.0) -> Tensor:
    """Return the weighted mean over B labelled pairs of the log loss, a scalar.

        -sum_i w_i [y_i log p_i + (1 - y_i) log(1 - p_i)] / sum_i w_i,    p_i = sigmoid(logit_i)

    `logits`, `labels` (0 or 1) and `weights` are (B,). With `total_weight` the B pairs are a part of a larger batch of that
    weight, and the result is their part of its mean.

    Use it when dislikes are observed, or negatives are sampled as pairs: its probabilities are calibrated to the weights.
    The pointwise loss of neural collaborative filtering (He et al. 2017, section 3.1.1, equation 7).
    """
    each = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    return each / (total_weight or weights.sum())


def mimic(augmented: Tensor, vectors: Tensor, n: int = 0) -> Tensor:
    """Return the mean over P positives of |a - v|^2, a scalar; 0 without positives.

    `augmented` (P, D) are augmented vectors of one side, `vectors` (P, D) the other side's vectors, which get no gradient.
    With `n` the P positives are a part of n, and the result is their part of the mean.

    Use it with `augment = true` on both towers, to let each side's augmented vector learn from the other tower. The
    adaptive-mimic mechanism of the dual augmented two-tower model (DAT, Yu et al. 2021, section 3.2): its terms of positive
    pairs; those of negative pairs are constant.
    """
    return (augmented - vectors.detach()).square().sum() / max(1, n or len(augmented))


def softmax(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sum over rows of the cross-entropy of the positive, and overwrite the logits with its gradient.

        -log( exp(s_p) / sum_c exp(s_c) )

    `logits` (b, C); `positive` (b, 1) int64 is the column of each row's positive.

    Use it to rank a catalogue. With every item as a candidate it is the full softmax; with sampled candidates whose log-q
    is subtracted it is the sampled softmax, which estimates it (Bengio and Senecal 2008; for two towers with in-batch
    negatives Yi et al. 2019, section 3).
    """
    largest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, positive)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    value = (total.log() + largest - chosen).sum()
    logits.mul_(total.reciprocal())
    logits.scatter_add_(1, positive, torch.full_like(chosen, -1.0))
    return value


def bpr(logits: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over rows of the Bayesian personalized ranking loss, and overwrite the logits with its gradient.

        sum_c w_c [-log sigmoid(s_p - s_c)] / sum_c w_c        over the negatives c

    `logits` (b, C); `positive` (b, 1) int64, a column; `weight` (C,) or (b, C), such as the count of draws.

    Use it when only the order of items matters and candidates are few (Rendle et al. 2009, section 4.1, BPR-Opt, without
    its regularization, which is `train.weight_decay`).
    """
    chosen = logits.gather(1, positive)
    weight = _negative_weights(logits, positive, weight)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    difference = chosen - logits
    value = -(weight * logsigmoid(difference)).sum()
    gradient = weight * torch.sigmoid(-difference)
    logits.copy_(gradient).scatter_(1, positive, -gradient.sum(1, keepdim=True))
    return value


def gbce(logits: Tensor, positive: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Return the sum over rows of the generalized binary cross-entropy, and overwrite the logits with its gradient.

        -[ beta log sigmoid(s_p) + sum_c w_c log(1 - sigmoid(s_c)) ] / (1 + sum_c w_c)        over the negatives c

    `logits` (b, C); `positive` (b, 1) int64, a column; `weight` (C,) or (b, C), such as the count of draws; `beta` in
    (0, 1] is that of `gbce_beta`, and 1 is plain binary cross-entropy over candidates.

    Use it with uniform negatives: a beta below 1 undoes the overconfidence of a model trained on few of many negatives
    (gSASRec, Petrov and Macdonald 2023, section 5, equations 6 and 12).
    """
    chosen = logits.gather(1, positive)
    weight = _negative_weights(logits, positive, weight)
    norm = 1 / (1 + weight.sum(1, keepdim=True))
    value = (weight * softplus(logits) * norm).sum()
    value = value - (beta * logsigmoid(chosen) * norm).sum()
    logits.sigmoid_().mul_(weight * norm).scatter_(1, positive, -beta * torch.sigmoid(-chosen) * norm)
    return value


def gbce_beta(calibration: float, candidates: float, n_items: int) -> float:
    """Return the exponent of gBCE, 1 - t (1 - alpha), in (0, 1].

    t is the `calibration` in [0, 1], alpha the share of the other `n_items` - 1 items that are among the `candidates`
    (Petrov and Macdonald 2023, equation 12).
    """
    return 1 - calibration * (1 - min(1.0, candidates / max(1, n_items - 1)))


def _negative_weights(logits: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Return the weights (b, C) of the negatives: 0 for the positive and for candidates that are left out."""
    return (weight * (logits > -torch.inf)).scatter(1, positive, 0.0)


def contrastive_loss(
    users: Tensor,
    items: Tensor,
    candidates: Candidates,
    config: LossConfig,
    n_items: int,
    margin: float = 0.0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 0,
    max_block_logits: int = MAX_BLOCK_LOGITS,
) -> Tensor:
    """Return the mean loss of B positives against their candidates, a scalar.

    `users` (B, D) are the vectors of the positives' users; `items` (I + M, D) those of `candidates.items` and, after them,
    of the cross-batch memory. `n_items` is the size of the catalogue. A hard negative that scores within `margin` of the
    positive is left out, if `margin` > 0. `dtype` is that of the matrix products. With `batch_size` the B positives are a
    part of a batch of that size, and the result is their part of its mean. At most `max_block_logits` logits, but at least
    those of 16 rows, are held at a time.

    The softmax subtracts `log_q` from each candidate's logit (Yi et al. 2019, section 3) unless the config disables it. A
    candidate that was drawn n times counts n times.
    """
    c = candidates
    shared = items[: len(c.log_q)] if not len(c.memory_items) else torch.cat([items[: c.shared], items[len(c.items) :]])
    own = None
    if c.per_positive.shape[1]:
        vectors = items.index_select(0, c.per_positive.clamp(min=0).flatten()).view(*c.per_positive.shape, -1)
        own = torch.einsum("bd,bhd->bh", users, vectors).masked_fill(c.per_positive < 0, -torch.inf)
    correction = c.log_q if config.log_q else torch.zeros_like(c.log_q)
    offset = c.counts.log() - correction
    counts = torch.cat([c.counts, torch.ones(c.per_positive.shape[1], device=c.counts.device)])

    def block_loss(logits: Tensor, own: Tensor | None, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn a block of logits (b, C), and those of the rows' own negatives (b, H), into its loss and their gradients."""
        positive = c.positive[rows, None]
        chosen = logits.gather(1, positive)
        if config.kind == "softmax":
            logits += offset
        c.mask_excluded(logits, rows)
        if own is not None and margin and c.hard:
            own[:, -c.hard :].masked_fill_(own[:, -c.hard :] > chosen - margin, -torch.inf)
        logits.scatter_(1, positive, chosen - (correction[positive] if config.kind == "softmax" else 0.0))
        if own is not None and config.kind == "softmax":
            # A per-positive negative is as certain to be present as the positive, and competes with it alone.
            own -= correction[positive]
        row_logits = logits if own is None else torch.cat([logits, own], 1)
        if config.kind == "softmax":
            value = softmax(row_logits, positive)
        elif config.kind == "bpr":
            value = bpr(row_logits, positive, counts)
        else:
            beta = gbce_beta(config.calibration, float((counts > 0).sum()), n_items)
            value = gbce(row_logits, positive, counts, beta)
        n = logits.shape[1]
        return value, row_logits[:, :n], None if own is None else row_logits[:, n:]

    loss: Tensor = _ContrastiveLoss.apply(  # type: ignore[no-untyped-call]
        users, shared, own, block_loss, dtype, batch_size or len(users), max_block_logits
    )
    return loss


BlockLoss = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, Tensor, Tensor | None]]
"""(logits (b, C), own logits (b, H) or None, rows of the batch) -> the sum of their losses, and both gradients."""


class _ContrastiveLoss(torch.autograd.Function):
    """The mean over n rows of a loss of the logits users @ shared.T, block by block, with gradients from the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        shared: Tensor,
        own: Tensor | None,
        block_loss: BlockLoss,
        dtype: torch.dtype,
        n: int,
        max_block_logits: int,
    ) -> Tensor:
        u, v = users.to(dtype), shared.to(dtype)
        vt = v.T.contiguous()
        user_gradient = torch.empty_like(users)
        shared_gradient = torch.zeros(shared.shape, dtype=torch.float32, device=shared.device)
        own_gradient = None if own is None else torch.empty_like(own)
        total = torch.zeros((), dtype=torch.float64 if users.device.type == "cpu" else torch.float32)
        total = total.to(users.device)
        step = max(16, max_block_logits // len(shared))
        for start in range(0, len(users), step):
            rows = slice(start, start + step)
            logits = (u[rows] @ vt).float()
            own_logits = None if own is None else own[rows].clone()
            value, gradient, block_own_gradient = block_loss(logits, own_logits, rows)
            total += value
            g = gradient.to(dtype)
            user_gradient[rows] = g @ v
            shared_gradient += g.T @ u[rows]
            if own_gradient is not None and block_own_gradient is not None:
                own_gradient[rows] = block_own_gradient
        gradients = [user_gradient.div_(n), shared_gradient.div_(n)]
        ctx.save_for_backward(*gradients, *([] if own_gradient is None else [own_gradient.div_(n)]))
        return (total / n).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        user_gradient, shared_gradient, *own_gradient = ctx.saved_tensors
        g = grads[0]
        own = own_gradient[0] * g if own_gradient else None
        return user_gradient * g, shared_gradient * g, own, None, None, None, None
