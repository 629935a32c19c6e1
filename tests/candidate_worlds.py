"""Positives and candidates of small datasets, and what a loop says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from twotower.arrays.types import Codes, Floats, Ints
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TRAIN
from twotower.train.negatives.candidates import Candidates
from twotower.train.order import Examples

ROW = st.tuples(st.integers(0, 7), st.integers(0, 29), st.booleans())
"""A training interaction (user, item, liked)."""


def world(board: Dataset, rows: list[tuple[int, int, bool]]) -> Dataset:
    """Training interactions (user, item, liked) of 40 users and 30 items."""
    user, item, liked = (np.array([r[i] for r in rows]) for i in range(3))
    pairs = Pairs(user.astype(np.int32), item.astype(np.int32), liked.astype(bool))
    return replace(board, pairs=pairs, parts=np.full(len(rows), TRAIN, np.int8), times=np.arange(len(rows)))


def liked_of(data: Dataset) -> dict[int, set[int]]:
    out: dict[int, set[int]] = {u: set() for u in range(len(data.users))}
    for u, i, p in zip(data.train.user.tolist(), data.train.item.tolist(), data.train.positive, strict=True):
        if p:
            out[u].add(i)
    return out


def columns_of(c: Candidates) -> list[int]:
    """The item of every shared column."""
    return [*c.items[: c.shared].tolist(), *c.memory_items.tolist()]


def own_items(c: Candidates) -> list[list[int]]:
    return [[int(c.items[p]) for p in row if p >= 0] for row in c.per_positive.tolist()]


def batch_of(user: Codes, item: Codes, weight: Floats | None = None, source: Ints | None = None) -> Examples:
    """A batch of positives, of the weight 1 unless it is given."""
    n = len(user)
    return Examples(
        user, item, np.ones(n, np.float32), np.ones(n, np.float32) if weight is None else weight,
        np.arange(n) if source is None else source,
    )  # fmt: skip


def positives(data: Dataset, n: int = 10**9, seed: int = 0) -> tuple[Codes, Codes]:
    """A batch of training positives."""
    liked = np.flatnonzero(data.train.positive)
    picked = np.random.default_rng(seed).permutation(liked)[:n]
    return data.train.user[picked], data.train.item[picked]
