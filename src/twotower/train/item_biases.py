"""Biases of the items by their popularity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import F32
from twotower.data.dataset import Dataset
from twotower.features.values import UNKNOWN
from twotower.model.two_tower import TwoTower


def log_popularity(dataset: Dataset) -> F32[Tensor, "items"]:
    """Return log(1 + n) of each item's training positives n."""
    counts = np.bincount(dataset.pairs.item[dataset.positives_by_user.values], minlength=len(dataset.items))
    return torch.from_numpy(np.log1p(counts).astype(np.float32))


def add_biases(model: TwoTower, dataset: Dataset, biases: F32[Tensor, "items"]) -> None:
    """Add a bias to each item whose id is known, through the row of its id."""
    feature = dataset.schema.id_feature("item")
    if feature is None:
        return
    codes = torch.from_numpy(np.asarray(dataset.items.columns[feature.name]).astype(np.int64))
    known = codes != UNKNOWN
    with torch.no_grad():
        rows = model.item_bias.rows_of(feature.name)
        rows[codes[known].to(rows.device), 0] += biases[known].to(rows)
