"""One tower: field embeddings -> SENet gate -> branches -> layers -> vector."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from twotower.config import HistoryConfig, TowerConfig
from twotower.data.batches import Inputs
from twotower.encoders import UNKNOWN, Field
from twotower.errors import ConfigError, nearest
from twotower.model.branches import TowerBranch
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.layers import ACTIVATIONS, Dropout, SenetGate, norm_activation_dropout
from twotower.model.tables import AnyTable, Table, TableFactory


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
        make: TableFactory = Table,
    ) -> None:
        """The last `extra` numbers of the last layer are biases, no part of the vector. `make` makes the tables."""
        super().__init__()
        fields = _select_fields(side_fields, config.fields)
        self.unknown_rate = unknown_rate
        self.weight_decay_scale = config.weight_decay_scale
        self.has_layers = bool(config.layers)
        self.embeddings = FieldEmbeddings(fields, side_fields, config.width or width, std, config.history, make)
        if config.history != HistoryConfig() and not any(f.limit for f in fields):
            raise ConfigError(
                "history is about sequences with pooling = 'transformer' or 'attention', and this tower reads none; "
                "drop it, or change the pooling of a sequence"
            )
        widths = self.embeddings.widths
        self.senet = SenetGate(widths, config.senet) if config.senet.enabled else None
        self.field_dropout = Dropout(config.field_dropout)
        self.pieces = self.embeddings.pieces if config.field_norm else []
        after = (config.activation, config.layer_norm, config.dropout)
        layers: list[nn.Module] = []
        if config.join == "sum":
            if len(set(widths)) > 1:
                raise ConfigError(f"join = 'sum' needs fields of one width, found {sorted(set(widths))}")
            size = widths[0]
            self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(size))
            layers += norm_activation_dropout(size, *after)
        else:
            self.shift = None
            size = sum(widths)
        deviation = 1.0 if config.field_norm else std
        self.branches = nn.ModuleList(
            TowerBranch(b, widths, self.embeddings.pieces, deviation) for b in config.branches
        )
        if config.branches:
            size = sum(cast(TowerBranch, b).size for b in self.branches)
        self.augmented = AugmentedVectors(side_fields, config.layers[-1] - extra, make) if config.augment else None
        if self.augmented is not None:
            size += self.augmented.width
        for i, w in enumerate(config.layers):
            layers.append(nn.Linear(size, w))
            size = w
            if i + 1 < len(config.layers):
                layers += norm_activation_dropout(w, *after)
        self.layers = nn.Sequential(*layers)
        joined = sum(widths) if self.shift is None else widths[0]
        self.residual = nn.Linear(joined, size, bias=False) if config.residual else None
        self.last = ACTIVATIONS[config.activation]() if config.activate_last else None
        self.output_norm = nn.LayerNorm(size - extra) if config.output_norm else None
        self.size, self.extra = size, extra

    def gates(self, inputs: Inputs, other: FieldEmbeddings) -> dict[str, Tensor]:
        """The SENet gates (U, F) of the rows, in the order of `field_names`, by the name of their section below the
        tower: "senet", "branches.0.senet", …; empty without a gate."""
        fields = self._fields(inputs, other)
        found = {} if self.senet is None else {"senet": self.senet(fields)}
        if self.senet is not None:
            fields = self.senet.weigh(fields)
        for number, branch in enumerate(self.branches):
            if (gate := cast(TowerBranch, branch).senet) is not None:
                found[f"branches.{number}.senet"] = gate(fields)
        return found

    @property
    def field_names(self) -> list[str]:
        return [f.name for f in self.embeddings.fields]

    def _fields(self, inputs: Inputs, other: FieldEmbeddings) -> Tensor:
        """The fields side by side, normalised if asked: (U, sum of widths)."""
        fields: Tensor = self.embeddings(inputs, other, self.unknown_rate)
        return _normalize_pieces(fields, self.pieces) if self.pieces else fields

    def forward(self, inputs: Inputs, other: FieldEmbeddings) -> Tensor:
        joined = self._fields(inputs, other)
        if self.senet is not None:
            joined = self.senet.weigh(joined)
        if self.shift is not None:
            joined = joined.view(len(joined), len(self.field_names), len(self.shift)).sum(1) + self.shift
        joined = self.field_dropout(joined)
        parts = [branch(joined) for branch in self.branches] or [joined]
        if self.augmented is not None:
            parts.append(self.augmented(inputs, self.unknown_rate))
        out: Tensor = self.layers(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        if self.residual is not None:
            out = out + self.residual(joined)
        n = self.size - self.extra
        if self.last is not None:
            out = torch.cat([self.last(out[:, :n]), out[:, n:]], 1)
        if self.output_norm is None:
            return out
        return torch.cat([self.output_norm(out[:, :n]), out[:, n:]], 1)


class AugmentedVectors(nn.Module):
    """A vector per id of the side, trained to be like the other side's vectors of its positives (DAT, Yu et al. 2021,
    section 3.2). Ids that training does not know read row 0.

    It begins at zero: an id without a positive says nothing.
    """

    def __init__(self, side_fields: tuple[Field, ...], width: int, make: TableFactory = Table) -> None:
        """Raises ConfigError if no field of the side tells its ids apart."""
        super().__init__()
        lookups = [f for f in side_fields if f.kind == "lookup"]
        own = [number for number, f in enumerate(lookups) if f.identifies]
        if not own:
            raise ConfigError(
                "augment = true keeps a vector for each id, and no categorical feature of this side reads its id column "
                "without hash_buckets; add one to schema.features"
            )
        self.column, self.width = own[0], width
        self.table: AnyTable = make(lookups[own[0]].rows, width)
        self.table.initialize(0)

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Tensor:
        """(U, D); in training a share `unknown_rate` of the rows reads row 0."""
        codes = inputs.lookup[:, self.column]
        if self.training and unknown_rate:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < unknown_rate, UNKNOWN)
        out: Tensor = self.table(codes)
        return out

    def codes(self, inputs: Inputs) -> Tensor:
        """The rows of the table that may be read."""
        codes = inputs.lookup[:, self.column]
        return torch.cat([codes, codes.new_tensor([UNKNOWN])])


def _normalize_pieces(joined: Tensor, widths: list[int]) -> Tensor:
    """Each piece of (U, sum of widths) shifted and scaled to mean 0 and variance 1; the layer after it learns the rest."""
    if len(set(widths)) == 1:
        pieces = joined.view(len(joined), len(widths), widths[0])
        return nn.functional.layer_norm(pieces, (widths[0],)).flatten(1)
    return torch.cat([nn.functional.layer_norm(p, (p.shape[1],)) for p in torch.split(joined, widths, 1)], 1)


def _select_fields(fields: tuple[Field, ...], names: tuple[str, ...]) -> tuple[Field, ...]:
    known = {f.name: f for f in fields}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"model.pairs: no feature '{name}' on this side{nearest(name, known)} (allowed: {', '.join(known)})"
            )
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"model.pairs: feature '{min(twice)}' is listed twice in one tower's fields; name it once")
    return tuple(known[n] for n in names) if names else fields
