"""Layers of towers and branches: activations, dropout, row gathers and the SENet gate."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.section import Section

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "LeakyReLU": nn.LeakyReLU,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
}


class SenetConfig(Section):
    """SENet gate: squeeze each field to one number, excite, multiply (FiBiNET, Huang et al. 2019, section 3.2)."""

    enabled: bool = Field(False, description="SENet gate between the embeddings and the next layer.")
    squeeze: Literal["mean", "sum", "max"] = Field("mean", description="Pooling of a field to one number.")
    reduction: float = Field(
        2.0, ge=1, description="Number of fields divided by the width of the gate's hidden layer, which is at least 1."
    )


Activation = Literal["LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid"]


def norm_activation_dropout(width: int, activation: str, layer_norm: bool, dropout: float) -> list[nn.Module]:
    """Return the modules after a hidden linear layer: layer norm, activation, dropout. A dropout of 0 adds none."""
    norm = [nn.LayerNorm(width)] if layer_norm else []
    return [*norm, ACTIVATIONS[activation](), *([Dropout(dropout)] if dropout else [])]


def gather(table: Tensor, codes: Tensor) -> Tensor:
    """Return the rows of a table (rows, E) at codes (…): (…, E)."""
    if table.device.type != "cpu":
        return nn.functional.embedding(codes, table)
    # Same values; the backward pass sorts gradients by row before adding them, which is several times as fast.
    return table.index_select(0, codes.reshape(-1)).view(*codes.shape, table.shape[1])


def normalize_pieces(joined: Tensor, widths: list[int]) -> Tensor:
    """Normalise each piece of (U, sum of widths) to mean 0 and variance 1, without learned scale and shift."""
    if len(set(widths)) == 1:
        pieces = joined.view(len(joined), len(widths), widths[0])
        return nn.functional.layer_norm(pieces, (widths[0],)).flatten(1)
    return torch.cat([nn.functional.layer_norm(p, (p.shape[1],)) for p in torch.split(joined, widths, 1)], 1)


class Dropout(nn.Module):
    """Dropout: x * Bernoulli(1 - p) / (1 - p) in training, x otherwise (Srivastava et al. 2014).

    On a CPU the rate is rounded to a multiple of 1/256, because a random byte per element is ten times as cheap as a
    random float per element.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map x (…) -> (…)."""
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate)
        dropped = min(255, max(1, round(self.rate * 256)))
        random = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        kept = (random[: x.numel()] >= dropped).view(x.shape)
        return x * kept.to(x.dtype).mul_(256 / (256 - dropped))


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

    def forward(self, fields: Tensor) -> Tensor:
        """Map F concatenated fields (U, sum of widths) to their weights (U, F)."""
        one_width = len(set(self.widths)) == 1
        groups = [fields.view(len(fields), len(self.widths), self.widths[0])] if one_width else [
            f[:, None] for f in torch.split(fields, self.widths, 1)
        ]  # fmt: skip
        if self.squeeze == "mean":
            squeezed = [g.mean(2) for g in groups]
        elif self.squeeze == "sum":
            squeezed = [g.sum(2) for g in groups]
        else:
            squeezed = [g.amax(2) for g in groups]
        gates: Tensor = self.excite(torch.cat(squeezed, 1))
        return gates

    def reweight(self, fields: Tensor) -> Tensor:
        """Multiply each field by its weight: (U, sum of widths) -> (U, sum of widths)."""
        gates = self(fields)
        if len(set(self.widths)) == 1:
            reweighted: Tensor = fields * gates.repeat_interleave(self.widths[0], 1)
            return reweighted
        return torch.cat([f * gates[:, i, None] for i, f in enumerate(torch.split(fields, self.widths, 1))], 1)
