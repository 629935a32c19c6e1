"""Losses: logits to a scalar, in two families.

Pointwise: one logit for each labelled (user, item) pair, `binary_cross_entropy`.

Contrastive: B positives, each against C shared negatives, which are columns of all rows, and H negatives of its own.
`contrastive.contrastive_loss` makes the logits (B, C + H) one block of rows at a time and computes the gradient in the same pass, so
that the full matrix is never held.

Each contrastive loss (`softmax`, `bpr`, `gbce`) takes a block of logits (b, C + H), returns the sum of its rows' losses,
and overwrites the logits with their gradient. A logit of -inf is a candidate that is left out.

`mimic` is an extra term beside either family, for models with augmented vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from twotower.section import Section


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
