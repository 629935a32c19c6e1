"""Layers of towers and branches: activations, dropout, normalisation, row gathers and the SENet gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from twotower.arrays.types import Float, Int
from twotower.features.values import UNKNOWN
from twotower.model.lowering import LoweredModule, lower
from twotower.section import Section

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


Activation = Literal["LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity"]
"""Names of activations in torch.nn. Identity: none."""


def activation_module(name: Activation) -> nn.Module:
    module: nn.Module = getattr(nn, name)()
    return module


@lower.register(nn.LeakyReLU)
def _(module: nn.LeakyReLU, g: GraphBuilder, x: str) -> str:
    return g("LeakyRelu", x, alpha=module.negative_slope)


@lower.register(nn.ReLU)
@lower.register(nn.Sigmoid)
@lower.register(nn.Tanh)
def _(module: nn.Module, g: GraphBuilder, x: str) -> str:
    return g(type(module).__name__.capitalize(), x)


@lower.register(nn.GELU)
def _(module: nn.GELU, g: GraphBuilder, x: str) -> str:
    half = g("Mul", x, g.constant(0.5))  # the pattern that onnxruntime fuses into one node
    return g("Mul", half, g("Add", g("Erf", g("Div", x, g.constant(math.sqrt(2)))), g.constant(1.0)))


@lower.register(nn.SiLU)
def _(module: nn.SiLU, g: GraphBuilder, x: str) -> str:
    return g("Mul", x, g("Sigmoid", x))


@lower.register(nn.Identity)
def _(module: nn.Identity, g: GraphBuilder, x: str) -> str:
    return x


def norm_activation_dropout(width: int, activation: Activation, layer_norm: bool, dropout: float) -> list[nn.Module]:
    """Return the modules after a hidden linear layer: layer norm, activation, dropout. A dropout of 0 adds none."""
    norm = [nn.LayerNorm(width)] if layer_norm else []
    return [*norm, activation_module(activation), *([Dropout(dropout)] if dropout else [])]


def gather(table: Float[Tensor, "rows E"], codes: Int[Tensor, "*n"]) -> Float[Tensor, "*n E"]:
    """Return the rows of a table at codes."""
    if table.device.type != "cpu":
        return nn.functional.embedding(codes, table)
    # The same values. The backward pass sorts gradients by row first, which is several times as fast.
    return table.index_select(0, codes.reshape(-1)).view(*codes.shape, table.shape[1])


def with_unknown(codes: Int[Tensor, "*n"], rate: float) -> Int[Tensor, "*n"]:
    """Return codes in which the unknown code replaces a random share `rate`."""
    return codes.masked_fill(torch.rand(codes.shape, device=codes.device) < rate, UNKNOWN) if rate else codes


def normalize_pieces(joined: Float[Tensor, "U N"], widths: list[int]) -> Float[Tensor, "U N"]:
    """Normalise each piece of joined vectors to mean 0 and variance 1, without learned scale and shift."""
    if len(set(widths)) == 1:
        pieces = joined.view(len(joined), len(widths), widths[0])
        return nn.functional.layer_norm(pieces, (widths[0],)).flatten(1)
    return torch.cat([nn.functional.layer_norm(p, (p.shape[1],)) for p in torch.split(joined, widths, 1)], 1)


def lower_normalized_pieces(g: GraphBuilder, joined: str, widths: list[int]) -> str:
    def norm(x: str, width: int) -> str:
        ones = g.constant(np.ones(width, np.float32))
        return g("LayerNormalization", x, ones, axis=-1, epsilon=1e-5)

    if len(set(widths)) == 1:
        return g.reshape(norm(g.reshape(joined, len(widths), widths[0]), widths[0]), sum(widths))
    return g.concat([norm(piece, w) for piece, w in zip(g.split(joined, widths), widths, strict=True)])


class Dropout(LoweredModule):
    """Dropout: x * Bernoulli(1 - p) / (1 - p) in training, x otherwise (Srivastava et al. 2014).

    On a CPU the rate is rounded to a multiple of 1/256: random bytes are ten times as cheap as random floats.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        dropped = min(255, max(1, round(self.rate * 256)))
        random = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        kept = (random[: x.numel()] >= dropped).view(x.shape)
        return x * kept.to(x.dtype).mul_(256 / (256 - dropped))

    def lower(self, g: GraphBuilder, x: str) -> str:
        return x


class _Normalize(torch.autograd.Function):
    """Row normalisation y = x / |x| with its gradient (g - y (y . g)) / |x|."""

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


class SenetConfig(Section):
    """SENet gate: squeeze each field to one number, excite, multiply (FiBiNET, Huang et al. 2019, section 3.2)."""

    research = ("squeeze", "reduction")

    enabled: bool = Field(False, description="SENet gate between the embeddings and the next layer.")
    squeeze: Literal["mean", "sum", "max"] = Field("mean", description="Pooling of a field to one number.")
    reduction: float = Field(2.0, ge=1, description="Number of fields divided by the width of the gate's hidden layer.")


_SQUEEZES: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "mean": (torch.mean, "Mean"),
    "sum": (torch.sum, "Sum"),
    "max": (torch.amax, "Max"),
}
"""Poolings of an axis in torch and in ONNX."""


class SenetGate(nn.Module):
    """SENet gate: a weight in (0, 1) for each field of each row, sigmoid(W2 relu(W1 squeeze(fields)))
    (FiBiNET, Huang et al. 2019, section 3.2, with a sigmoid at the end).

    The squeeze is the mean, sum or maximum of a field's E numbers. The weights of a row depend on this row only.
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
