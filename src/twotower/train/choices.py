"""Choices of users of validation: what each took anew, among items drawn at random, and the weights of scores under
which they are most likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.sets import pair_keys
from twotower.arrays.types import F32, F64, Bools, Int, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.features.side import SIDES
from twotower.train.cold_items import later_items

MIN_ROWS, MAX_ROWS = 50, 2048
"""Rows of validation from which weights are fitted, and that are read."""
MAX_ITEMS, FEWEST_ITEMS = 1000, 100
"""Items that a row's own is compared with, drawn once from more; fewer of them, before fewer rows are read, where there
are many terms."""
MAX_NUMBERS = 2**25
"""Numbers of the terms of all rows and items: some 128 MiB of float32, and three times that in addition."""
PRIOR_DEVIATION = 1.0
"""Standard deviation of the factor of a term before any row is seen. The scores of a discriminant are logarithms of
odds, so that a value that few items have cannot weigh as much as one of many."""
FIRST_DEVIATION = 1.0
"""That of the logarithm of the factor of the first term, in standard deviations of its scores, whose mean is 0."""
FREE_DEVIATION = 100.0
"""That of a factor that is free, in the same unit."""
ITERATIONS = 100


class ChoiceWeights(NamedTuple):
    """Weights of terms. The first term has the weight 1."""

    factors: list[float]
    """Factor of each other term."""
    spreads: list[float]
    """Standard deviation of the scores of each other term by its factor, in that of the first one's, below 0 for a
    factor below 0."""


@dataclass(frozen=True)
class Choices:
    """Items that users of validation took anew, and those that each is compared with."""

    users: Shaped[Ints, "n"]
    items: Shaped[Ints, "n"]
    compared: Shaped[Ints, "m"]
    user_rows: Shaped[Ints, "n"]
    """Row of each user among vectors `by_version`: the version that holds at the latest training interaction."""
    item_rows: Shaped[Ints, "items"] | None
    """That of every item; None without versions."""
    left_out: Shaped[Bools, "n k"]
    """True for what is not compared: an item that the user took before, the own one again, and one that the test part
    alone has."""

    @classmethod
    def of(cls, dataset: Dataset, seed: int, n_terms: int) -> Choices | None:
        """Return choices drawn at random, of which so many terms have at most MAX_NUMBERS; None for fewer than
        MIN_ROWS."""
        rng = np.random.default_rng(seed)
        users, items = _taken_anew(dataset)
        compared = np.arange(len(dataset.items))
        fits = MAX_NUMBERS // (n_terms * min(MAX_ROWS, max(1, len(users))))
        if len(compared) > (n_items := min(MAX_ITEMS, max(FEWEST_ITEMS, fits))):
            compared = np.sort(rng.choice(len(compared), n_items, replace=False))
        most = min(MAX_ROWS, MAX_NUMBERS // (n_terms * (len(compared) + 1)))
        if min(most, len(users)) < MIN_ROWS:
            return None
        rows = np.sort(rng.permutation(len(users))[:most])
        users, items = users[rows], items[rows]
        left_out = _have_taken(dataset, users, _beside(items, compared))
        left_out[:, 1:] |= (compared == items[:, None]) | later_items(dataset)[compared]
        left_out[:, 0] = False
        of_users, of_items = (dataset.rows_after_training(side) for side in SIDES)
        return cls(users, items, compared, users if of_users is None else of_users[users], of_items, left_out)

    @cached_property
    def candidates(self) -> Shaped[Ints, "n k"]:
        """The own item of each row, and those that it is compared with."""
        return _beside(self.items, self.compared)

    def products(self, factors: Factors, dimensions: Sequence[Int[Tensor, "_"]]) -> list[F32[Tensor, "n k"]]:
        """Return the products of the vectors of users and items in some dimensions of these, each a term."""
        items, compared = (
            some if self.item_rows is None else self.item_rows[some] for some in (self.items, self.compared)
        )
        users, own, others = (
            vectors[torch.from_numpy(rows)].cpu().float()
            for vectors, rows in (
                (factors.users, self.user_rows),
                (factors.items, items),
                (factors.items, compared),
            )
        )
        return [
            torch.cat([(users[:, some] * own[:, some]).sum(1, keepdim=True), users[:, some] @ others[:, some].T], 1)
            for some in dimensions
        ]

    def popularity(self, recent: RecentScores) -> F32[Tensor, "n k"]:
        """Return what is popular at each user's time."""
        shape = self.candidates.shape
        users = np.broadcast_to(self.users[:, None], shape).ravel()
        found = recent.of_pairs(users.astype(np.int32), self.candidates.ravel().astype(np.int32))
        return torch.from_numpy(found).float().view(shape)

    def of_items(self, values: Shaped[Tensor, "items"]) -> F32[Tensor, "n k"]:
        """Return a number of each item."""
        return values.cpu().float()[torch.from_numpy(self.candidates)]

    def weights(self, terms: Sequence[F32[Tensor, "n k"]], n_free: int = 0) -> ChoiceWeights | None:
        """Return the weights of terms under which the own items are most likely, by a softmax over the weighted sums
        (McFadden 1974, "Conditional Logit Analysis of Qualitative Choice Behavior"). That of the first is above 0, and
        those of the last `n_free` have no prior that tells. None if the first term is the same for all items."""
        every, left_out = torch.stack([*terms], 2), torch.from_numpy(self.left_out)
        scale = every[~left_out].std(0)
        if not scale[0] > 0:
            return None
        deviations = PRIOR_DEVIATION * scale.double().where(scale > 0, 1.0)
        deviations[0] = FIRST_DEVIATION
        deviations[len(deviations) - n_free :] = FREE_DEVIATION
        fit = _fit(every / scale.where(scale > 0, 1.0), left_out, deviations)
        spreads = (fit[1:] / fit[0]).where(scale[1:] > 0, 0.0)
        factors = (spreads * scale[0] / scale[1:]).where(scale[1:] > 0, 0.0)
        return ChoiceWeights(factors.tolist(), spreads.tolist())


