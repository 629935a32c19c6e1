"""Biases of the items by their popularity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower


def log_popularity(dataset: Dataset) -> F32[Tensor, "items"]:
    """Return log(1 + n) of each item's training positives n, 0 for items whose id is unknown."""
    counts = np.bincount(dataset.pairs.item[dataset.positives_by_user.values], minlength=len(dataset.items))
    return torch.from_numpy(np.where(_codes(dataset) != UNKNOWN, np.log1p(counts), 0.0).astype(np.float32))


def add_biases(model: TwoTower, dataset: Dataset, biases: F32[Tensor, "items"]) -> None:
    """Add a bias to each item whose id is known, through the row of its id."""
    feature, codes = dataset.schema.id_feature("item"), torch.from_numpy(_codes(dataset))
    assert feature is not None
    known = codes != UNKNOWN
    with torch.no_grad():
        rows = model.item_bias.rows_of(feature.name)
        rows[codes[known].to(rows.device), 0] += biases[known].to(rows)


def has_biases(model: TwoTower, dataset: Dataset) -> bool:
    """Return True if each item of a known id has a bias of its own."""
    return model.config.bias and dataset.schema.id_feature("item") is not None


def _codes(dataset: Dataset) -> Shaped[Ints, "items"]:
    """Return the code of each item's id."""
    feature = dataset.schema.id_feature("item")
    assert feature is not None
    return np.asarray(dataset.items.columns[feature.name]).astype(np.int64)
