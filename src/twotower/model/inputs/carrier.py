"""Protocol of the carriers: the ways of an encoded column into a tower. Torch is not needed, but for `build`."""

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
    """Way of a field into a tower. A field names its carrier by `kind`; a carrier has no options.

    A carrier of one's own without a table gives an array (U, …) of float32 and the module that embeds it."""

    has_table: ClassVar[bool] = False
    """True for codes, which read the rows of an embedding table."""
    is_stacked: ClassVar[bool] = False
    """True for one code a row: the codes of all such fields stand side by side, in `Inputs.lookup`."""
    label: ClassVar[str] = "field"
    """Word before the index of a field in the names of inputs, tables and modules."""

    @abstractmethod
    def feed(self, rows: RowSource, field: InputField) -> Shaped[Array, "U *_"]:
        """Return the values of U rows as an array, the input of an exported tower."""

    @abstractmethod
    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        """Add the input `name` of that array to an ONNX graph; return its name."""

    @abstractmethod
    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Column:
        """Return a random column of `n` rows, for the comparison of an exported tower with its model."""

    def build(self, field: InputField) -> nn.Module:
        """Return a fresh module from the tensor of `feed` to vectors (U, field.width), of a carrier without a table. A module
        that is not of torch is a `LoweredModule`."""
        raise NotImplementedError
