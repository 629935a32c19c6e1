"""Two-tower model: user vectors, item vectors and their similarity.

The logit of a (user, item) pair is the dot product of their vectors. Temperature and biases are parts of the vectors,
so that an index searches the trained score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import F32, Float, Int
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.features.side import SIDES, SideName
from twotower.features.values import UNKNOWN
from twotower.model.inputs import stacked
from twotower.model.inputs.code_layout import Inputs
from twotower.model.layers import normalize, with_unknown
from twotower.model.narrow import Narrow
from twotower.model.tables import FieldTables, Table
from twotower.model.term import IdPrior, Term
from twotower.model.towers import Tower, TowerConfig, select_fields
from twotower.section import Section

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


_BIAS_TERMS: Mapping[SideName, int] = {"user": -2, "item": -1}
"""Indices of the weights of the biases in `TwoTower.term_weights`."""


class PairConfig(Section):
    """A user tower and an item tower. The vectors of all pairs are concatenated, so their scores add up."""

    user: TowerConfig = TowerConfig()
    item: TowerConfig = TowerConfig()


class ModelConfig(Section):
    """The model: pairs of towers, the similarity of their vectors, and terms that are fitted after training.

    **Id dropout** (DropoutNet, Volkovs et al. 2017) hides an id in all towers and biases at once, so that the other
    features learn to rank users and items without training.

    **Stacking** (Wolpert 1992, "Stacked Generalization") weights the pairs, the biases, popularity, and the means of
    users and items. It needs a pointwise loss and a validation part.

    **Cold items** are items whose id is unknown: without training, or below min_count. Their bias has the best
    train.monitor on the validation part, near the likeliest one; with fewer than 50 positives of them there it is 0.
    """

    start_here = ("width",)
    research = (
        "learn_temperature", "unknown_rate", "user_id_dropout", "embedding_std", "stacking", "cold_item_bias",
    )  # fmt: skip

    width: int = Field(16, ge=1, description="Embedding width of a field.")
    pairs: tuple[PairConfig, ...] = Field(
        (PairConfig(),), min_length=1, description="Pairs of user and item towers, whose scores add up. One pair: DSSM."
    )
    similarity: Literal["cosine", "dot"] = Field(
        "cosine", description="Similarity of user and item vectors, over all pairs together."
    )
    temperature: float = Field(0.1, gt=0, description="Initial temperature. logit = similarity / temperature.")
    learn_temperature: bool = Field(True, description="Training of the temperature (similarity cosine only).")
    bias: bool = Field(
        True, description="Global bias, and a bias per value of each categorical feature, in columns of the vectors."
    )
    unknown_rate: float = Field(
        0.01, ge=0, lt=1, description="Share of categorical values replaced by the unknown value in training. 0: off."
    )
    user_id_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of a batch's users with an unknown id in training (DropoutNet). 0: off."
    )
    item_id_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of a batch's items with an unknown id in training (DropoutNet). 0: off."
    )
    embedding_std: float = Field(0.05, gt=0, description="Standard deviation of initial embeddings.")
    stacking: bool = Field(
        False, description="Weights of the terms of a score, fitted after training to validation labels. false: 1 each."
    )
    cold_item_bias: bool = Field(
        False, description="Bias of the items with an unknown id, fitted after training by train.monitor. false: 0."
    )


class TowerPair(nn.Module):
    """A user tower and an item tower, whose dot product is one term of the score."""

    def __init__(
        self, pair: PairConfig, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...],
        model: ModelConfig,
    ) -> None:  # fmt: skip
        """Build both towers. Raises ConfigError for settings that do not fit the fields."""
        super().__init__()
        of_user, of_item = (
            FieldTables(select_fields(fields, config.fields), config.width or model.width)
            for config, fields in ((pair.user, user_fields), (pair.item, item_fields))
        )
        same = (model.embedding_std, model.unknown_rate, model.bias)
        self.user = Tower(pair.user, user_fields, of_user, of_item, *same, model.user_id_dropout)
        self.item = Tower(pair.item, item_fields, of_item, of_user, *same, model.item_id_dropout)

    def tower(self, side: SideName) -> Tower:
        return self.user if side == "user" else self.item


class TwoTower(nn.Module):
    """Two-tower model with logits `user_vectors(users) @ item_vectors(items).T` (DSSM, Huang et al. 2013).

    The vectors of several pairs of towers are concatenated, so that their scores add up. A narrow layer makes short
    vectors of them. With biases the vectors are [v
    / T, b_u + b, 1] and [w, 1, b_i], T the temperature. Stacking weights v pair by pair, b_u by the second last and b_i
    by the last of `term_weights`, and adds the prior of the id to both. Cold items and terms that are biases add to
    b_i.
    """

    def __init__(
        self, config: ModelConfig, user_fields: tuple[InputField, ...], item_fields: tuple[InputField, ...],
        terms: Sequence[Term] = (),
    ) -> None:  # fmt: skip
        """Build all pairs of towers, and take `terms` that no tower computes. Raises ConfigError if the two vectors of
        a pair differ in width."""
        super().__init__()
        self.config = config
        self.pairs = nn.ModuleList()
        for number, pair in enumerate(config.pairs):
            made = TowerPair(pair, user_fields, item_fields, config)
            if made.user.size != made.item.size:
                raise ConfigError(
                    f"model.pairs.{number}: the user vector has width {made.user.size} and the item vector "
                    f"{made.item.size}; end both towers' layers with the same width, or add up the fields of a tower "
                    "without layers (join = 'sum')"
                )
            self.pairs.append(made)
        if config.bias:
            self.user_bias, self.item_bias = FirstOrder(user_fields), FirstOrder(item_fields)
            self.global_bias = nn.Parameter(torch.zeros(()))
        if config.stacking:
            n_terms = len(self.pairs) + (2 if config.bias else 0)
            self.term_weights = nn.Parameter(torch.ones(n_terms), requires_grad=False)
            if config.bias:
                self.user_prior, self.item_prior = IdPrior(user_fields), IdPrior(item_fields)
        self._fitted_biases: dict[SideName, list[Term]] = {"user": [], "item": []}
        if config.cold_item_bias:
            self.cold_items = IdPrior(item_fields, "cold_items")
            if self.cold_items.field is None:
                raise ConfigError(
                    "model.cold_item_bias is of items whose id reads as unknown, and no feature of the items is their "
                    "id without hash_buckets; add one, or set model.cold_item_bias = false"
                )
            self._fitted_biases["item"].append(self.cold_items)
        self.narrow: Narrow | None = None
        self.terms = nn.ModuleDict({re.sub(r"\W", "_", term.name): term for term in terms})
        self._fitted_biases["item"] += [term for term in terms if term.is_bias]
        self._id_columns = {
            side: _id_column(side, fields)
            for side, fields in zip(SIDES, (user_fields, item_fields), strict=True)
            if self._id_dropout(side)
        }
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)),
            requires_grad=config.learn_temperature and config.similarity == "cosine",
        )

    def codes(self, users: Inputs | None, items: Inputs | None) -> Iterator[tuple[Table, Int[Tensor, "n"]]]:
        """Yield (table, rows) for all table rows that the vectors of these inputs may read, with repeated tables."""
        for side, inputs in zip(SIDES, (users, items), strict=True):
            if inputs is None:
                continue
            for tower in self.towers(side):
                yield from tower.embeddings.codes(inputs)
                if tower.augmented is not None:
                    yield tower.augmented.table, tower.augmented.codes(inputs)
            if self.config.bias:
                bias = self.first_order(side)
                yield bias.table, bias.codes(inputs)

    def towers(self, side: SideName, pairs: Sequence[int] | None = None) -> list[Tower]:
        """Return the towers of `side`, of some `pairs` or of all."""
        towers = [pair.tower(side) for pair in self.pairs if isinstance(pair, TowerPair)]
        return towers if pairs is None else [towers[number] for number in pairs]

    def parts_of_pairs(self, pairs: Sequence[int] | None = None) -> list[slice]:
        """Return the columns of each pair in a vector of some `pairs` or of all, without columns of biases."""
        ends = list(accumulate((tower.size for tower in self.towers("user", pairs)), initial=0))
        return [slice(*part) for part in pairwise(ends)]

    def first_order(self, side: SideName) -> FirstOrder:
        """Return the first-order term of `side` in a model with biases."""
        return self.user_bias if side == "user" else self.item_bias

    def prior(self, side: SideName) -> IdPrior:
        """Return the values of the ids of `side` in a model with biases and stacking."""
        return self.user_prior if side == "user" else self.item_prior

    @property
    def bias_columns(self) -> bool:
        """True if the last two numbers of a vector are biases."""
        return self.config.bias or bool(self._fitted_biases["item"])

    @property
    def metric(self) -> Literal["cosine", "dot"]:
        """Metric of an index over the item vectors."""
        adds = self.bias_columns or self.config.stacking or len(self.terms) or self.narrow
        return "cosine" if self.config.similarity == "cosine" and not adds else "dot"

    @property
    def temperature(self) -> F32[Tensor, ""]:
        """Temperature T > 0: logits are cosines divided by T."""
        return self.log_temperature.exp()

    def user_vectors(self, inputs: Inputs, pairs: Sequence[int] | None = None) -> F32[Tensor, "U D"]:
        """Return v / T, with biases [v / T, b_u + b, 1], of some `pairs`, never narrow, or of all."""
        vectors, bias = self._side(inputs, "user", pairs)
        vectors = vectors / self.temperature
        if self.config.stacking:
            vectors = vectors * self._column_weights(pairs)
        if self.narrow is not None and pairs is None:
            vectors = self.narrow.users(vectors)
        if bias is None:
            return vectors
        if self.config.bias:
            bias = bias + self.global_bias
        return torch.cat([vectors, bias, torch.ones_like(bias)], 1)

    def item_vectors(self, inputs: Inputs, pairs: Sequence[int] | None = None) -> F32[Tensor, "I D"]:
        """Return w, with biases [w, 1, b_i], of some `pairs`, never narrow, or of all."""
        vectors, bias = self._side(inputs, "item", pairs)
        if self.narrow is not None and pairs is None:
            vectors = self.narrow.items(vectors, inputs)
        if bias is None:
            return vectors
        return torch.cat([vectors, torch.ones_like(bias), bias], 1)

    def forward(self, users: Inputs, items: Inputs, user: Int[Tensor, "B"], item: Int[Tensor, "B"]) -> F32[Tensor, "B"]:
        """Return the logits of the pairs (user[b], item[b]), indices of the U users and I items."""
        u, v = self.user_vectors(users), self.item_vectors(items)
        return (u.index_select(0, user) * v.index_select(0, item)).sum(1)

    def augmented(
        self, side: SideName, inputs: Inputs, vectors: F32[Tensor, "V N"], pairs: Sequence[int] | None = None
    ) -> list[tuple[Float[Tensor, "U _"], F32[Tensor, "V _"]]]:
        """Return for each tower of `side` with augmented vectors the augmented vectors of the rows, and their targets.

        The targets are its pair's part of the other side's `vectors` (of some `pairs` or of all): detached, without
        temperature, of length 1 with a cosine."""
        found, first = [], 0
        for tower in self.towers(side, pairs):
            if tower.augmented is not None:
                targets = vectors[:, first : first + tower.size].detach()
                scale = self.temperature.detach() if side == "item" else 1.0  # undoes the division by T
                found.append((tower.augmented(inputs, tower.unknown_rate), targets * scale))
            first += tower.size
        return found

    def _side(
        self, inputs: Inputs, side: SideName, pairs: Sequence[int] | None
    ) -> tuple[F32[Tensor, "U D"], F32[Tensor, "U 1"] | None]:
        """Return the concatenated vectors of the pairs, and the sum of the biases or None."""
        vectors, bias = [], None
        if self.training and side in self._id_columns:
            inputs = self._without_ids(inputs, side)
        if self.config.bias:
            bias = self.first_order(side)(inputs, self.config.unknown_rate)
        for tower in self.towers(side, pairs):
            vector, tower_bias = tower(inputs)
            vectors.append(vector.float())
            if bias is not None and tower_bias is not None:
                bias = bias + tower_bias.float()
        if bias is not None and self.config.stacking:
            bias = self.prior(side)(inputs, bias * self.term_weights[_BIAS_TERMS[side]])
        joined = torch.cat(vectors, 1) if len(vectors) > 1 else vectors[0]
        if self.bias_columns:
            bias = joined.new_zeros(len(joined), 1) if bias is None else bias
            for fitted in self._fitted_biases[side]:
                bias = fitted(inputs, bias)
        if self.config.similarity == "cosine":
            joined = normalize(joined)
        return joined, bias

    def _column_weights(self, pairs: Sequence[int] | None = None) -> F32[Tensor, "D"]:
        """Return the weight of each column of the pairs in a user vector."""
        numbers = range(len(self.pairs)) if pairs is None else pairs
        sizes = torch.tensor([tower.size for tower in self.towers("user", pairs)], device=self.term_weights.device)
        return self.term_weights[list(numbers)].repeat_interleave(sizes)

    def _id_dropout(self, side: SideName) -> float:
        return self.config.user_id_dropout if side == "user" else self.config.item_id_dropout

    def _without_ids(self, inputs: Inputs, side: SideName) -> Inputs:
        """Return the inputs with unknown ids in a random share of the rows."""
        unknown = torch.rand(len(inputs.lookup), device=inputs.lookup.device) < self._id_dropout(side)
        lookup = inputs.lookup.clone()
        lookup[:, self._id_columns[side]].masked_fill_(unknown, UNKNOWN)
        return replace(inputs, lookup=lookup)

    def exported_bytes(self, side: SideName) -> int:
        """Return the bytes of the weights in the graph of a side, without small constants."""
        biases = [self._modules[name] for name in (f"{side}_bias", f"{side}_prior") if name in self._modules]
        parts = filter(None, [*self.towers(side), *self._fitted_biases[side], *biases])
        own = sum(weight.numel() for part in parts for weight in part.parameters())
        if self.narrow is not None:
            own += sum(
                w.numel() for name, w in self.narrow.named_parameters() if (name == "user_map") == (side == "user")
            )
        return 4 * (own + sum(tower.embeddings.shared_numbers for tower in self.towers(side)))

    def lower(self, g: GraphBuilder, side: SideName, inputs: Mapping[str, str]) -> tuple[str, int]:
        """Build `user_vectors` or `item_vectors`; return the name and the width of the output.

        `inputs` maps each field that is no lookup to its input."""
        towers = self.towers(side)
        vectors, biases = zip(*(tower.lower(g, inputs, number) for number, tower in enumerate(towers)), strict=True)
        joined, width = g.concat(vectors), sum(tower.size for tower in towers)
        if self.config.similarity == "cosine":
            square = g("Max", g.reduce("SumSquare", joined, 1), g.constant(1e-12))
            joined = g("Div", joined, g("Sqrt", square))
        if side == "user":
            joined = g("Div", joined, g.constant(self.temperature.item()))
        if side == "user" and self.config.stacking:
            joined = g("Mul", joined, g.constant(self._column_weights()))
        if self.narrow is not None:
            joined, width = self.narrow.lower(g, side, joined), self.narrow.width
        if not self.bias_columns:
            return joined, width
        if self.config.bias:
            bias = self.first_order(side).lower(g, joined)
            for tower_bias in filter(None, biases):
                bias = g("Add", bias, tower_bias)
            if self.config.stacking:
                bias = self.prior(side).lower(g, g("Mul", bias, g.constant(self.term_weights[_BIAS_TERMS[side]])))
            if side == "user":
                bias = g("Add", bias, g.constant(self.global_bias))
        else:
            bias = g.filled(g.reduce("Sum", joined, 1), 0.0)
        for fitted in self._fitted_biases[side]:
            bias = fitted.lower(g, bias)
        ones = g.filled(bias, 1.0)
        return g.concat([joined, bias, ones] if side == "user" else [joined, ones, bias]), width + 2


def _id_column(side: SideName, fields: tuple[InputField, ...]) -> int:
    """Return the column of the side's ids. Raises ConfigError if there is none, or no other field."""
    for number, f in enumerate(stacked(fields)):
        if f.identifies and len(fields) == 1:
            raise ConfigError(
                f"model.{side}_id_dropout leaves a row only its unknown id, as '{f.name}' is the only feature of the "
                f"{side}s; add others, or leave it out"
            )
        if f.identifies:
            return number
    raise ConfigError(
        f"model.{side}_id_dropout needs a categorical feature over the id column of the {side}s, without hash_buckets; "
        "add one to schema.features, or leave it out"
    )


