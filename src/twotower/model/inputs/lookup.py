"""Carrier `lookup`: one code a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.types import Codes, Ints, Shaped
from twotower.features.field import InputField
from twotower.model.inputs.carrier import Carrier

if TYPE_CHECKING:
    from twotower.model.inputs.gather import RowSource
    from twotower.onnx.builder import GraphBuilder


class LookupCarrier(Carrier):
    """One code a row: a row of the embedding table.

    Use it for an encoder that returns one category a row.
    """

    kind = "lookup"
    label = "lookup"
    has_table = True
    is_stacked = True

    def feed(self, rows: RowSource, field: InputField) -> Shaped[Ints, "U 1"]:
        return rows.lookup((field.name,))

    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        return g.input(name, np.int64, ["U", 1])

    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Shaped[Codes, "n"]:
        codes: Ints = np.r_[0, field.rows - 1, rng.integers(0, field.rows, n - 2)]
        return codes.astype(np.int32)
