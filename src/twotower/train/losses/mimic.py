"""Adaptive-mimic loss of augmented vectors, beside any loss."""

from __future__ import annotations

from torch import Tensor

from twotower.arrays.types import Float


def mimic(
    augmented: Float[Tensor, "P D"],
    vectors: Float[Tensor, "P D"],
    total_weight: float = 0.0,
    weights: Float[Tensor, "P"] | None = None,
) -> Float[Tensor, ""]:
    """Return the weighted mean over P positives of |a - v|^2; 0 without positives. Without `weights` all are 1.

    `augmented` are augmented vectors of one side, `vectors` the other side's vectors, which get no gradient. With
    `total_weight` the P positives are a part of a batch of that weight, and the result is their part of its mean.

    Use it with `augment = true` on both towers, to let each side's augmented vector learn from the other tower. The
    adaptive-mimic mechanism of the dual augmented two-tower model (DAT, Yu et al. 2021, section 3.2): its terms of positive
    pairs; those of negative pairs are constant.
    """
    distances = (augmented - vectors.detach()).square()
    if weights is None:
        return distances.sum() / max(1, total_weight or len(augmented))
    total = total_weight or float(weights.sum())
    return (distances * weights[:, None]).sum() / (total or 1.0)
