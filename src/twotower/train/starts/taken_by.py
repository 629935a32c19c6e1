"""Start `taken_by`: which items took a user, where users are items too."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch

from twotower.arrays.types import Codes, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.features.side import SideName
from twotower.model.pooling.pooling import Pooling
from twotower.model.two_tower import ModelConfig
from twotower.train.starts.positives import PositiveMatrix
from twotower.train.starts.start import PairValues, Start


@dataclass(frozen=True)
class PositivesOfBoth(PositiveMatrix):
    """Positives of the users, a column for each row of the items from 1 on, with the users that are items."""

    users: Shaped[Ints, "B"] = field(kw_only=True)
    items: Shaped[Ints, "B"] = field(kw_only=True)
    """Rows of the users that are items too, and of these items."""
    user_codes: Shaped[Codes, "B"] = field(kw_only=True)
    item_codes: Shaped[Codes, "B"] = field(kw_only=True)
    """Their codes in the tables of ids."""
    rows: tuple[int, int] = field(kw_only=True)
    """Numbers of codes of the users and of the items, the unknown one too."""


class TakenBy(Start):
    """Flags of the items that took the user: the score is 1, or the weight of the positive, of an item that is a user too, by the
    same id, and took in training the item that the user is; 0 of others. A friend names a friend, a word the word that names it,
    a page one that links to it.

    The user tower reads the user's id and the item tower the item's, both alone. A user's vector is a direction of its own, an
    item's the sum of those of what it took as a user: an axis for each such id that was taken up to the width, and above it random
    signs, by which a score errs by the root of the number of what the item took over the width. Use it beside other pairs,
    weighed by `blend`, where users are items and pairs stand the other way round more often than by chance. Users and items that
    training lacks have a score of 0.
    """

    kind = "taken_by"

    def check_users(self, dataset: Dataset, model: ModelConfig) -> None:
        self._check_id("user", dataset, model)

    def check_items(self, dataset: Dataset, model: ModelConfig) -> None:
        self._check_id("item", dataset, model)

    def _check_id(self, side: SideName, dataset: Dataset, model: ModelConfig) -> None:
        """Raise ConfigError unless the pair's tower of a side reads the id alone."""
        _, found = self._fields(side, dataset, model)
        if len(found) != 1 or found[0] != dataset.schema.id_feature(side):
            raise self._needs_one(side, f"the categorical feature of the {side} ids", dataset, model)

    def item_codes(self, dataset: Dataset, model: ModelConfig) -> Shaped[Codes, "items"]:
        return np.arange(1, len(dataset.items) + 1, dtype=np.int32)

    def n_codes(self, dataset: Dataset, model: ModelConfig) -> int:
        return len(dataset.items) + 1

    def positives(self, dataset: Dataset, model: ModelConfig) -> PositivesOfBoth:
        found = super().positives(dataset, model)
        users, items = (dataset.side(side).ids.cast(pl.String).alias("id").to_frame() for side in ("user", "item"))
        both = users.with_row_index("user").join(items.with_row_index("item"), on="id", maintain_order="left")
        of_user, of_item = (both[name].cast(pl.Int64).to_numpy(writable=True) for name in ("user", "item"))
        (user_codes, n_users), (item_codes, n_items) = (_codes(dataset, side) for side in ("user", "item"))
        return PositivesOfBoth(
            found.columns, found.offsets, found.values, found.n_columns, found.histories, users=of_user, items=of_item,
            user_codes=user_codes[of_user], item_codes=item_codes[of_item], rows=(n_users, n_items),
        )  # fmt: skip

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        assert isinstance(positives, PositivesOfBoth)
        by_users = np.isin(positives.owners, positives.users)
        taken = np.flatnonzero(np.isin(positives.items + 1, positives.columns[by_users]))  # others need no direction
        if not len(taken):
            raise TrainingError(
                f"train.start of kind '{self.kind}' finds no user that is an item too and took another one; leave the start and its pair out"
            )
        vectors = torch.eye(len(taken), width)
        if len(taken) > width:
            generator = torch.Generator().manual_seed(seed)
            vectors = (torch.randint(0, 2, (len(taken), width), generator=generator) * 2 - 1) / width**0.5
        own, directions = torch.zeros(len(positives.users), width), torch.zeros(positives.n_columns, width)
        own[torch.from_numpy(taken)] = vectors
        directions[torch.from_numpy(positives.items[taken] + 1)] = vectors
        took = positives.product(directions)[torch.from_numpy(positives.users)]
        tables = [torch.zeros(rows, width) for rows in positives.rows]
        codes = (positives.user_codes, positives.item_codes)
        for table, code, rows in zip(tables, codes, (own, took), strict=True):
            table.index_add_(0, torch.from_numpy(code.astype(np.int64)), rows)
        return PairValues(tables[0], (tables[1],))


def _codes(dataset: Dataset, side: SideName) -> tuple[Shaped[Codes, "rows"], int]:
    """Return the code of the id of each row of a side, and the number of codes."""
    feature = dataset.schema.id_feature(side)
    assert feature is not None
    codes = np.asarray(dataset.side(side).columns[feature.name]).astype(np.int32)
    return codes, next(one.rows for one in dataset.encoders.fields(side) if one.name == feature.name)
