"""Adaptive-mimic loss of augmented vectors, beside any loss."""

from __future__ import annotations

from torch import Tensor

from twotower.arrays.types import Float


def mimic(augmented: Float[Tensor, "P D"], vectors: Float[Tensor, "P D"], n: int = 0) -> Float[Tensor, ""]:
    """Return the mean over P positives of |a - v|^2; 0 without positives.

    `augmented` are augmented vectors of one side, `vectors` the other side's vectors, which get no gradient. With `n` the P
    positives are a part of n, and the result is their part of the mean.

    Use it with `augment = true` on both towers, to let each side's augmented vector learn from the other tower. The
    adaptive-mimic mechanism of the dual augmented two-tower model (DAT, Yu et al. 2021, section 3.2): its terms of positive
    pairs; those of negative pairs are constant.
    """
    return (augmented - vectors.detach()).square().sum() / max(1, n or len(augmented))
