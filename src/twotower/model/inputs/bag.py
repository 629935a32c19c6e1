"""Carrier `bag`, and bags: the flat codes of U rows, for poolings of whole rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.ragged import Ragged, offsets_of, stable_order
from twotower.arrays.types import Bools, Float, Ints, Rows, Shaped
from twotower.features.field import InputField
from twotower.model.inputs.carrier import Carrier
from twotower.model.inputs.code_layout import A, Arrays, CodeLayout, Padded, Recode

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.model.inputs.gather import RowSource
    from twotower.model.pooling.pooling import PoolingLayer
    from twotower.onnx.builder import GraphBuilder


class BagCarrier(Carrier):
    """Many codes a row: rows of the embedding table, pooled by the field's pooling.

    Use it for an encoder that returns a list of codes a row, such as tags or a history.
    """

    kind = "bag"
    label = "bag"
    has_table = True

    def feed(self, rows: RowSource, field: InputField) -> Shaped[Ints, "U T"]:
        return rows.padded(field)

    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        return g.input(name, np.int64, ["U", f"T_{name}"])

    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Ragged:
        """Return rows without codes, with one, with many, and with random numbers of codes."""
        lengths = np.r_[0, 1, 300, rng.integers(0, 40, n - 3)]
        offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
        return Ragged(rng.integers(0, field.rows, offsets[-1]).astype(np.int32), offsets)


_NO_ORDER = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Bag(CodeLayout[A]):
    """U rows of flat codes, by row for the forward pass, and by code for the backward pass.

    The arrays of the second order are empty if no backward pass follows."""

    values: A  # (L,) int32 codes, row after row
    offsets: A  # (U + 1,) int32
    rows_by_code: A  # (L,) int32 row numbers, code after code
    code_offsets: A  # (table rows + 1,) int32

    def flat(self: Bag) -> Shaped[Tensor, "L"]:
        return self.values.long()

    def recoded(self: Bag, recode: Recode, rows: int) -> Bag:
        values = recode(self.values).to(self.values.dtype)
        offsets = self.code_offsets.new_zeros(rows + 1)
        offsets[1:] = values.bincount(minlength=rows).cumsum(0)
        return Bag(values, self.offsets, self.rows_by_code, offsets)

    def numbered(self: Bag) -> Bag:
        places = self.offsets.new_ones(len(self.values) + 1).cumsum(0, dtype=self.offsets.dtype) - 1
        rows = self.offsets.new_ones(len(self.offsets) - 1).cumsum(0, dtype=self.offsets.dtype) - 1
        return Bag(places[:-1], self.offsets, rows.repeat_interleave(self.lengths), places)

    def pooled(self: Bag, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        return layer.pool_bag(table, self)

    def padded(self: Bag) -> Padded:
        n = self.lengths
        position = n.new_ones(max(1, int(n.max()) if len(n) else 1)).cumsum(0) - 1
        known = position < n[:, None]
        codes = self.values.new_full(known.shape, -1).long()
        codes[known] = self.values.long()
        return Padded(codes)

    @property
    def lengths(self: Bag) -> Shaped[Tensor, "U"]:
        """Number of codes of each row."""
        return self.offsets[1:] - self.offsets[:-1]


def bag_in_both_orders(ragged: Ragged, table_rows: int) -> Bag[Arrays]:
    """Return the bags of all rows. Codes are below `table_rows`."""
    order = stable_order(ragged.values)
    code_offsets = np.zeros(table_rows + 1, np.int32)
    np.cumsum(np.bincount(ragged.values, minlength=table_rows), out=code_offsets[1:])
    row = np.repeat(np.arange(len(ragged), dtype=np.int32), ragged.lengths)
    return Bag(ragged.values, ragged.offsets.astype(np.int32), row[order], code_offsets)


def bag_without_order(ragged: Ragged) -> Bag[Arrays]:
    """Return the bags of all rows, for a forward pass only."""
    return Bag(ragged.values, ragged.offsets.astype(np.int32), _NO_ORDER, _NO_ORDER)


def without_holes(ragged: Ragged, rows: Shaped[Rows, "U"], kept: Shaped[Bools, "L"]) -> Ragged:
    """Return some rows without the values that are not `kept`."""
    indices, lengths = ragged.indices(rows)
    keep = kept[indices]
    owners = np.repeat(np.arange(len(rows)), lengths)[keep]
    return Ragged(ragged.values[indices[keep]], offsets_of(np.bincount(owners, minlength=len(rows))))
