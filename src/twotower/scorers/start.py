"""Protocol of the starts: closed-form values of a pair of towers."""

from __future__ import annotations

import collections.abc
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import F32, Codes, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.features.feature import Feature, Interactions
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.side import SIDES, SideName
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import ModelConfig, PairConfig
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.scorer import AddedScorer, Addition

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


MOST = 0.9
"""Share of the positives that common items have."""


def common_items(counts: Shaped[Ints, "I"]) -> int:
    """Return the least number of items that have MOST of the positives, by the number of positives of each."""
    falling = np.sort(counts)[::-1].cumsum()
    return int(np.searchsorted(falling, MOST * falling[-1])) + 1 if len(falling) and falling[-1] else 0


def history_of_positives(name: str, pooling: PoolingSpec, interactions: Interactions = "positive") -> Sequence:
    """Return a history of the users with a table of its own."""
    return Sequence(name=name, side="user", interactions=interactions, share_embedding=False, pooling=pooling)


@dataclass(frozen=True)
class PairValues:
    """Values of a pair: a user's vector is pooled `source` rows of the history, or the sum of one row of each field, an
    item's vector its row of `targets`, or the sum of one row of each. A code is a row; the score of user and item is
    their product."""

    source: F32[Tensor, "codes E"]
    """Rows of the history, or of the first field of a user tower that adds its fields up."""
    targets: tuple[F32[Tensor, "_ F"], ...]
    """Rows of each field of the item tower, in its order. F is E for each piece of the pooling."""
    penalty: F32[Tensor, "E E"] | None = None
    rate: float = 0.0
    """Penalties of a pooling `ridge`, with `penalty`."""
    alternative: tuple[F32[Tensor, "_ F"], ...] = ()
    """Rows of the fields of the item tower by a second closed form, which has weights of its own where the parts of a
    pair are weighed. Empty: none."""
    further: tuple[F32[Tensor, "_ E"], ...] = ()
    """Rows of the other fields of such a user tower, in its order."""


