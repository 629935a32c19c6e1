"""Values of ids, from statistics of the training rows, which no step trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32
from twotower.features.field import InputField
from twotower.model.inputs import stacked
from twotower.model.inputs.code_layout import Inputs

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class IdPrior(nn.Module):
    """A number for each id of a side, 0 at first, added to the biases of a score."""

    def __init__(self, fields: tuple[InputField, ...], name: str = "prior") -> None:
        """Find the ids among the fields of a side; without one, add nothing. `name` names the values in a graph."""
        super().__init__()
        self.name = name
        lookups = stacked(fields)
        self.field = next((f for f in lookups if f.identifies), None)
        self.column = lookups.index(self.field) if self.field else 0
        self.values = nn.Parameter(torch.zeros(self.field.rows if self.field else 0), requires_grad=False)

    def forward(self, inputs: Inputs, bias: F32[Tensor, "U 1"]) -> F32[Tensor, "U 1"]:
        """Return the biases with the values of the ids."""
        return bias + self.values[inputs.lookup[:, self.column, None].long()] if self.field else bias

    def lower(self, g: GraphBuilder, bias: str) -> str:
        """Build `forward`."""
        if not self.field:
            return bias
        codes = g("Gather", "lookup", g.constant([self.column]), axis=1)
        return g("Add", bias, g("Gather", g.constant(self.values, self.name), codes, axis=0))
