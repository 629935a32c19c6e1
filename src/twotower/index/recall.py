"""Recall of an index against exact search, and the tuning of search parameters to a recall."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import ConfigError, DataError
from twotower.index.protocol import Index

Banned = Sequence[Shaped[Rows, "_"]] | None
"""Rows that the answer of each query leaves out. None: no rows."""


def measure_recall(index: Index, queries: Shaped[Vectors, "B D"], k: int, banned: Banned = None) -> float:
    """Return recall@k against exact search, averaged over queries, among the rows that are not `banned`. Equal scores count as found.

    Queries are vectors of users. Item vectors as queries overestimate recall: each finds itself. Raises DataError for an
    empty index or no queries.
    """
    return _recall(index, queries, k, banned, _kth_exact_score(index, queries, k, banned))


def tune_index(index: Index, queries: Shaped[Vectors, "B D"], k: int, target: float, banned: Banned = None) -> float:
    """Set each search parameter of the index to the smallest value, to a sixteenth, with recall@k of at least `target`, as
    `measure_recall` does.

    Parameters are tuned in the order of `search_limits`, while later ones are at their limits. If the limits themselves
    miss the target, they stay. Returns the recall. Raises ConfigError for a target outside (0, 1], DataError.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"the target recall must be above 0 and at most 1, not {target}")
    floor = _kth_exact_score(index, queries, k, banned)
    limits = index.search_limits()
    index.search_params |= limits
    recall = _recall(index, queries, k, banned, floor)
    if recall >= target:
        for name, limit in limits.items():
            low, high = 0, 1  # low misses the target
            while high < limit:
                index.search_params[name] = high
                if (found := _recall(index, queries, k, banned, floor)) >= target:
                    recall = found
                    break
                low, high = high, high * 2
            high = min(high, limit)
            while high - low > max(1, high // 16):
                index.search_params[name] = (low + high) // 2
                if (found := _recall(index, queries, k, banned, floor)) >= target:
                    high, recall = index.search_params[name], found
                else:
                    low = index.search_params[name]
            index.search_params[name] = high
    return recall


def _kth_exact_score(index: Index, queries: Shaped[Vectors, "B D"], k: int, banned: Banned) -> Shaped[Vectors, "B 1"]:
    """Return the k-th highest exact score of each query, minus infinity where fewer rows remain."""
    if not len(index) or not len(queries):
        raise DataError("recall needs an index with items and at least one query")
    return index.search(queries, min(k, len(index)), banned=banned, exact=True)[1][:, -1:]


def _recall(
    index: Index, queries: Shaped[Vectors, "B D"], k: int, banned: Banned, floor: Shaped[Vectors, "B 1"]
) -> float:
    k = min(k, len(index))
    if banned is None or index.batch_invariant:
        scores = index.search(queries, k, banned=banned)[1]
    else:  # as answers are searched: a batch looks for all as far as the longest list needs
        each = [index.search(queries[n : n + 1], k, banned=[rows])[1] for n, rows in enumerate(banned)]
        scores = np.concatenate(each)
    return float((scores >= floor).sum() / (len(queries) * k))
