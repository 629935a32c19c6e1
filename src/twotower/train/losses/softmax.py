"""Softmax cross-entropy of a positive among candidates."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from twotower.arrays.types import F32, I64
from twotower.train.losses.loss import Columns, ContrastiveLoss, Shifts


class Softmax(ContrastiveLoss):
    """Softmax cross-entropy of the positive among the candidates.

        -log( exp(s_p) / sum_c exp(s_c) )

    Use it to rank a catalogue. With every item as a candidate it is the full softmax; with sampled candidates whose
    log-q is subtracted it is the sampled softmax, which estimates it (Bengio and Senecal 2008; for two towers with
    in-batch negatives Yi et al. 2019, section 3). A candidate that was drawn n times counts n times.
    """

    kind = "softmax"
    log_q: bool = Field(
        True, description="Correction of each candidate's logit by the log of its sampling rate (Yi et al. 2019)."
    )

    def shifts(self, draws: F32[Tensor, "C"], log_q: F32[Tensor, "C"]) -> Shifts:
        """Return log n - log q for a candidate, and -log q for a positive.

        A row's own negatives are as certain to be present as its positive, so they get -log q of the positive too.
        """
        correction = log_q if self.log_q else torch.zeros_like(log_q)
        return Shifts(draws.log() - correction, -correction)

    def rows(self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"], columns: Columns) -> F32[Tensor, "b"]:
        return cross_entropy(logits, positive[:, 0], reduction="none")

    def block(
        self,
        logits: F32[Tensor, "b C"],
        positive: I64[Tensor, "b 1"],
        columns: Columns,
        weights: F32[Tensor, "b 1"],
    ) -> F32[Tensor, ""]:
        largest = logits.amax(1, keepdim=True)
        chosen = logits.gather(1, positive)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        rows = total.log() + largest - chosen
        logits.mul_(weights / total)
        logits.scatter_add_(1, positive, -weights)
        return (rows * weights).sum()
