"""Items that share a feature's value with the positive, as per-positive negatives."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged
from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError, did_you_mean
from twotower.features.values import UNKNOWN


class AttributeNegatives:
    """Draws from the items that share a value of an item feature, such as a city within which users choose, with the
    positive."""

    def __init__(self, dataset: Dataset, name: str, n: int) -> None:
        """Prepare draws of `n` items for each positive. Raises ConfigError if `name` is no item feature with codes."""
        self._n = n
        self._values, self._by_value = _attribute_maps(dataset, name)

    def draw(self, item: Codes, rng: np.random.Generator) -> Ints:
        """Draw item rows (B, n) that share one random value with each positive `item` (B,); -1 for none."""
        value = self._values.draw_neighbours(item, 1, rng)[:, 0]
        drawn = self._by_value.draw_neighbours(np.maximum(value, 0), self._n, rng)
        return np.where(value[:, None] >= 0, drawn, -1)


def _attribute_maps(dataset: Dataset, name: str) -> tuple[Ragged, Ragged]:
    """Return item -> its codes of a feature, and code -> the items that have it. Raises ConfigError without such a feature."""
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
