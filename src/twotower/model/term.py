"""Protocol of the terms of a score that no tower computes, and values of ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32
from twotower.features.field import InputField
from twotower.model.inputs import stacked
from twotower.model.inputs.code_layout import Inputs

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Term(nn.Module):
    """Numbers of a term, which no step trains. A term is a bias of each row, or added to the products of vectors."""

    is_bias: ClassVar[bool] = False
    """True if the bias of an item holds the term, or a part of it."""

    def __init__(self, name: str) -> None:
        """Take the name, the kind of its scorer."""
        super().__init__()
        self.name = name

    def forward(self, inputs: Inputs, bias: F32[Tensor, "n 1"]) -> F32[Tensor, "n 1"]:
        """Return the biases of rows with this one."""
        return bias

    def lower(self, g: GraphBuilder, bias: str) -> str:
        """Build `forward`."""
        return bias


class IdPrior(Term):
    """A number for each id of a side, from statistics of the training rows, 0 at first."""

    def __init__(self, fields: tuple[InputField, ...], name: str = "prior") -> None:
        """Find the ids among the fields of a side; without one, add nothing. `name` names the values in a graph."""
        super().__init__(name)
        lookups = stacked(fields)
        self.field = next((f for f in lookups if f.identifies), None)
        self.column = lookups.index(self.field) if self.field else 0
        self.values = nn.Parameter(torch.zeros(self.field.rows if self.field else 0), requires_grad=False)

    def forward(self, inputs: Inputs, bias: F32[Tensor, "n 1"]) -> F32[Tensor, "n 1"]:
        return bias + self.values[inputs.lookup[:, self.column, None].long()] if self.field else bias

    def lower(self, g: GraphBuilder, bias: str) -> str:
        if not self.field:
            return bias
        codes = g("Gather", "lookup", g.constant([self.column]), axis=1)
        return g("Add", bias, g("Gather", g.constant(self.values, self.name), codes, axis=0))
