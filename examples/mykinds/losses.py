"""A loss of one's own: focal softmax, as `loss = Focal(gamma=2)` in Python, or in TOML

[loss]
kind = "mykinds.losses:Focal"
gamma = 2

A contrastive loss is written in plain torch, `rows`; its gradient follows. `shifts` says what is added to the logits
first, here the log-q correction, so that sampled candidates stand for the catalogue.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32, I64
from twotower.train.losses.loss import Columns, ContrastiveLoss, Shifts


class Focal(ContrastiveLoss):
    """Softmax cross-entropy that gives little weight to positives which are found already.

        -(1 - p)^gamma log p,    p = exp(s_p) / sum_c exp(s_c)

    Use it where a few popular items are easy and most others are not (Lin et al. 2017, "Focal Loss for Dense Object
    Detection", section 3).
    """

    gamma: float = Field(2.0, ge=1, description="Exponent of the focus. Higher: less weight of easy positives.")

    def shifts(self, draws: F32[Tensor, "C"], log_q: F32[Tensor, "C"]) -> Shifts:
        """Return the log-q correction, by which a candidate that is drawn often counts less."""
        return Shifts(candidates=draws.log() - log_q, positives=-log_q)

    def rows(self, logits: F32[Tensor, "b C"], positive: I64[Tensor, "b 1"], columns: Columns) -> F32[Tensor, "b"]:
        """Return the loss of each row."""
        log_p = logits.log_softmax(1).gather(1, positive)[:, 0]
        return -((-log_p.expm1()) ** self.gamma) * log_p
