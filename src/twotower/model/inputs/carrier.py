"""Protocol of carriers: a carrier turns an encoded column into an input of a tower. Only `build` needs torch."""

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
    """Path of a field from its column into a tower. `InputField.kind` names it; it has no options.

    A user-defined carrier has no embedding table: `feed` returns an array (U, …) of float32, and `build` returns the
    module that turns it into vectors."""

    has_table: ClassVar[bool] = False
    """True if the values are codes, which are rows of an embedding table."""
    is_stacked: ClassVar[bool] = False
    """True if each row has one code. `Inputs.lookup` has a column of codes for each such field."""
    label: ClassVar[str] = "field"
    """Beginning of the names of inputs, tables and modules; the index of the field follows, as in `field0`."""

    @abstractmethod
    def feed(self, rows: RowSource, field: InputField) -> Shaped[Array, "U *_"]:
        """Return the values of U rows as an array, in the form that an exported tower takes."""

    @abstractmethod
    def declare(self, g: GraphBuilder, name: str, field: InputField) -> str:
        """Add the input `name`, of the form of the array of `feed`, to an ONNX graph; return the name."""

    @abstractmethod
    def sample(self, field: InputField, n: int, rng: np.random.Generator) -> Column:
        """Return a random column of `n` rows, on which an exported tower is compared with its model."""

    def build(self, field: InputField) -> nn.Module:
        """Return a new module that maps the tensor of `feed` to vectors (U, field.width).

        Only carriers without a table have it. A user-defined module must be a subclass of `LoweredModule`."""
        raise NotImplementedError
