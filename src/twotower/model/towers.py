"""One tower: field embeddings -> SENet gate -> layers -> vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.config import SenetConfig, TowerConfig
from twotower.data.batches import Inputs
from twotower.encoders import Field
from twotower.errors import ConfigError, nearest
from twotower.model.dropout import Dropout
from twotower.model.embeddings import FieldEmbeddings

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "LeakyReLU": nn.LeakyReLU,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
}


class SenetGate(nn.Module):
    """A weight in (0, 1) for each field of each row (FiBiNET, Huang et al. 2019, section 3.2, sigmoid at the end).

    The gate of a row depends on that row alone.
    """

    def __init__(self, widths: list[int], config: SenetConfig) -> None:
        super().__init__()
        self.widths, self.squeeze = widths, config.squeeze
        n = len(widths)
        middle = max(1, int(n / config.reduction))
        first = nn.Linear(n, middle)
        # Squeezed fresh embeddings are near 0: with a bias below it a unit is off in every row, and stays off.
        nn.init.ones_(first.bias)
        self.excite = nn.Sequential(first, nn.ReLU(), nn.Linear(middle, n), nn.Sigmoid())

    def forward(self, fields: Tensor) -> Tensor:
        """F fields side by side (U, sum of widths) -> gates (U, F)."""
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

    def weigh(self, fields: Tensor) -> Tensor:
        """The fields, each multiplied by its gate."""
        gates = self(fields)
        if len(set(self.widths)) == 1:
            weighed: Tensor = fields * gates.repeat_interleave(self.widths[0], 1)
            return weighed
        return torch.cat([f * gates[:, i, None] for i, f in enumerate(torch.split(fields, self.widths, 1))], 1)


class Tower(nn.Module):
    """Inputs of U rows -> vectors (U, D), D the last layer's width, or the joined fields' without layers."""

    def __init__(
        self,
        config: TowerConfig,
        side_fields: tuple[Field, ...],
        width: int,
        std: float,
        unknown_rate: float,
        extra: int = 0,
    ) -> None:
        """The last `extra` numbers of the last layer are biases, no part of the vector."""
        super().__init__()
        fields = _pick(side_fields, config.fields)
        self.unknown_rate = unknown_rate
        self.decay_scale = config.decay_scale
        self.has_layers = bool(config.layers)
        self.embeddings = FieldEmbeddings(fields, side_fields, config.width or width, std, config.history)
        widths = self.embeddings.widths
        self.senet = SenetGate(widths, config.senet) if config.senet.enabled else None
        self.field_dropout = Dropout(config.field_dropout)
        self.pieces = self.embeddings.pieces if config.field_norm else []
        activation = _ACTIVATIONS[config.activation]

        def hidden(w: int) -> list[nn.Module]:
            norm = [nn.LayerNorm(w)] if config.layer_norm else []
            return [*norm, activation(), *([Dropout(config.dropout)] if config.dropout else [])]

        layers: list[nn.Module] = []
        if config.join == "sum":
            if len(set(widths)) > 1:
                raise ConfigError(f"join = 'sum' needs fields of one width, found {sorted(set(widths))}")
            size = widths[0]
            self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(size))
            layers += hidden(size)
        else:
            self.shift = None
            size = sum(widths)
        for i, w in enumerate(config.layers):
            layers.append(nn.Linear(size, w))
            size = w
            if i + 1 < len(config.layers):
                layers += hidden(w)
        self.layers = nn.Sequential(*layers)
        joined = sum(widths) if self.shift is None else widths[0]
        self.residual = nn.Linear(joined, size, bias=False) if config.residual else None
        self.last = activation() if config.activate_last else None
        self.output_norm = nn.LayerNorm(size - extra) if config.output_norm else None
        self.size, self.extra = size, extra

    def gates(self, inputs: Inputs, other: FieldEmbeddings) -> Tensor:
        """The SENet gates (U, F) of the rows, in the order of `field_names`; ones without a gate."""
        fields = self.embeddings(inputs, other, self.unknown_rate)
        if self.pieces:
            fields = _normalize_pieces(fields, self.pieces)
        return self.senet(fields) if self.senet is not None else torch.ones(inputs.rows, len(self.field_names))

    @property
    def field_names(self) -> list[str]:
        return [f.name for f in self.embeddings.fields]

    def forward(self, inputs: Inputs, other: FieldEmbeddings) -> Tensor:
        joined: Tensor = self.embeddings(inputs, other, self.unknown_rate)
        if self.pieces:
            joined = _normalize_pieces(joined, self.pieces)
        if self.senet is not None:
            joined = self.senet.weigh(joined)
        if self.shift is not None:
            joined = joined.view(len(joined), len(self.field_names), len(self.shift)).sum(1) + self.shift
        joined = self.field_dropout(joined)
        out: Tensor = self.layers(joined)
        if self.residual is not None:
            out = out + self.residual(joined)
        n = self.size - self.extra
        if self.last is not None:
            out = torch.cat([self.last(out[:, :n]), out[:, n:]], 1)
        if self.output_norm is None:
            return out
        return torch.cat([self.output_norm(out[:, :n]), out[:, n:]], 1)


def _normalize_pieces(joined: Tensor, widths: list[int]) -> Tensor:
    """Each piece of (U, sum of widths) shifted and scaled to mean 0 and variance 1; the layer after it learns the rest."""
    if len(set(widths)) == 1:
        pieces = joined.view(len(joined), len(widths), widths[0])
        return nn.functional.layer_norm(pieces, (widths[0],)).flatten(1)
    return torch.cat([nn.functional.layer_norm(p, (p.shape[1],)) for p in torch.split(joined, widths, 1)], 1)


def _pick(fields: tuple[Field, ...], names: tuple[str, ...]) -> tuple[Field, ...]:
    known = {f.name: f for f in fields}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"model.pairs: no feature '{name}' on this side{nearest(name, known)} (allowed: {', '.join(known)})"
            )
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"model.pairs: feature '{min(twice)}' is listed twice in one tower's fields; name it once")
    return tuple(known[n] for n in names) if names else fields
