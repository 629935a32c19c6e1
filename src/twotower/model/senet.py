"""SENet gate of a tower or a branch: a weight for each field of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.model.lowering import lower
from twotower.section import Section

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class SenetConfig(Section):
    """SENet gate: squeeze each field to one number, excite, multiply (FiBiNET, Huang et al. 2019, section 3.2)."""

    research = ("squeeze", "reduction")

    enabled: bool = Field(False, description="SENet gate between the embeddings and the next layer.")
    squeeze: Literal["mean", "sum", "max"] = Field("mean", description="Pooling of a field to one number.")
    reduction: float = Field(
        2.0, ge=1, description="Number of fields divided by the width of the gate's hidden layer, which is at least 1."
    )


_SQUEEZES: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "mean": (torch.mean, "Mean"),
    "sum": (torch.sum, "Sum"),
    "max": (torch.amax, "Max"),
}
"""Poolings of one axis in torch and in ONNX."""


class SenetGate(nn.Module):
    """SENet gate: a weight in (0, 1) for each field of each row, sigmoid(W2 relu(W1 squeeze(fields)))
    (FiBiNET, Huang et al. 2019, section 3.2, with a sigmoid as the last activation).

    The squeeze is the mean, sum or maximum of a field's E numbers. The weights of a row depend on that row alone.
    """

    def __init__(self, widths: list[int], config: SenetConfig) -> None:
        super().__init__()
        self.widths, self.squeeze = widths, config.squeeze
        n = len(widths)
        middle = max(1, int(n / config.reduction))
        first = nn.Linear(n, middle)
        # Squeezed fresh embeddings are near 0: a unit with a negative bias would be off in every row and stay off.
        nn.init.ones_(first.bias)
        self.excite = nn.Sequential(first, nn.ReLU(), nn.Linear(middle, n), nn.Sigmoid())

    def forward(self, fields: Float[Tensor, "U N"]) -> Float[Tensor, "U F"]:
        """Return the weights of F joined fields, N numbers in all."""
        one_width = len(set(self.widths)) == 1
        groups = [fields.view(len(fields), len(self.widths), self.widths[0])] if one_width else [
            f[:, None] for f in torch.split(fields, self.widths, 1)
        ]  # fmt: skip
        gates: Tensor = self.excite(torch.cat([_SQUEEZES[self.squeeze][0](g, 2) for g in groups], 1))
        return gates

    def reweight(self, fields: Float[Tensor, "U N"]) -> Float[Tensor, "U N"]:
        """Multiply each field by its weight."""
        gates = self(fields)
        if len(set(self.widths)) == 1:
            reweighted: Tensor = fields * gates.repeat_interleave(self.widths[0], 1)
            return reweighted
        return torch.cat([f * gates[:, i, None] for i, f in enumerate(torch.split(fields, self.widths, 1))], 1)

    def lower(self, g: GraphBuilder, joined: str, name: str, fields: list[str]) -> str:
        """Build `reweight`. The weights become the gate `name` over `fields` of the graph."""
        squeeze, widths = _SQUEEZES[self.squeeze][1], self.widths
        if len(set(widths)) == 1:
            parts = g.reshape(joined, len(widths), widths[0])
            gates = lower(self.excite, g, g.reduce(squeeze, parts, 2, keep=False))
            g.add_gate(name, fields, gates)
            return g.reshape(g("Mul", parts, g.reshape(gates, len(widths), 1)), sum(widths))
        pieces = g.split(joined, widths)
        gates = lower(self.excite, g, g.concat([g.reduce(squeeze, p, 1) for p in pieces]))
        g.add_gate(name, fields, gates)
        weights = g.split(gates, [1] * len(widths))
        return g.concat([g("Mul", p, w) for p, w in zip(pieces, weights, strict=True)])
