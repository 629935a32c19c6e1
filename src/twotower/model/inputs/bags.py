"""Bags of codes in both orders, for training."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged, stable_order
from twotower.model.inputs.carriers import Array, Bag


def bag_in_both_orders(ragged: Ragged, table_rows: int) -> Bag[Array]:
    """Return the bags of all rows, whose codes are below `table_rows`."""
    order = stable_order(ragged.values)
    code_offsets = np.zeros(table_rows + 1, np.int32)
    np.cumsum(np.bincount(ragged.values, minlength=table_rows), out=code_offsets[1:])
    row = np.repeat(np.arange(len(ragged), dtype=np.int32), ragged.lengths)
    return Bag(ragged.values, ragged.offsets.astype(np.int32), row[order], code_offsets)
