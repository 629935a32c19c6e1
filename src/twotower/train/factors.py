"""Vectors of all users and items of a model, block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors
from twotower.features.schema import SIDES
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.two_tower import TwoTower, evaluation_mode


def model_factors(model: TwoTower, users: SideTensors, items: SideTensors, block: int = 65_536) -> Factors:
    """Return the vectors of all rows of both sides, `block` rows at a time, in evaluation mode."""
    with evaluation_mode(model):
        return Factors(_all_vectors(model.user_vectors, users, block), _all_vectors(model.item_vectors, items, block))


def factors_before(model: TwoTower, dataset: Dataset, part: int) -> Factors:
    """Return the vectors of all users and items from the data before `part` (see `Dataset.side_before`)."""
    device = next(model.parameters()).device
    users, items = (
        SideTensors(dataset.side_before(side, part), dataset.encoders.fields(side), device) for side in SIDES
    )
    return model_factors(model, users, items)


def _all_vectors(tower: Callable[..., Tensor], side: SideTensors, block: int) -> Tensor:
    out: Tensor | None = None
    for start in range(0, side.n, block):
        rows = np.arange(start, min(start + block, side.n))
        vectors = tower(side.take(rows))
        if out is None:
            out = vectors.new_empty((side.n, vectors.shape[1]))
        out[start : start + len(rows)] = vectors  # concatenating blocks at the end would take twice the memory
    assert out is not None
    return out
