"""Stored data of the users of a bundle, as the console shows it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from twotower.data.splits import TEST, TRAIN
from twotower.retrieval.request import Json, UnknownId
from twotower.retrieval.retriever import Retriever


class HistoryItem(NamedTuple):
    """An interaction of a user."""

    id: str
    title: str
    liked: bool


def stored_history(retriever: Retriever, user_id: str, n: int) -> list[HistoryItem]:
    """Return the last `n` interactions of a user, oldest first, without the test part. Raises UnknownId."""
    row, data = _row(retriever, user_id), retriever.dataset
    seen = data.interacted_items
    assert seen.source is not None
    indices = seen.source[seen.offsets[row] : seen.offsets[row + 1]]
    parts = data.parts[indices]
    indices = indices[parts != TEST] if data.time_ordered else indices[parts == TRAIN]
    if data.times is not None:
        indices = indices[np.argsort(data.times[indices], kind="stable")]
    indices = indices[max(0, len(indices) - n) :]
    liked, items = data.pairs.positive[indices].tolist(), data.pairs.item[indices].tolist()
    return [HistoryItem(retriever.item_ids[i], retriever.titles[i], x) for i, x in zip(items, liked, strict=True)]


def stored_features(retriever: Retriever, user_id: str) -> dict[str, Json]:
    """Return the stored features of a user, which the `features` of a request replace. Raises UnknownId."""
    row = retriever.dataset.users.frame.row(_row(retriever, user_id), named=True)
    return {name: row[name] for name in retriever.user_columns}


def stored_items(retriever: Retriever, user_id: str) -> list[str]:
    """Return the ids of the items that a user has seen, which answers exclude. Raises UnknownId."""
    rows = retriever.dataset.interacted_items.row(_row(retriever, user_id))
    items: list[str] = retriever.item_ids.column.gather(rows).to_list()
    return items


def _row(retriever: Retriever, user_id: str) -> int:
    row = retriever.user_ids.row(str(user_id))
    if row is None:
        raise UnknownId(f"user '{user_id}' is not among the {len(retriever.user_ids):,} users of this bundle")
    return row
