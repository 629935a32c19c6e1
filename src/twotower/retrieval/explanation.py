"""Explanation of an answer, for the console: the stored data of its user, the vector, and the gates that shaped it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twotower.arrays.types import Floats, ItemId, UserId, UserRow
from twotower.data.splits import TEST, TRAIN
from twotower.onnx.tower import GateInfo
from twotower.retrieval.request import Json, Method, Request, UnknownId, check_method
from twotower.retrieval.retriever import Retriever, check_vector


@dataclass(frozen=True)
class Explanation:
    """The vector that an answer was searched with, and the SENet gates of the user tower."""

    vector: Floats  # (1, D)
    gates: list[tuple[GateInfo, Floats]]
    """Each gate with its weights (fields,)."""


def explain(retriever: Retriever, request: Request, method: Method = 2) -> Explanation:
    """Explain the answer that `recommend` gives to a request. Raises DataError as `recommend` does."""
    check_method(method)
    request = retriever.heard(request)
    rows = retriever.rows_of(request)
    if method == 1 and rows.user is not None and retriever.loaded.user_vectors is None:
        raise retriever.loaded.no_vectors()
    tower = retriever.loaded.tower
    vector, weights = tower.explain(retriever.user_inputs.read(request, rows).feed)
    if method == 1 and rows.user is not None:
        vector = retriever.embed_request(request, 1).vector
    check_vector(vector)
    return Explanation(vector, [(gate, w[0]) for gate, w in zip(tower.gates, weights, strict=True)])


class HistoryItem(NamedTuple):
    """An interaction of a user."""

    id: ItemId
    title: str
    liked: bool | None
    """None for one of weight 0, such as an input event: neither liked nor disliked."""


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
    pairs = data.pairs.take(indices)
    liked, items = list[bool | None](pairs.positive.tolist()), pairs.item.tolist()
    if pairs.weight is not None:
        liked = [x if w else None for x, w in zip(liked, pairs.weight.tolist(), strict=True)]
    return [HistoryItem(retriever.item_ids[i], retriever.titles[i], x) for i, x in zip(items, liked, strict=True)]


def stored_features(retriever: Retriever, user_id: str) -> dict[str, Json]:
    """Return the stored features of a user, which the `features` of a request replace. Raises UnknownId."""
    row = retriever.dataset.users.frame.row(_row(retriever, user_id), named=True)
    return {name: row[name] for name in retriever.user_columns}


def stored_items(retriever: Retriever, user_id: str) -> list[ItemId]:
    """Return the ids of the items that a user has seen, which answers exclude. Raises UnknownId."""
    rows = retriever.dataset.interacted_items.row(_row(retriever, user_id))
    items: list[ItemId] = retriever.item_ids.column.gather(rows).unique(maintain_order=True).to_list()
    return items


def _row(retriever: Retriever, user_id: str) -> UserRow:
    row = retriever.user_ids.row(UserId(str(user_id)))
    if row is None:
        raise UnknownId(f"user '{user_id}' is not among the {len(retriever.user_ids):,} users of this bundle")
    return row
