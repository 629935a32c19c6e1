"""Scored pairs: random vectors of a dataset, pairs by rows, and the AUC by loops. Ranked items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from twotower.arrays.types import Ints
from twotower.data.dataset import Dataset
from twotower.data.pairs import GroupedPairs, Pairs, counts
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.measured import RankedItems
from twotower.evaluation.ranking import MAX_SCORES, EvaluationQueries
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema


def naive_auc(rows: Sequence[tuple[float, bool, int]]) -> float:
    above = [(s > t) + 0.5 * (s == t) for s, p, _ in rows if p for t, q, _ in rows if not q]
    return sum(above) / len(above) if above else math.nan


def pairs_of(rows: list[tuple[int, int, bool]]) -> Pairs:
    return Pairs(
        np.array([u for u, _, _ in rows], np.int32),
        np.array([i for _, i, _ in rows], np.int32),
        np.array([p for _, _, p in rows], bool),
    )


def random_factors(data: Dataset, seed: int = 0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(len(data.users), 4, generator=rng), torch.randn(len(data.items), 4, generator=rng))


ITEMS_SCHEMA = Schema(
    features=(Categorical(name="user_id", side="user"), MultiHot(name="tags", side="item", separator="|"))
)


def ranked_items(
    popularity: Ints, tags: pl.Series | None = None, user_counts: Ints | None = None, n_users: int = 10
) -> RankedItems:
    """Items with a column of tags, by default of two values in turn; by default each interaction is of another user."""
    n = len(popularity)
    values = pl.Series("tags", [f"t{i % 2}|t{i % 3}" for i in range(n)]) if tags is None else tags
    table = pl.DataFrame({"item_id": np.arange(n), "tags": values})
    return RankedItems(popularity, popularity if user_counts is None else user_counts, n_users, table, ITEMS_SCHEMA)


def rank_catalogue(
    user_vectors: torch.Tensor,
    item_vectors: torch.Tensor,
    pairs: Pairs,
    seen: Sequence[Pairs],
    k: int,
    block: int = 512,
    max_scores: int = MAX_SCORES,
) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Return users with a positive in `pairs`, best item rows without those of `seen`, and hits, by exact dot
    product."""
    n_users, n_items = len(user_vectors), len(item_vectors)
    positives = counts(pairs.user, n_users, pairs.target)
    grouped = [GroupedPairs.of(p, n_users) for p in (pairs, *seen)]
    queries = EvaluationQueries.build(grouped[0], grouped[1:], positives, n_items, block=block, max_scores=max_scores)
    best = queries.top_k(Factors(user_vectors, item_vectors), k)
    return queries.users, best, queries.hits(best)
