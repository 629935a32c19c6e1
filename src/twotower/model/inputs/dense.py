"""Carrier `dense`: numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.types import Floats, Shaped
from twotower.features.field import InputField
from twotower.model.inputs.carrier import Carrier

if TYPE_CHECKING:
    from torch import nn

    from twotower.model.inputs.gather import RowSource
    from twotower.onnx.builder import GraphBuilder


class DenseCarrier(Carrier):
    """Numbers x, projected: W x + b.

    Use it for an encoder that returns a fixed number of values a row.
    """

    kind = "dense"
    label = "dense"

    def feed(self, rows: RowSource, field: InputField) -> Shaped[Floats, "U n"]:
        return rows.dense(field.name)

    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        return g.input(name, np.float32, ["U", field.length])

    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Shaped[Floats, "n length"]:
        return rng.standard_normal((n, field.length)).astype(np.float32)

    def build(self, field: InputField) -> nn.Linear:
        from torch import nn

        return nn.Linear(field.length, field.width)
