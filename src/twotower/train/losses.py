"""Logits -> loss: pure functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over B pairs of -log p(label), p = sigmoid(logit); a scalar.

    Use it when negatives are observed or sampled as pairs: its probabilities are calibrated to the weights.
    """
    each = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    return each / weights.sum()
