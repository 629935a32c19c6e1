"""Scorer `ease`: the item-item regression without its diagonal, as a product of two tables."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.ragged import offsets_of
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import F32, F64, I64
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.features.field import PoolingSpec
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.values import UNKNOWN
from twotower.model.inputs.bag import Bag
from twotower.model.pooling.pooling import Pooling
from twotower.model.two_tower import PairConfig
from twotower.scorers.positives import PositiveMatrix, PositiveSequences
from twotower.scorers.start import MOST, PairValues, Positive, Start, common_items, history_of_positives

log = logging.getLogger(__name__)
OVERSAMPLING, BLOCKS = 16, 9
"""Directions of a block beyond a quarter of those that are sought, and blocks, of the Lanczos method."""
DEPENDENT = 1e-4
"""Share of the length of a new direction that former ones do not span, below which rounding is much of it."""
USERS = 65_536
"""Users whose histories are pooled at a time."""


class Ease(Start):
    """EASE: the matrix B (N, N) of zero diagonal that minimises |X - X B|^2 + lambda |B|^2 (Steck 2019, "Embarrassingly
    Shallow Autoencoders for Sparse Data"), projected on the E leading right singular vectors V of X B: a history's
    vector is the sum of its rows of B V, an item's vector its row of V, and with E the rank of X B the score of a
    user's own history is that of B.

    Where rows have labels, a history of negatives counts too: what users have rated at all tells their tastes. X then
    has `unliked` in the place of a negative, and the row of a negative in the history is that of a positive times this
    number.

    Use it where users take many items each and items are not too many. Scores are scaled so that those of all items
    after a history have the root mean square 1. Memory is N^2 and some kilobytes a user, time N^3 and N for every
    positive. Of more than `max_items` items those that most users take are solved for, if they have nine tenths of the
    positives, and others have zeros.
    """

    kind = "ease"
    pools = PoolingSpec(kind="sum")
    choices = ("regularization",)

    regularization: tuple[Positive, ...] = Field(
        (40.0, 400.0),
        min_length=1,
        description="Regularisation lambda. Several values: the best on validation is kept.",
    )
    unliked: float = Field(
        0.5,
        ge=0,
        description="Weight of a negative, in units of the mean positive. 0: negatives are not read.",
    )
    max_items: int = Field(
        10_000,
        ge=0,
        description="Maximum number of items that are solved for; 10,000 items take 2.9 GB, or 4.0 GB with weights or "
        "negatives.",
    )

    def histories(self, schema: Schema, name: str) -> list[Sequence]:
        found = super().histories(schema, name)
        if schema.has_negatives and self.unliked:
            found.append(history_of_positives(f"{name}_negatives", self.pools, "negative"))
        return found

    def positives(self, dataset: Dataset, pair: PairConfig) -> PositiveMatrix:
        """Return the positives, and of a pair with a second history the negatives by their weight."""
        found = super().positives(dataset, pair)
        if len(pair.user.fields) == 1:
            return found
        (codes, n), pairs, rows = self.item_codes(dataset, pair), dataset.pairs, dataset.negative_indices
        rows = rows[codes[pairs.item[rows]] != UNKNOWN]
        negatives = distinct_keys(pair_keys(pairs.user[rows], codes[pairs.item[rows]], n))
        weight = self.unliked * (float(found.values.mean()) if len(found.values) else 1.0)
        keys = np.concatenate([pair_keys(found.owners, found.columns, n), negatives])
        values = np.concatenate([found.values, np.full(len(negatives), weight)])
        return PositiveMatrix.of_sums(keys, values, len(found), n, found.histories)

    def is_solved(self, items: int, common: int) -> bool:
        return min(items, common) <= self.max_items

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        n, generator = positives.n_columns, torch.Generator().manual_seed(seed)
        if n - 1 <= self.max_items:
            source, right = self._of_items(positives, width, generator)
        else:
            head = positives.once("head", lambda: most_taken(positives, self.max_items))
            source, right = (torch.zeros(n, width), torch.zeros(n, width))
            found_source, found_right = self._of_items(head.positives, width, generator)
            source[head.codes, : found_source.shape[1]] = found_source[1:]
            right[head.codes, : found_right.shape[1]] = found_right[1:]
        assert positives.histories is not None
        mean_square = _mean_square(source, positives.histories, pooling) / positives.n_items
        if not mean_square:
            raise TrainingError(
                "the scorer 'ease' finds no user of two positive items; leave it out of scorers, or give more data"
            )
        values = scaled_values(source, right, mean_square, width)
        return replace(values, further=(self.unliked * values.source,))

    def _of_items(
        self, positives: PositiveMatrix, width: int, generator: torch.Generator
    ) -> tuple[F32[Tensor, "N E"], F32[Tensor, "N E"]]:
        """Return B V and V from the products of all items."""
        products = positives.once("gram", positives.gram)
        gram = products.float()
        b = ease_weights(products.to(torch.float64, copy=True), self.regularization[0]).float()
        right = leading(lambda q: b.T @ (gram @ (b @ q)), positives.n_columns, width, generator)
        return b @ right, right


class MostTaken(NamedTuple):
    """Positives of the items that most users take, under codes from 1 on."""

    codes: I64[Tensor, "n"]
    """Their codes among all, rising."""
    positives: PositiveMatrix


def most_taken(positives: PositiveMatrix, n: int) -> MostTaken:
    """Return the positives of the n items that most rows have. Raises TrainingError if these have less than MOST of the
    positives."""
    counts = np.bincount(positives.columns, minlength=positives.n_columns)
    if common_items(counts) > n:
        raise TrainingError(
            f"the scorer 'ease' is solved for max_items = {n:,} items, and the log has {positives.n_columns - 1:,}, of "
            f"which these have less than {MOST:.0%} of the positives; raise max_items, or leave it out of scorers"
        )
    codes = np.sort(np.argsort(-counts, kind="stable")[:n])
    codes = codes[counts[codes] > 0]
    places = np.zeros(positives.n_columns, np.int32)
    places[codes] = np.arange(1, len(codes) + 1)
    kept = places[positives.columns] > 0
    offsets = offsets_of(np.bincount(positives.owners[kept], minlength=len(positives)))
    found = PositiveMatrix(places[positives.columns[kept]], offsets, positives.values[kept], len(codes) + 1)
    log.info(
        f"scorer ease: the {len(codes):,} items that most users take are solved for, which have {kept.mean():.1%} of "
        "the positives"
    )
    return MostTaken(torch.from_numpy(codes), found)


def _mean_square(rows: F32[Tensor, "N E"], histories: PositiveSequences, pooling: Pooling) -> F32[Tensor, ""]:
    """Return the mean of the squares of the lengths of pooled rows, over the users who have a history."""
    codes, offsets = torch.from_numpy(histories.codes), offsets_of(histories.lengths)
    layer, total, none = pooling.build(rows.shape[1], ""), torch.zeros(()), torch.zeros(0, dtype=torch.int32)
    for first in range(0, len(histories.lengths), USERS):
        at = offsets[first : first + USERS + 1]
        bag = Bag(codes[at[0] : at[-1]], torch.from_numpy((at - at[0]).astype(np.int32)), none, none)
        total += layer(rows, bag).square().sum()
    return total / int((histories.lengths > 0).sum())


def ease_weights(gram: F64[Tensor, "N N"], regularization: float) -> F64[Tensor, "N N"]:
    """Return B from the Gram matrix X^T X; column i predicts item i. Overwrites `gram`."""
    gram.diagonal().add_(regularization)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return inverse.div_(-inverse.diagonal().clone()).fill_diagonal_(0.0)


def leading(
    product: Callable[[F32[Tensor, "N k"]], F32[Tensor, "N k"]], n: int, width: int, generator: torch.Generator
) -> F32[Tensor, "N E"]:
    """Return the leading eigenvectors of a symmetric positive map of (n, k), at most `width`, by the block Lanczos
    method (Musco and Musco 2015, "Randomized Block Krylov Methods", algorithm 2). Blocks of a quarter of the directions
    find more of them than a few of all. Fewer than `width` if the map has fewer directions."""
    qr, k = torch.linalg.qr, n if 2 * width > n else min(n, width // 4 + OVERSAMPLING)
    basis = qr(torch.randn(n, k, generator=generator)).Q
    latest = products = product(basis)
    for _ in range(BLOCKS - 1):
        block, r = qr(latest - basis @ (basis.T @ latest))
        block = block[:, r.diagonal().abs() > DEPENDENT * latest.norm(dim=0)]
        if not block.shape[1]:
            break
        block = qr(block - basis @ (basis.T @ block)).Q
        latest = product(block)
        basis, products = torch.cat([basis, block], 1), torch.cat([products, latest], 1)
    vectors = torch.linalg.eigh((basis.T @ products).double()).eigenvectors
    found: Tensor = basis.double() @ vectors.flip(1)[:, : min(n, width)]
    return found.float()


def scaled_values(
    source: F32[Tensor, "N E"], target: F32[Tensor, "N E"], mean_square: F32[Tensor, ""], width: int
) -> PairValues:
    """Return values of a width whose scores have the root mean square 1, in place of the mean square given."""
    source, target = (
        torch.nn.functional.pad(rows, (0, width - rows.shape[1])) for rows in (source / mean_square.sqrt(), target)
    )
    return PairValues(source, (target,))
