"""Binary cross-entropy of labelled pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from twotower.arrays.types import Float
from twotower.train.losses.loss import PointwiseLoss


class Bce(PointwiseLoss):
    """Binary cross-entropy of labelled pairs: the weighted mean of their log loss.

        -sum_i w_i [y_i log p_i + (1 - y_i) log(1 - p_i)] / sum_i w_i,    p_i = sigmoid(logit_i)

    Use it if dislikes are observed or negatives are sampled as pairs: its probabilities are calibrated to the weights.
    It is the pointwise loss of neural collaborative filtering (He et al. 2017, section 3.1.1, equation 7).
    """

    kind = "bce"

    def __call__(
        self,
        logits: Float[Tensor, "B"],
        labels: Float[Tensor, "B"],
        weights: Float[Tensor, "B"],
        total_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        each = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
        return each / (total_weight or weights.sum())
