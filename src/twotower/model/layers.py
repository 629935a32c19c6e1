"""Layers of towers and branches: dropout, normalisation and row gathers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from twotower.arrays.types import Float, Int
from twotower.model.activations import Activation, activation_module
from twotower.model.lowering import LoweredModule

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


def norm_activation_dropout(width: int, activation: Activation, layer_norm: bool, dropout: float) -> list[nn.Module]:
    """Return the modules after a hidden linear layer: layer norm, activation, dropout. A dropout of 0 adds none."""
    norm = [nn.LayerNorm(width)] if layer_norm else []
    return [*norm, activation_module(activation), *([Dropout(dropout)] if dropout else [])]


def gather(table: Float[Tensor, "rows E"], codes: Int[Tensor, "*n"]) -> Float[Tensor, "*n E"]:
    """Return the rows of a table at codes."""
    if table.device.type != "cpu":
        return nn.functional.embedding(codes, table)
    # Same values; the backward pass sorts gradients by row before adding them, which is several times as fast.
    return table.index_select(0, codes.reshape(-1)).view(*codes.shape, table.shape[1])


def normalize_pieces(joined: Float[Tensor, "U N"], widths: list[int]) -> Float[Tensor, "U N"]:
    """Normalise each piece of joined vectors of these widths to mean 0 and variance 1, without learned scale and shift."""
    if len(set(widths)) == 1:
        pieces = joined.view(len(joined), len(widths), widths[0])
        return nn.functional.layer_norm(pieces, (widths[0],)).flatten(1)
    return torch.cat([nn.functional.layer_norm(p, (p.shape[1],)) for p in torch.split(joined, widths, 1)], 1)


def lower_normalized_pieces(g: GraphBuilder, joined: str, widths: list[int]) -> str:
    """Build `normalize_pieces`."""

    def norm(x: str, width: int) -> str:
        ones = g.constant(np.ones(width, np.float32))
        return g("LayerNormalization", x, ones, axis=-1, epsilon=1e-5)

    if len(set(widths)) == 1:
        return g.reshape(norm(g.reshape(joined, len(widths), widths[0]), widths[0]), sum(widths))
    return g.concat([norm(piece, w) for piece, w in zip(g.split(joined, widths), widths, strict=True)])


class Dropout(LoweredModule):
    """Dropout: x * Bernoulli(1 - p) / (1 - p) in training, x otherwise (Srivastava et al. 2014).

    On a CPU the rate is rounded to a multiple of 1/256, because a random byte per element is ten times as cheap as a
    random float per element.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Drop a share of the numbers in training."""
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        dropped = min(255, max(1, round(self.rate * 256)))
        random = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        kept = (random[: x.numel()] >= dropped).view(x.shape)
        return x * kept.to(x.dtype).mul_(256 / (256 - dropped))

    def lower(self, g: GraphBuilder, x: str) -> str:
        """Return the input."""
        return x


class _Normalize(torch.autograd.Function):
    """Row normalisation y = x / |x| with the closed-form gradient (g - y (y . g)) / |x|."""

    @staticmethod
    def forward(ctx: BackwardCFunction, x: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
        inverse = x.square().sum(1, keepdim=True).clamp_(min=1e-12).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        y, inverse = saved
        g = grads[0]
        return torch.addcmul(g, y, (y * g).sum(1, keepdim=True), value=-1).mul_(inverse)


def normalize(x: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
    """Scale the rows to length 1; a row of zeros stays zero."""
    out: Tensor = _Normalize.apply(x)  # type: ignore[no-untyped-call]
    return out
