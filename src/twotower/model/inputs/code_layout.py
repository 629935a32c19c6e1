"""Layout of the codes of U rows, many a row: tensors, or the numpy arrays (`Arrays`) that are made into tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Generic

from twotower.arrays.types import Array, Float, Shaped

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeVar

    from twotower.model.inputs.padded import Padded
    from twotower.model.pooling.pooling import PoolingLayer

    A = TypeVar("A", default=Tensor)
    B = TypeVar("B", default=Tensor)
else:
    from typing import TypeVar

    A, B = TypeVar("A"), TypeVar("B")

Arrays = Shaped[Array, "*_"]
"""A numpy array of a layout."""
Recode = Callable[["Tensor"], "Tensor"]
"""Map from codes (…) of a table to codes (…) of another."""


class CodeLayout(ABC, Generic[A]):
    """Frozen dataclass of arrays. Each layout has a method of `PoolingLayer`, which `pooled` calls."""

    def map(self, f: Callable[[A], B]) -> CodeLayout[B]:
        """Apply `f` to each array."""
        arrays = {field.name: f(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return type(self)(**arrays)  # type: ignore[return-value]

    @abstractmethod
    def flat(self: CodeLayout) -> Shaped[Tensor, "L"]:
        """Return all codes, int64; padding becomes 0."""

    @abstractmethod
    def recoded(self: CodeLayout, recode: Recode, rows: int) -> CodeLayout:
        """Return the layout in the codes of a table of `rows` rows. `recode` keeps the order of the codes."""

    @abstractmethod
    def numbered(self: CodeLayout) -> CodeLayout:
        """Return the layout whose codes are the places of those in `flat`: its table has a row for each place."""

    @abstractmethod
    def pooled(self: CodeLayout, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        """Return the pooled rows of a table."""

    @abstractmethod
    def padded(self: CodeLayout) -> Padded:
        """Return the same codes padded to one length, for poolings without a faster way."""
