"""Generalized binary cross-entropy over candidates."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from twotower.arrays.types import F32, I64
from twotower.train.losses.loss import Columns, ContrastiveLoss


class Gbce(ContrastiveLoss):
    """Binary cross-entropy over candidates, calibrated for their sampling.

        -[ beta log sigmoid(s_p) + sum_c w_c log(1 - sigmoid(s_c)) ] / (1 + sum_c w_c)        over negatives c, drawn
        w_c times beta = 1 - t (1 - alpha),    alpha: share of the other items that are candidates

    Use it with uniform negatives: a beta below 1 undoes the overconfidence of a model trained on few of many negatives
    (gSASRec, Petrov and Macdonald 2023, section 5, equations 6 and 12).
    """

    kind = "gbce"
    research = ("calibration",)
    calibration: float = Field(
        0.75, ge=0, le=1, description="Calibration t (gSASRec). 0: plain BCE over candidates. 1: full calibration."
    )

    def beta(self, share: float) -> float:
        """Return the exponent of the positive's probability, in (0, 1], for a share of the items as candidates."""
        return 1 - self.calibration * (1 - share)

    def rows(self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"], columns: Columns) -> F32[Tensor, "b"]:
        weight = columns.weights(logits, positive)
        chosen = self.beta(columns.share) * logsigmoid(logits.gather(1, positive))[:, 0]
        return ((weight * softplus(logits)).sum(1) - chosen) / (1 + weight.sum(1))

    def block(
        self,
        logits: F32[Tensor, "b C"],
        positive: I64[Tensor, "b 1"],
        columns: Columns,
        weights: F32[Tensor, "b 1"],
    ) -> F32[Tensor, ""]:
        beta = self.beta(columns.share)
        chosen = logits.gather(1, positive)
        weight = columns.weights(logits, positive)
        norm = weights / (1 + weight.sum(1, keepdim=True))
        value = (weight * softplus(logits) * norm).sum()
        value = value - (beta * logsigmoid(chosen) * norm).sum()
        logits.sigmoid_().mul_(weight * norm).scatter_(1, positive, -beta * torch.sigmoid(-chosen) * norm)
        return value
