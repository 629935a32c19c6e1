"""First-order term: a bias per value of each categorical feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import Float, Int
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs import stacked
from twotower.model.inputs.tower_inputs import Inputs
from twotower.model.tables import Table

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class FirstOrder(nn.Module):
    """First-order term Σ_f w_f[code_f] over the lookup fields f (factorisation machine, Rendle 2010, equation 1)."""

    first_rows: Tensor

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        super().__init__()
        self.fields = stacked(fields)
        rows = [f.rows for f in self.fields]
        self.register_buffer("first_rows", torch.tensor([sum(rows[:i]) for i in range(len(rows))]), persistent=False)
        self.table: Table = Table(max(1, sum(rows)), 1)
        self.table.initialize(0)

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Float[Tensor, "U 1"]:
        """Return the sums; in training a share `unknown_rate` of the codes is replaced by the unknown code."""
        codes = inputs.lookup
        if self.training and unknown_rate:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < unknown_rate, UNKNOWN)
        out: Tensor = self.table(codes + self.first_rows.long()).sum(1)
        return out

    def rows_of(self, name: str) -> Float[Tensor, "rows 1"]:
        """Return the biases of the values of a field, part of the table."""
        number = next(n for n, f in enumerate(self.fields) if f.name == name)
        return self.table.rows(int(self.first_rows[number]), self.fields[number].rows)

    def codes(self, inputs: Inputs) -> Int[Tensor, "n"]:
        """Return the table rows that `forward` may read."""
        first_rows = self.first_rows.long()
        return torch.cat([(inputs.lookup + first_rows).flatten(), first_rows + UNKNOWN])

    def lower(self, g: GraphBuilder, like: str) -> str:
        """Build `forward` with as many rows as the value `like` (U, D)."""
        if not len(self.first_rows):
            return g.filled(g.reduce("Sum", like, 1), 0.0)
        codes = g("Add", "lookup", g.constant(self.first_rows))
        return g.reduce("Sum", g("Gather", g.constant(self.table.weight.flatten(), "linear"), codes, axis=0), 1)
