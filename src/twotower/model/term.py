"""Protocol of the terms of a score that no tower computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from twotower.arrays.types import F32
from twotower.model.inputs.code_layout import Inputs

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Term(nn.Module):
    """Numbers of a term, which no step trains. A term is a bias of each item, or added to the products of vectors."""

    is_bias: ClassVar[bool] = False
    """True if the bias of an item holds the term, or a part of it."""

    def __init__(self, name: str) -> None:
        """Take the name, the kind of its scorer."""
        super().__init__()
        self.name = name

    def forward(self, inputs: Inputs, bias: F32[Tensor, "I 1"]) -> F32[Tensor, "I 1"]:
        """Return the biases of items with this one."""
        return bias

    def lower(self, g: GraphBuilder, bias: str) -> str:
        """Build `forward`."""
        return bias
