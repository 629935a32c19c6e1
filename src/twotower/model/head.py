"""Heads of a tower: its vector, and the bias of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.model.activations import Activation, activation_module
from twotower.model.lowering import lower

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class TowerHead(nn.Module):
    """Last layer of a tower: hidden units h and joined fields x -> the vector v (U, D) and the bias b (U, 1).

    (v, b) = W h + c + R x, one matrix product for both, then v <- norm(act(v)). R, the bias, the activation and the norm
    are optional. Without a layer h is the vector, and there is no bias.
    """

    def __init__(
        self,
        hidden: int,
        joined: int,
        width: int | None,
        *,
        bias: bool,
        residual: bool = False,
        activation: Activation | None = None,
        norm: bool = False,
    ) -> None:
        """Build the head of a tower with `hidden` units over `joined` numbers. `width` D is that of the vector; None: no
        layer."""
        super().__init__()
        self.width = width or hidden
        self.has_bias = bias and width is not None
        outputs = self.width + self.has_bias
        self.layer = nn.Linear(hidden, outputs) if width else None
        self.residual = nn.Linear(joined, outputs, bias=False) if residual else None
        self.activation = activation_module(activation) if activation else None
        self.norm = nn.LayerNorm(self.width) if norm else None

    def forward(
        self, hidden: Float[Tensor, "U H"], joined: Float[Tensor, "U N"]
    ) -> tuple[Float[Tensor, "U D"], Float[Tensor, "U 1"] | None]:
        """Return the vectors and the biases, None without."""
        out: Tensor = hidden if self.layer is None else self.layer(hidden)
        if self.residual is not None:
            out = out + self.residual(joined)
        vector, bias = (out[:, : self.width], out[:, self.width :]) if self.has_bias else (out, None)
        if self.activation is not None:
            vector = self.activation(vector)
        if self.norm is not None:
            vector = self.norm(vector)
        return vector, bias

    def lower(self, g: GraphBuilder, hidden: str, joined: str) -> tuple[str, str]:
        """Build `forward`; the biases are "" without."""
        out = hidden if self.layer is None else lower(self.layer, g, hidden)
        if self.residual is not None:
            out = g("Add", out, lower(self.residual, g, joined))
        vector, bias = g.split(out, [self.width, 1]) if self.has_bias else (out, "")
        for module in (self.activation, self.norm):
            vector = vector if module is None else lower(module, g, vector)
        return vector, bias