class Start(AddedScorer):
    """Values of a pair of towers in closed form, from the training positives and their weights.

    The pair's user tower reads one history of item ids and its item tower the item's id, or what a kind reads in its
    place or in addition, both without layers, so its score is that of the closed form, for users without any training
    too. An unknown value gets zeros.

    With `learn` the values are solved before the first step. Else they are solved after the last step, and the mix
    weights the pair's score (`train/mix.py`). Of several values of an option, validation keeps the best one by the pair
    alone, or a better one between or beyond them.
    """

    poolings: ClassVar[tuple[str, ...]] = ()
    """Kinds of poolings of the history under which the score is that of the closed form."""
    pools: ClassVar[PoolingSpec] = PoolingSpec(kind="ridge")
    """Pooling of the history that a scorer reads."""
    choices: ClassVar[tuple[str, ...]] = ()
    """Options of several values, of which the one that is best on the validation part is kept."""
    compares_by_few: ClassVar[bool] = False
    """True if the values of `choices` that are best for some of the users are nearly so for all, so that of very many
    positives those of some compare them."""
    shares: ClassVar[bool] = False
    """True if source and target are one table's rows, which the history may share."""
    adds_columns: ClassVar[bool] = False
    """True if the item tower adds up columns, in place of the id or in addition to it."""
    adds_users: ClassVar[bool] = False
    """True if the user tower adds up columns in place of a history."""
    reads_ids: ClassVar[bool] = False
    """True if the id of the items may be one of the columns."""
    weighs_parts: ClassVar[bool] = False
    """True if the parts of the pair's vectors, one for each column of the items and piece of the pooling, or column of
    the users, have weights of their own in a model of several pairs."""
    pair: int = Field(0, ge=0, description="Number of the pair of model.pairs that starts so, from 0.")
    learn: bool = Field(
        True,
        description="Training of the pair from its start on. false: it keeps its values, and the mix weights its "
        "scores.",
    )
    scale: float = Field(
        1.0, gt=0, description="Factor of the pair's scores before the first step, relative to others and in a softmax."
    )

    width: int = Field(128, ge=1, description="Width of the vectors of a scorer, in numbers for each rate of decay.")

    def addition(self, schema: Schema, name: str, pair: int) -> Addition:
        histories, fields = self.histories(schema, name), {side: self.columns_of(side, schema) for side in SIDES}
        for side in SIDES if self.adds_users else SIDES[1:]:
            if not fields[side]:
                of_id = side == "item" and (self.reads_ids or not self.adds_columns)
                what = "the id of the items, without hash_buckets" if of_id else f"columns of the {side}s"
                raise ConfigError(
                    f"the scorer '{self.kind}' reads {what}, and schema.features has none; add one, or leave the "
                    "scorer out"
                )
        pieces = resolve(histories[0].pooling).pieces if histories else 1
        of_user = fields["user"] or tuple(history.name for history in histories)
        user, item = (
            TowerConfig(fields=names, width=width, layers=())
            if len(names) == 1
            else TowerConfig(fields=names, width=width, layers=(), join="sum", activation="Identity")
            for names, width in ((of_user, self.width), (fields["item"], self.width * pieces))
        )
        start = self.model_copy(update={"pair": pair, "learn": False})
        return Addition(tuple(histories), PairConfig(user=user, item=item), start)

    def histories(self, schema: Schema, name: str) -> list[Sequence]:
        """Return the histories that the user tower of a scorer reads."""
        return [] if self.adds_users else [history_of_positives(name, self.pools)]

    def columns_of(self, side: SideName, schema: Schema) -> tuple[str, ...]:
        """Return the names of the features that the tower of a scorer reads, apart from histories."""
        own = schema.id_feature(side)
        return (own.name,) if own and side == "item" else ()

    def alternatives(self) -> list[Start]:
        """Return a start for each combination of the values of `choices`."""
        values = [[(value,) for value in getattr(self, name)] for name in self.choices]
        return [self.model_copy(update=dict(zip(self.choices, chosen, strict=True))) for chosen in product(*values)]

    def is_exact(self, users: int, items: int, common: int) -> bool:
        """Return True if the closed form is solved for so many users, who have positives, and items, `common` of which
        have most positives (`common_items`); False if something else stands in for it, on which `choices` have no
        influence."""
        return True

    def has_choice(self, dataset: Dataset, model: ModelConfig) -> bool:
        """Return True if the values for this data depend on the values of `choices`."""
        by_user, items = dataset.positives_by_user, dataset.pairs.item
        of_pairs = distinct_keys(
            pair_keys(by_user.owners, items[by_user.values], len(dataset.items))
        )  # repeats are one
        users, counts = int(np.count_nonzero(by_user.lengths)), np.bincount(of_pairs % max(1, len(dataset.items)))
        return self.is_exact(users, self.n_codes(dataset, model) - 1, common_items(counts))

    def beyond(self, best: Start) -> list[Start]:
        """Return `best` with the next value outwards, for each option of several values whose outermost, or one beyond,
        it has: in the ratio of the two outermost, if neither is 0."""
        found = list[Start]()
        for name in self.several:
            values, at = sorted(set(getattr(self, name))), best.value_of(name)
            outer, inner = values[:2] if at <= values[0] else values[:-3:-1]
            if min(outer, inner) and (at <= values[0] or at >= values[-1]):
                ratio = outer / inner
                found.append(best.model_copy(update={name: (at * ratio,)}))
        return found

    def between(self, best: Start, tried: Iterable[Start]) -> list[Start]:
        """Return `best` with other values of one or several options: the geometric mean of its own and either neighbour
        among those tried. Options often make up for one another, so that two change at once."""
        choices: list[list[tuple[str, float]]] = []
        for name in self.several:
            at, values = best.value_of(name), {one.value_of(name) for one in tried}
            beside = max((v for v in values if v < at), default=0.0), min((v for v in values if v > at), default=0.0)
            choices.append([(name, at), *((name, (at * value) ** 0.5) for value in beside if at and value)])
        return [best.model_copy(update={name: (value,) for name, value in chosen}) for chosen in product(*choices)][1:]

    def value_of(self, name: str) -> float:
        """Return the first value of an option of `choices`."""
        return float(getattr(self, name)[0])

    @classmethod
    def default_of(cls, name: str) -> float:
        """Return the default of an option of `choices`."""
        return float(cls.model_fields[name].default[0])

    @property
    def several(self) -> list[str]:
        """Options of several values."""
        return [name for name in self.choices if len(set(getattr(self, name))) > 1]

    def describe(self) -> str:
        """Return the first values of `choices`, for messages."""
        return ", ".join(f"{name} = {getattr(self, name)[0]:g}" for name in self.choices)

    @abstractmethod
    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        """Return values of this width E under the history's pooling, by the first of several values of an option.
        Deterministic by `seed`."""

    def check(self, dataset: Dataset, model: ModelConfig, is_weighted: bool = False) -> None:
        """Raise ConfigError if the pair cannot start so, or its score cannot be weighted."""
        key = f"train.start of kind '{self.kind}'"
        if model.similarity != "dot":
            raise ConfigError(f"{key} needs a plain product; set model.similarity = 'dot'")
        towers: dict[SideName, TowerConfig] = {
            "user": model.pairs[self.pair].user,
            "item": model.pairs[self.pair].item,
        }
        for side, tower in towers.items():
            plain = not (tower.layers or tower.branches or tower.senet.enabled or tower.augment or tower.field_norm)
            adds = self._adds(side) and tower.activation == "Identity" and not tower.layer_norm
            if not plain or tower.output_norm or not (tower.join == "concat" or adds):
                raise self.needs_plain(side)
        self.check_users(dataset, model, is_weighted)
        if self.several and not len(dataset.validation):
            raise ConfigError(
                f"{key} chooses among several values of {', '.join(self.several)} on the validation part, and the "
                "split has none; give one value each, or a validation part"
            )
        self.check_items(dataset, model)

    def check_users(self, dataset: Dataset, model: ModelConfig, is_weighted: bool) -> None:
        """Raise ConfigError if the start does not go with what the pair's user tower reads: a history of items that
        users took."""
        key, history = f"train.start of kind '{self.kind}'", self.history(dataset, model)
        spec, pools = history.history, history.pools
        assert spec is not None
        assert pools is not None
        if resolve(pools).kind not in self.poolings:
            raise ConfigError(
                f"{key} needs a history with pooling = {' or '.join(repr(p) for p in self.poolings)}; feature "
                f"'{history.name}' has '{pools.kind}'"
            )
        if spec.share_embedding and not self.shares:
            raise ConfigError(
                f"{key} gives items other vectors in a history than as targets; set share_embedding = false of "
                f"feature '{history.name}'"
            )
        if spec.share_embedding and (self.scale != 1 or is_weighted):
            reason = "the mix weights its score" if is_weighted else f"scale = {self.scale:g}"
            raise ConfigError(
                f"{key}: {reason}, which needs a table of the history's own; set share_embedding = false of feature "
                f"'{history.name}'"
            )
        if spec.interactions == "negative" or (spec.interactions == "all" and not dataset.train.labels.all()):
            raise ConfigError(
                f"{key} is solved from positives, and feature '{history.name}' holds {spec.interactions} "
                "interactions, which a user's vector would add up as if they were liked; set its interactions = "
                "'positive'"
            )

    def needs_plain(self, side: SideName) -> ConfigError:
        """Return the error of a tower that is more than its field, or the sum of its columns."""
        adds = self._adds(side)
        return ConfigError(
            f"train.start of kind '{self.kind}' needs "
            + (
                f"{'an' if side == 'item' else 'a'} {side} tower that is the sum of its fields"
                if adds
                else "towers that are their one field"
            )
            + f"; set model.pairs.{self.pair}.{side} = {{ fields = […], "
            + ("join = 'sum', activation = 'Identity', " if adds else "")
            + "layers = [] } without other options"
        )

    def _adds(self, side: SideName) -> bool:
        """Return True if the pair's tower of a side adds up columns."""
        return self.adds_columns if side == "item" else self.adds_users

    def check_items(self, dataset: Dataset, model: ModelConfig) -> None:
        """Raise ConfigError if the start does not go with what the pair's item tower reads: the id, with the codes of
        the history."""
        _, found = self._fields("item", dataset, model)
        self._check_ids(found, dataset, model)

    def _check_ids(self, found: collections.abc.Sequence[Feature], dataset: Dataset, model: ModelConfig) -> None:
        """Raise ConfigError unless one feature of the pair's item tower is the id, with the codes of the history."""
        if len(found) != 1 or found[0] != dataset.schema.id_feature("item"):
            raise self._needs_one("item", "the categorical feature of the item ids", dataset, model)
        history, item = self.history(dataset, model), found[0]
        if not (self.item_codes(dataset, model) == dataset.items.columns[item.name]).all():
            raise ConfigError(
                f"train.start of kind '{self.kind}': the codes of feature '{item.name}' are not those of history "
                f"'{history.name}'; leave min_count and hash_buckets of the item's id at their defaults"
            )

    def history(self, dataset: Dataset, model: ModelConfig) -> Feature:
        """Return the history that the pair's user tower reads. Raises ConfigError."""
        _, found = self._fields("user", dataset, model)
        spec = found[0].history if len(found) == 1 else None
        if spec is None or spec.feature:
            raise self._needs_one("user", "a sequence of item ids", dataset, model)
        return found[0]

    def _fields(self, side: SideName, dataset: Dataset, model: ModelConfig) -> tuple[tuple[str, ...], list[Feature]]:
        """Return the names of the fields that a tower of the pair reads, and the features that are there."""
        features, pair = {f.name: f for f in dataset.schema.tower(side)}, model.pairs[self.pair]
        names = (pair.user if side == "user" else pair.item).fields or tuple(features)
        return names, [features[name] for name in names if name in features]

    def _needs_one(self, side: SideName, what: str, dataset: Dataset, model: ModelConfig) -> ConfigError:
        names, _ = self._fields(side, dataset, model)
        return ConfigError(
            f"train.start of kind '{self.kind}' needs one field in model.pairs.{self.pair}.{side}.fields, {what}; it "
            f"has {', '.join(names) or 'none'}"
        )

    def positives(self, dataset: Dataset, model: ModelConfig) -> PositiveMatrix:
        """Return the positives that the pair's values are solved from."""
        return PositiveMatrix.of(dataset, self.item_codes(dataset, model), self.n_codes(dataset, model))

    def item_codes(self, dataset: Dataset, model: ModelConfig) -> Shaped[Codes, "items"]:
        """Return the code of each item among the positives: that of the pair's history."""
        spec = self.history(dataset, model).history
        assert spec is not None
        return dataset.encoders.history_codes(spec, dataset.items.frame)

    def n_codes(self, dataset: Dataset, model: ModelConfig) -> int:
        """Return the number of codes of the items, the unknown one too."""
        name = self.history(dataset, model).name
        return next(f.rows for f in dataset.encoders.fields("user") if f.name == name)
