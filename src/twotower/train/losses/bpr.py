"""Bayesian personalized ranking."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from twotower.arrays.types import F32, I64
from twotower.train.losses.loss import Columns, ContrastiveLoss


class Bpr(ContrastiveLoss):
    """Bayesian personalized ranking: the log loss of the order of the positive and a candidate.

        sum_c w_c [-log sigmoid(s_p - s_c)] / sum_c w_c        over the negatives c, drawn w_c times

    Use it if only the order of items matters and candidates are few (Rendle et al. 2009, section 4.1, BPR-Opt; its
    regularization is `train.weight_decay`).
    """

    kind = "bpr"

    def rows(self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"], columns: Columns) -> F32[Tensor, "b"]:
        difference = logits.gather(1, positive) - logits
        return -(self._shares(logits, positive, columns, torch.ones_like(logits[:, :1])) * logsigmoid(difference)).sum(
            1
        )

    def block(
        self,
        logits: F32[Tensor, "b C"],
        positive: I64[Tensor, "b 1"],
        columns: Columns,
        weights: F32[Tensor, "b 1"],
    ) -> F32[Tensor, ""]:
        chosen = logits.gather(1, positive)
        weight = self._shares(logits, positive, columns, weights)
        difference = chosen - logits
        value = -(weight * logsigmoid(difference)).sum()
        gradient = weight * torch.sigmoid(-difference)
        logits.copy_(gradient).scatter_(1, positive, -gradient.sum(1, keepdim=True))
        return value

    def _shares(
        self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"], columns: Columns, sums: F32[Tensor, "b 1"]
    ) -> F32[Tensor, "b C"]:
        """Return the weights of negatives, with these sums, above 0, in each row."""
        weight = columns.weights(logits, positive)
        return weight / (weight.sum(1, keepdim=True).clamp(min=1e-12) / sums)
