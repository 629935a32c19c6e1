"""A carrier of one's own: a number through a hidden layer, and the feature that asks for it.

    { kind = "mykinds.carriers:Curved", name = "price", side = "item" }

A feature names its carrier in its `InputField`. Only `build` imports torch: the server imports this file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from twotower.arrays.types import Floats, Ints, Shaped
from twotower.features.field import InputField
from twotower.features.numeric import Numeric, NumericEncoder
from twotower.model.inputs.carrier import Carrier
from twotower.model.inputs.gather import RowSource

if TYPE_CHECKING:
    from torch import nn

    from twotower.onnx.builder import GraphBuilder


class Curve(Carrier):
    """Numbers x through a hidden layer of ReLUs: V relu(W x + a) + b."""

    def feed(self, rows: RowSource, field: InputField) -> Shaped[Floats, "U n"]:
        return rows.dense(field.name)

    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        return g.input(name, np.float32, ["U", field.length])

    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Shaped[Floats, "n length"]:
        return rng.standard_normal((n, field.length)).astype(np.float32)

    def build(self, field: InputField) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(field.length, 16), nn.ReLU(), nn.Linear(16, field.width))


class CurvedEncoder(NumericEncoder):
    def field(self, name: str, width: int) -> InputField:
        found = super().field(name, width)
        return found if self.buckets else replace(found, kind=Curve.kind)


class Curved(Numeric):
    """A number whose effect is a curve, such as that of a price or an age; `numeric` draws a straight line."""

    encoder = CurvedEncoder

    def fit(self, series: pl.Series, counts: Ints) -> CurvedEncoder:
        return CurvedEncoder(**super().fit(series, counts).model_dump())
