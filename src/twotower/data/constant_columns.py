"""Columns of a log that are functions of the item, or of the user."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from twotower.arrays.pieces import pieces
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Ints
from twotower.data.context import numbered
from twotower.data.dataset import Dataset

MIN_SHARE = 0.99
"""Share of the rows that have the most frequent value of their id, from which a column is a function of the id."""
MIN_IDS = 20
"""Ids, at least, whose most frequent value is another than that of the whole log."""
MAX_LEFT = 0.1
"""Largest ratio of the rows without the most frequent value of their id to the rows without that of the log. A value
that nearly all rows have says nothing of an id."""
MAX_ROWS, MAX_OF_ITEM = 500_000, 100
"""Training interactions that are measured; of more, those of some items, and about so many of each."""


class Constancy(NamedTuple):
    """Numbers of rows with a value of a column: one for each pair of ids, where the id has two or more."""

    rows: int = 0
    same: int = 0
    """Rows with the most frequent value of their id."""
    common: int = 0
    """Rows with the most frequent value of all."""
    ids: int = 0
    """Ids whose most frequent value is another than that of all."""

    @property
    def share(self) -> float:
        """Share of the rows with the most frequent value of their id."""
        return self.same / max(self.rows, 1)

    @property
    def explains(self) -> bool:
        """True if enough ids predict the values better than the most frequent value of all does."""
        return self.ids >= MIN_IDS and self.rows - self.same <= MAX_LEFT * (self.rows - self.common)

    @property
    def exists(self) -> bool:
        """True if the column is a function of the id."""
        return self.share >= MIN_SHARE and self.explains


def measure_constancy(values: pl.Series, ids: pl.Series, others: pl.Series) -> Constancy:
    """Return how far the values (n,) of a column are a function of ids (n,). A pair of ids counts once: a user who
    takes an item ten times on one device says nothing of the item. Rows without a value or an id are left out."""
    values, ids = (s.fill_nan(None) if s.dtype.is_float() else s for s in (values, ids))
    rows = pl.DataFrame({"id": ids, "other": others, "value": values.hash(), "missing": values.is_null()})
    rows = rows.filter(~pl.col("missing") & pl.col("id").is_not_null()).unique(["id", "other"], keep="first")
    counts = rows.group_by("id", "value").agg(n=pl.len()).filter(pl.col("n").sum().over("id") > 1)
    if not len(counts):
        return Constancy()
    total = counts.group_by("value").agg(pl.col("n").sum()).sort("n", "value", descending=True).row(0, named=True)
    is_common = pl.col("value") == total["value"]
    of_id = counts.group_by("id").agg(most=pl.col("n").max(), common=pl.col("n").filter(is_common).sum())
    rows_of_ids, same = int(counts["n"].sum()), int(of_id["most"].sum())
    return Constancy(rows_of_ids, same, int(total["n"]), int((of_id["most"] > of_id["common"]).sum()))


def contexts_of_items(dataset: Dataset) -> dict[str, Constancy]:
    """Return the features of the context that are functions of the item in the training interactions: a request cannot
    know them before the item. Text, which may be a search for the item, and what is computed from times are not
    measured."""
    features = [f for f in dataset.schema.side("context") if not (f.searchable or f.reads_time)]
    if not features:
        return {}
    rows = _some_rows(dataset)
    user, item = (pl.Series(column[rows]) for column in (dataset.pairs.user, dataset.pairs.item))
    found = {f.name: measure_constancy(_values(dataset.context[f.name], rows), item, user) for f in features}
    return {name: constancy for name, constancy in found.items() if constancy.exists}


def _some_rows(dataset: Dataset, max_rows: int = MAX_ROWS, max_of_item: int = MAX_OF_ITEM) -> Ints:
    """Return the indices of the training interactions; of more than `max_rows` about `max_of_item` of each of some
    items."""
    rows, counts = dataset.train_indices, dataset.item_counts
    if len(rows) <= max_rows:
        return rows
    rng = np.random.default_rng(0)
    order = rng.permutation(len(counts))
    chosen = order[: np.searchsorted(np.cumsum(np.minimum(counts[order], max_of_item)), max_rows)]
    kept = np.zeros(len(counts), np.float32)
    kept[chosen] = max_of_item / np.maximum(counts[chosen], max_of_item)
    some = [rows[part] for part in pieces(len(rows))]
    return np.concatenate([r[rng.random(len(r), np.float32) < kept[dataset.pairs.item[r]]] for r in some])


def _values(column: Column, rows: Ints) -> pl.Series:
    """Return numbers (n,), equal for equal values of an encoded column, null for missing ones: no code, or zeros
    alone."""
    if isinstance(column, Ragged):
        is_missing = column.lengths[rows] == 0
    else:
        is_missing = ~column[rows].reshape(len(rows), -1).any(1)
    return pl.Series(numbered(column, rows)).set(pl.Series(is_missing), None)
