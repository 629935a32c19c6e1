"""Scored pairs: random vectors of a dataset, pairs by rows, and the AUC by loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.evaluation.factors import Factors


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
