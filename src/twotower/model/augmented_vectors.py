"""Augmented vectors of a tower: a vector per id, trained towards the other side."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import Float, Int
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.inputs import stacked
from twotower.model.inputs.tower_inputs import Inputs
from twotower.model.tables import Table

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class AugmentedVectors(nn.Module):
    """Augmented vector per id of a side: a table row trained towards the other side's vectors of the id's positives
    (DAT, Yu et al. 2021, "A Dual Augmented Two-tower Model for Online Large-scale Recommendation", section 3.2,
    adaptive-mimic mechanism). Unknown ids read row 0.

    Rows start at zero, so an id without a positive stays at zero.
    """

    def __init__(self, side_fields: tuple[InputField, ...], width: int) -> None:
        """Create the table. Raises ConfigError if no field of the side reads its id column without hashing."""
        super().__init__()
        lookups = stacked(side_fields)
        own = [number for number, f in enumerate(lookups) if f.identifies]
        if not own:
            raise ConfigError(
                "augment = true needs a categorical feature over the id column of its side, without hash_buckets; "
                "add one to schema.features"
            )
        self.column, self.width = own[0], width
        self.table: Table = Table(lookups[own[0]].rows, width)
        self.table.initialize(0)

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Float[Tensor, "U D"]:
        """Return the vectors; in training a share `unknown_rate` of the rows reads row 0."""
        codes = inputs.lookup[:, self.column]
        if self.training and unknown_rate:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < unknown_rate, UNKNOWN)
        out: Tensor = self.table(codes)
        return out

    def codes(self, inputs: Inputs) -> Int[Tensor, "n"]:
        """Return the table rows that `forward` may read."""
        codes = inputs.lookup[:, self.column]
        return torch.cat([codes, codes.new_tensor([UNKNOWN])])

    def lower(self, g: GraphBuilder, key: Hashable) -> str:
        """Build `forward`; `key` tells the tables of several towers apart."""
        codes = g("Gather", "lookup", g.constant([self.column]), axis=1)
        return g.reshape(g("Gather", g.constant(self.table.weight, (key, "augmented")), codes, axis=0), self.width)