@contextmanager
def evaluation_mode(model: TwoTower) -> Iterator[None]:
    """Run the body in evaluation mode and without gradients, then restore the model's mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class FirstOrder(nn.Module):
    """First-order term Σ_f w_f[code_f] over the lookup fields f (factorisation machine, Rendle 2010, equation 1)."""

    first_rows: Tensor

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        super().__init__()
        self.fields = stacked(fields)
        rows = [f.rows for f in self.fields]
        self.register_buffer("first_rows", torch.tensor([sum(rows[:i]) for i in range(len(rows))]), persistent=False)
        self.table: Table = Table(max(1, sum(rows)), 1)
        self.table.initialize(0)

    def forward(self, inputs: Inputs, unknown_rate: float = 0.0) -> Float[Tensor, "U 1"]:
        """Return the sums; in training the unknown code replaces a share `unknown_rate` of the codes."""
        codes = inputs.lookup
        if self.training:
            codes = with_unknown(codes, unknown_rate)
        out: Tensor = self.table(codes + self.first_rows.long()).sum(1)
        return out

    def rows_of(self, name: str) -> Float[Tensor, "rows 1"]:
        """Return the biases of the values of a field."""
        number = next(n for n, f in enumerate(self.fields) if f.name == name)
        return self.table.rows(int(self.first_rows[number]), self.fields[number].rows)

    def codes(self, inputs: Inputs) -> Int[Tensor, "n"]:
        """Return the table rows that `forward` may read."""
        first_rows = self.first_rows.long()
        return torch.cat([(inputs.lookup + first_rows).flatten(), first_rows + UNKNOWN])

    def lower(self, g: GraphBuilder, like: str) -> str:
        """Build `forward`, with the rows of the value `like` (U, D)."""
        if not len(self.first_rows):
            return g.filled(g.reduce("Sum", like, 1), 0.0)
        codes = g("Add", "lookup", g.constant(self.first_rows))
        return g.reduce("Sum", g("Gather", g.constant(self.table.weight.flatten(), "linear"), codes, axis=0), 1)
