"""Protocol of the closed forms: values of a pair of towers that no step trains."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32, Codes, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.features.feature import Interactions
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.pooling import resolve
from twotower.model.pooling.pooling import Pooling
from twotower.model.towers import TowerConfig
from twotower.model.two_tower import ModelConfig, PairConfig
from twotower.scorers.positives import PositiveMatrix
from twotower.scorers.scorer import AddedScorer, Addition

Positive = Annotated[float, Field(gt=0)]

MOST = 0.9
"""Share of the positives that common items have."""
MAX_ROUNDS = 8
"""Steps beyond the values that are given."""
FINER = 0.5, 0.25
"""Lengths of the last steps, in the exponent of the ratio of neighbouring values."""
CLOSE = 0.01
"""Share of the best score within which another one is as good, as far as a validation part tells."""


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
    """Rows of the first field of the user tower."""
    targets: tuple[F32[Tensor, "_ F"], ...]
    """Rows of each field of the item tower, in its order. F is E for each piece of the pooling."""
    penalty: F32[Tensor, "E E"] | None = None
    rate: float = 0.0
    """Penalties of a pooling `ridge`, with `penalty`."""
    further: tuple[F32[Tensor, "_ E"], ...] = ()
    """Rows of further fields of the user tower, in its order, if it has these."""


class Start(AddedScorer):
    """A product of vectors in closed form, from the training positives and their weights.

    It is a pair of towers without layers: the user tower reads histories of item ids, and the item tower the item's id
    or columns, so that it scores for users without any training too. An unknown value gets zeros. The values are solved
    after the last step, and the mix weights the pair's score (`train/mix.py`). Of several values of an option,
    validation keeps the best one by the pair alone, or a better one near them (`search`).
    """

    pools: ClassVar[PoolingSpec] = PoolingSpec(kind="ridge")
    """Pooling of the histories."""
    reads_columns: ClassVar[bool] = False
    """True if the item tower reads columns in place of the id."""
    needs_time: ClassVar[bool] = False
    """True if the order of a history counts."""
    choices: ClassVar[tuple[str, ...]] = ()
    """Options of several values, of which the one that is best on the validation part is kept."""

    width: int = Field(128, ge=1, description="Width of the vectors of a scorer, in numbers for each rate of decay.")

    def addition(self, schema: Schema, name: str) -> Addition:
        if self.needs_time and not schema.time:
            raise ConfigError(
                f"the scorer '{self.kind}' reads what follows what, and schema.time is empty; set it to a column, or "
                "leave the scorer out"
            )
        histories = tuple(self.histories(schema, name))
        if not (of_item := self.columns_of(schema)):
            what = "columns of the items" if self.reads_columns else "the id of the items, without hash_buckets"
            raise ConfigError(
                f"the scorer '{self.kind}' reads {what}, and schema.features has none; add one, or leave the scorer out"
            )
        pieces, of_user = resolve(histories[0].pooling).pieces, tuple(one.name for one in histories)
        return Addition(histories, PairConfig(user=_sum(of_user, self.width), item=_sum(of_item, self.width * pieces)))

    def histories(self, schema: Schema, name: str) -> list[Sequence]:
        """Return the histories that the user tower reads."""
        return [history_of_positives(name, self.pools)]

    def columns_of(self, schema: Schema) -> tuple[str, ...]:
        """Return the names of the features that the item tower reads."""
        own = schema.id_feature("item")
        return (own.name,) if own else ()

    def alternatives(self) -> list[Self]:
        """Return a closed form for each combination of the values of `choices`."""
        return [self.with_values(chosen) for chosen in product(*(getattr(self, name) for name in self.choices))]

    def with_values(self, chosen: tuple[float, ...]) -> Self:
        """Return the closed form by one value of each of `choices`."""
        return self.model_copy(update={name: (value,) for name, value in zip(self.choices, chosen, strict=True)})

    @property
    def values(self) -> tuple[float, ...]:
        """First value of each of `choices`."""
        return tuple(getattr(self, name)[0] for name in self.choices)

    @property
    def several(self) -> list[str]:
        """Options of several values."""
        return [name for name in self.choices if len(set(getattr(self, name))) > 1]

    def describe(self) -> str:
        """Return the first values of `choices`, for messages."""
        return ", ".join(f"{name} = {value:g}" for name, value in zip(self.choices, self.values, strict=True))

    def is_solved(self, items: int, common: int) -> bool:
        """Return True if the closed form can be solved for so many items, of which `common` have most positives
        (`common_items`)."""
        return True

    @abstractmethod
    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        """Return values of this width E under the history's pooling, by the first of several values of an option.
        Deterministic by `seed`. Raises TrainingError if the positives tell nothing."""

    def check(self, dataset: Dataset, model: ModelConfig, pair: int) -> None:
        """Raise ConfigError if the pair of this number cannot be solved."""
        if model.similarity != "dot":
            raise ConfigError(f"the scorer '{self.kind}' is a plain product; set model.similarity = 'dot'")
        if self.several and not len(dataset.validation):
            raise ConfigError(
                f"the scorer '{self.kind}' chooses among several values of {', '.join(self.several)} on the validation "
                "part, and the split has none; give one value each, or a validation part"
            )
        own, fields = dataset.schema.id_feature("item"), model.pairs[pair].item.fields
        if own and own.name in fields:
            codes, _ = self.item_codes(dataset, model.pairs[pair])
            if not (codes == dataset.items.columns[own.name]).all():
                raise ConfigError(
                    f"the scorer '{self.kind}': the codes of feature '{own.name}' are not those of a history; leave "
                    "min_count and hash_buckets of the item's id at their defaults"
                )

    def positives(self, dataset: Dataset, pair: PairConfig) -> PositiveMatrix:
        """Return the positives that the values of a pair are solved from."""
        return PositiveMatrix.of(dataset, *self.item_codes(dataset, pair))

    def item_codes(self, dataset: Dataset, pair: PairConfig) -> tuple[Shaped[Codes, "items"], int]:
        """Return the code of each item among the positives, which is that of the pair's history, and the number of
        codes, the unknown one too."""
        name = pair.user.fields[0]
        history = next(f.history for f in dataset.schema.tower("user") if f.name == name)
        assert history is not None
        rows = next(field.rows for field in dataset.encoders.fields("user") if field.name == name)
        return dataset.encoders.history_codes(history, dataset.items.frame), rows


def _sum(fields: tuple[str, ...], width: int) -> TowerConfig:
    """Return a tower whose vector is its field, or the sum of its fields."""
    if len(fields) == 1:
        return TowerConfig(fields=fields, width=width, layers=())
    return TowerConfig(fields=fields, width=width, layers=(), join="sum", activation="Identity")


def search(start: Start, score: Callable[[Start], float]) -> Start:
    """Return the closed form by the values of the highest score: of all that are given; while it gets better, of values
    a step from the best, one option at a time, in the ratio of those given; at last of values a half and then a quarter
    of a step from it, of several options at once, as they may make up for one another. The quarter steps also begin at
    the second best, if it is as good. Where by each option a step from the best changes next to nothing, there are no
    such values.

    A score is minus infinity for values that cannot be solved; if all given are so, one of them is returned."""
    scores, known = dict[str, float](), dict[str, Start]()
    given = [sorted(set(getattr(start, name))) for name in start.choices]
    ratios = [(values[-1] / values[0]) ** (1 / max(1, len(values) - 1)) for values in given]

    def improves(tried: Iterable[Start]) -> bool:
        """Try closed forms, and return True if one of them is better than all before by more than CLOSE."""
        before = max(scores.values(), default=-math.inf)
        for one in tried:
            if (name := one.describe()) not in scores:
                scores[name], known[name] = score(one), one
        best = max(scores.values())
        return best > before and not is_level(best, before)

    def is_level(best: float, other: float) -> bool:
        return best - other <= CLOSE * abs(best)

    def leaders() -> list[Start]:
        """Return the best, and the second best if it is as good."""
        first, *others = sorted(scores, key=lambda name: -scores[name])  # of equal ones the first that was tried
        least = scores[first] - CLOSE * abs(scores[first])
        return [known[first], *(known[name] for name in others[:1] if scores[name] >= least)]

    def moved(one: Start, step: float, signs: tuple[int, ...]) -> Start:
        """Return a closed form whose options are changed by a step up, down or not at all."""
        factors = [r ** (step * sign) for r, sign in zip(ratios, signs, strict=True)]
        return one.with_values(tuple(v * f for v, f in zip(one.values, factors, strict=True)))

    def around(one: Start, step: float, at_once: int) -> list[Start]:
        """Return the neighbours a step away, in so many options at once."""
        every = product((-1, 0, 1), repeat=len(ratios))
        return [moved(one, step, signs) for signs in every if sum(map(abs, signs)) <= at_once]

    def is_flat(option: int) -> bool:
        """Return True if a neighbour a step away by an option is level with the best."""
        best = leaders()[0]
        steps = (tuple(sign * (o == option) for o in range(len(ratios))) for sign in (-1, 1))
        near = (scores.get(moved(best, 1.0, signs).describe(), -math.inf) for signs in steps)
        return any(is_level(scores[best.describe()], score) for score in near)

    if improves(start.alternatives()):
        for _ in range(MAX_ROUNDS):
            if not improves(around(leaders()[0], 1.0, 1)):
                break
        if all(map(is_flat, range(len(ratios)))):
            return leaders()[0]
        half, quarter = FINER
        improves(around(leaders()[0], half, len(ratios)))
        improves([near for one in leaders() for near in around(one, quarter, len(ratios))])
    return leaders()[0]