def _beside(items: Shaped[Ints, "n"], compared: Shaped[Ints, "m"]) -> Shaped[Ints, "n k"]:
    """Return each item and the compared ones."""
    return np.concatenate([items[:, None], np.broadcast_to(compared, (len(items), len(compared)))], 1)


def _taken_anew(dataset: Dataset) -> tuple[Shaped[Ints, "n"], Shaped[Ints, "n"]]:
    """Return users and items of the positives of validation that the users have no earlier row of."""
    pairs = dataset.validation.take(dataset.validation.target)
    users, items = pairs.user.astype(np.int64), pairs.item.astype(np.int64)
    is_new = ~_have_taken(dataset, users, items[:, None])[:, 0]
    return users[is_new], items[is_new]


def _have_taken(dataset: Dataset, users: Shaped[Ints, "n"], items: Shaped[Ints, "n k"]) -> Shaped[Bools, "n k"]:
    """Return True for items (n, k) that the users (n,) have in the training part."""
    n, seen = len(dataset.items), dataset.seen_items
    keys = pair_keys(seen.owners, seen.values, n)  # ascending
    asked = users[:, None] * n + items
    place = np.searchsorted(keys, asked).clip(max=max(len(keys) - 1, 0))
    return keys[place] == asked if len(keys) else np.zeros(asked.shape, bool)


def _fit(
    terms: F32[Tensor, "n k T"], is_left_out: Shaped[Tensor, "n k"], deviations: F64[Tensor, "T"]
) -> F64[Tensor, "T"]:
    """Return the factors of terms under which the first item of each row is most likely, with a normal prior of each
    factor, of the first one's logarithm, as it is above 0."""
    numbers = torch.zeros(terms.shape[2], dtype=torch.float64, requires_grad=True)
    first = torch.zeros(len(terms), dtype=torch.long)
    optimizer = torch.optim.LBFGS([numbers], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def factors() -> F64[Tensor, "T"]:
        return torch.cat([numbers[:1].exp(), numbers[1:]])

    def loss() -> float:
        optimizer.zero_grad()
        logits = (terms @ factors().float()).masked_fill(is_left_out, -torch.inf)
        prior = (numbers / deviations).square().sum() / (2 * len(terms))
        value = torch.nn.functional.cross_entropy(logits, first).double() + prior
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return factors().detach()
