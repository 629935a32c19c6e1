"""Items that share a feature's value with the positive, as per-positive negatives."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, did_you_mean
from twotower.features.values import UNKNOWN
from twotower.train.negatives.source import PerPositiveSampler, PerPositiveSource, Positives


class AttributeNegatives(PerPositiveSource):
    """Items that share a random value of an item feature with the positive.

    Use it if users choose within a value, such as a city: `negatives.attribute = "city"`.
    """

    kind = "attribute"
    shorthand = "feature"

    feature: str = Field(
        min_length=1,
        description="Item feature, such as a city, of which candidates share a value with the positive.",
    )
    n: int = Field(1, ge=1, le=100_000, description="Number of items per positive.")

    def check(self, dataset: Dataset) -> None:
        if dataset.items.versioned:
            raise ConfigError(
                "negatives.attribute draws items by their newest values, and with schema.valid_from a positive sees "
                "items as they were at its own time; leave it out"
            )

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> PerPositiveSampler:
        return _AttributeSampler(*_attribute_maps(dataset, self.feature), self.n)


class _AttributeSampler(PerPositiveSampler):
    def __init__(self, values: Ragged, by_value: Ragged, n: int) -> None:
        self._values, self._by_value, self._n = values, by_value, n

    def draw(self, positives: Positives, rng: np.random.Generator) -> Shaped[Ints, "B n"]:
        value = self._values.draw_neighbours(positives.item, 1, rng)[:, 0]
        drawn = self._by_value.draw_neighbours(np.maximum(value, 0), self._n, rng)
        return np.where(value[:, None] >= 0, drawn, -1)


def _attribute_maps(dataset: Dataset, name: str) -> tuple[Ragged, Ragged]:
    """Return item -> its codes of a feature, and code -> its items. Raises ConfigError without such a feature."""
    columns = dataset.items.columns
    coded = [n for n, c in columns.items() if isinstance(c, Ragged) or (c.ndim == 1 and c.dtype == np.int32)]
    if name not in coded:
        raise ConfigError(
            f"negatives.attribute: no item feature '{name}' with values to share{did_you_mean(name, coded)} "
            f"(allowed: {', '.join(coded)})"
        )
    column, n = columns[name], len(dataset.items)
    if isinstance(column, Ragged):
        owner, codes = column.owners, column.values
    else:
        owner, codes = np.arange(n), column.astype(np.int32, copy=False)
    values = Ragged.from_pairs(owner[codes != UNKNOWN], codes[codes != UNKNOWN], n)
    items = values.owners
    shuffled = np.random.default_rng(0).permutation(len(items))
    by_value = Ragged.from_pairs(values.values[shuffled], items[shuffled], int(values.values.max(initial=0)) + 1)
    return values, by_value
