"""Branch `mlp`: hidden layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Float
from twotower.model.branches.branch import Branch, BranchModule
from twotower.model.layers import Activation, norm_activation_dropout
from twotower.model.lowering import lower
from twotower.section import Positive

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class MlpBranch(Branch):
    """Hidden layers with activations: y = act(norm(W x + b)) per layer, dropout after it.

    Use it with branches of products, so that the tower has both (Deep & Cross, xDeepFM).
    """

    kind = "mlp"
    layers: tuple[Positive, ...] = Field((64,), min_length=1, description="Widths of the activated hidden layers.")
    activation: Activation = Field("LeakyReLU", description="Activation function after each layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the hidden units.")
    layer_norm: bool = Field(False, description="Layer normalisation before each activation.")

    def build(self, widths: list[int], pieces: list[int]) -> Mlp:
        return Mlp(sum(widths), self)


class Mlp(BranchModule):
    def __init__(self, width: int, config: MlpBranch) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for w in config.layers:
            layers += [
                nn.Linear(width, w),
                *norm_activation_dropout(w, config.activation, config.layer_norm, config.dropout),
            ]
            width = w
        self.layers, self.size = nn.Sequential(*layers), width

    def forward(self, x: Float[Tensor, "U N"]) -> Float[Tensor, "U size"]:
        out: Tensor = self.layers(x)
        return out

    def lower(self, g: GraphBuilder, x: str) -> str:
        return lower(self.layers, g, x)
