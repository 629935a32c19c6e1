"""Protocol of the carriers: the ways of an encoded column into a tower. Only `build` needs torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from twotower.arrays.ragged import Column
from twotower.arrays.types import Array, Shaped
from twotower.features.field import InputField
from twotower.kinds import Kind

if TYPE_CHECKING:
    from torch import nn

    from twotower.model.inputs.gather import RowSource
    from twotower.onnx.builder import GraphBuilder


class Carrier(Kind):
    """Way of a field into a tower, named by `kind` in the field, without options.

    A carrier of one's own without a table returns arrays (U, …) of float32 and the module that embeds them."""

    has_table: ClassVar[bool] = False
    """True for codes of rows of an embedding table."""
    is_stacked: ClassVar[bool] = False
    """True for one code a row. The codes of all such fields are the columns of `Inputs.lookup`."""
    label: ClassVar[str] = "field"
    """Word before the index of a field in the names of inputs, tables and modules."""

    @abstractmethod
    def feed(self, rows: RowSource, field: InputField) -> Shaped[Array, "U *_"]:
        """Return the values of U rows as an array, the input of an exported tower."""

    @abstractmethod
    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        """Add the input `name` for this array to an ONNX graph; return its name."""

    @abstractmethod
    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Column:
        """Return a random column of `n` rows, to compare an exported tower with its model."""

    def build(self, field: InputField) -> nn.Module:
        """Return a fresh module from the tensor of `feed` to vectors (U, field.width), for a carrier without a table.

        A module of one's own is a `LoweredModule`."""
        raise NotImplementedError
