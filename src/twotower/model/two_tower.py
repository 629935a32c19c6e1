"""User tower, item tower and their similarity.

A user and an item become one vector each, and the logit of a pair is their plain dot product: temperature and
biases are folded in, so that what is trained is what an index can search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.data.batches import Inputs
from twotower.encoders import UNKNOWN, Field
from twotower.errors import ConfigError
from twotower.model.tables import AnyTable, Table, TableFactory
from twotower.model.towers import Tower
from twotower.schema import SideName


class _Normalize(torch.autograd.Function):
    """Rows divided by their length, with the closed form of the gradient: (g - y (y . g)) / length."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = x.square().sum(1, keepdim=True).clamp_(min=1e-12).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        g = grads[0]
        return torch.addcmul(g, y, (y * g).sum(1, keepdim=True), value=-1).mul_(inverse)


def normalize(x: Tensor) -> Tensor:
    """(U, D) -> rows of length 1; a row of zeros stays zero."""
    out: Tensor = _Normalize.apply(x)  # type: ignore[no-untyped-call]
    return out


class TowerPair(nn.Module):
    """A user tower and an item tower whose vectors are compared with each other."""

    def __init__(self, user: Tower, item: Tower) -> None:
        super().__init__()
        self.user, self.item = user, item


class FirstOrder(nn.Module):
    """A number per code of every lookup field, summed: the linear part of a factorisation machine."""

    first_rows: Tensor

    def __init__(self, fields: tuple[Field, ...], make: TableFactory = Table) -> None:
        super().__init__()
        rows = [f.rows for f in fields if f.kind == "lookup"]
        self.register_buffer("first_rows", torch.tensor([sum(rows[:i]) for i in range(len(rows))]), persistent=False)
        self.table: AnyTable = make(max(1, sum(rows)), 1)
        self.table.initialize(0)

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Tensor:
        """(U, 1)"""
        codes = inputs.lookup
        if self.training and unknown_rate:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < unknown_rate, UNKNOWN)
        out: Tensor = self.table(codes + self.first_rows.long()).sum(1)
        return out

    def codes(self, inputs: Inputs) -> Tensor:
        """The rows of the table that may be read."""
        first_rows = self.first_rows.long()
        return torch.cat([(inputs.lookup + first_rows).flatten(), first_rows + UNKNOWN])


class TwoTower(nn.Module):
    """`user_vectors(inputs) @ item_vectors(inputs).T` are the logits of "this user likes this item"."""

    def __init__(
        self,
        config: ModelConfig,
        user_fields: tuple[Field, ...],
        item_fields: tuple[Field, ...],
        make: TableFactory = Table,
    ) -> None:
        """`make` makes the tables. Raises ConfigError if the two towers of a pair give vectors of different widths."""
        super().__init__()
        self.config = config
        self.pairs = nn.ModuleList()
        extra = 1 if config.bias else 0
        for number, pair in enumerate(config.pairs):
            user, item = (
                Tower(
                    # With biases a tower with layers gives one more number, its own bias.
                    c.model_copy(update={"layers": (*c.layers[:-1], c.layers[-1] + extra)}) if c.layers else c,
                    fields,
                    config.width,
                    config.embedding_std,
                    config.unknown_rate,
                    extra if c.layers else 0,
                    make,
                )
                for c, fields in ((pair.user, user_fields), (pair.item, item_fields))
            )
            sizes = [t.size - (extra if c.layers else 0) for t, c in ((user, pair.user), (item, pair.item))]
            if sizes[0] != sizes[1]:
                raise ConfigError(
                    f"model.pairs.{number}: the user vector has width {sizes[0]} and the item vector {sizes[1]}; "
                    "end both towers' layers with the same width"
                )
            user.embeddings.check_shares(item.embeddings)
            item.embeddings.check_shares(user.embeddings)
            self.pairs.append(TowerPair(user, item))
        if config.bias:
            self.user_bias, self.item_bias = FirstOrder(user_fields, make), FirstOrder(item_fields, make)
            self.global_bias = nn.Parameter(torch.zeros(()))
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)),
            requires_grad=config.learn_temperature and config.similarity == "cosine",
        )

    def codes(self, users: Inputs | None, items: Inputs | None) -> Iterator[tuple[AnyTable, Tensor]]:
        """All rows of tables that may be read for the vectors of these rows, a table perhaps several times."""
        for side, own, theirs in (("user", users, items), ("item", items, users)):
            for tower, other in self.towers(cast(SideName, side)):
                yield from tower.embeddings.codes(own, theirs, other.embeddings)
                if tower.augmented is not None and own is not None:
                    yield tower.augmented.table, tower.augmented.codes(own)
            if self.config.bias and own is not None:
                bias = self.user_bias if side == "user" else self.item_bias
                yield bias.table, bias.codes(own)

    def towers(self, side: SideName) -> list[tuple[Tower, Tower]]:
        """Per pair the tower of `side` and the other side's."""
        pairs = [cast(TowerPair, pair) for pair in self.pairs]
        return [(b.user, b.item) if side == "user" else (b.item, b.user) for b in pairs]

    @property
    def metric(self) -> Literal["cosine", "dot"]:
        """What an index over the item vectors must rank by."""
        return self.config.metric

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def user_vectors(self, inputs: Inputs) -> Tensor:
        """(U, D) float32; with biases D counts two more: [vector / temperature, bias, 1]."""
        vectors, bias = self._side(inputs, "user")
        vectors = vectors / self.temperature
        if bias is None:
            return vectors
        return torch.cat([vectors, bias + self.global_bias, torch.ones_like(bias)], 1)

    def item_vectors(self, inputs: Inputs) -> Tensor:
        """(I, D) float32; with biases [vector, 1, bias]."""
        vectors, bias = self._side(inputs, "item")
        if bias is None:
            return vectors
        return torch.cat([vectors, torch.ones_like(bias), bias], 1)

    def forward(self, users: Inputs, items: Inputs, user: Tensor, item: Tensor) -> Tensor:
        """Logits (B,) of the pairs (user[b], item[b]), indices into the U users and I items."""
        u, v = self.user_vectors(users), self.item_vectors(items)
        return (u.index_select(0, user) * v.index_select(0, item)).sum(1)

    def augmented(self, side: SideName, inputs: Inputs, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per tower of `side` with augmented vectors: those of the rows (U, D), and what its pair's other tower gave in
        the other side's `vectors` (V, …), of length one if the similarity is the cosine: (V, D), without gradient."""
        found, first = [], 0
        for tower, _ in self.towers(side):
            width = tower.size - (1 if self.config.bias and tower.has_layers else 0)
            if tower.augmented is not None:
                theirs = vectors[:, first : first + width].detach()
                scale = self.temperature.detach() if side == "item" else 1.0  # undoes that of `user_vectors`
                found.append((tower.augmented(inputs, tower.unknown_rate), theirs * scale))
            first += width
        return found

    def _side(self, inputs: Inputs, side: SideName) -> tuple[Tensor, Tensor | None]:
        """The pairs' vectors side by side (U, D), and the summed bias (U, 1)."""
        vectors, bias = [], None
        if self.config.bias:
            bias = (self.user_bias if side == "user" else self.item_bias)(inputs, self.config.unknown_rate)
        for tower, other in self.towers(side):
            out = tower(inputs, other.embeddings).float()
            if bias is not None and tower.has_layers:
                bias = bias + out[:, -1:]
                out = out[:, :-1]
            vectors.append(out)
        joined = torch.cat(vectors, 1) if len(vectors) > 1 else vectors[0]
        if self.config.similarity == "cosine":
            joined = normalize(joined)
        return joined, bias
