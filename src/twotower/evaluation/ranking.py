"""Rankings of the whole catalogue for users, without the items that they have seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.sets import is_in_sorted, pair_keys
from twotower.arrays.types import Bools, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import PART_NAMES, TEST, TRAIN, VALIDATION
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.metrics.auc import ordered_codes

MAX_SCORES = 2**25
"""Scores (users x items) that one block of a ranking holds."""

TIED_ROWS = 64
"""Rows of equal scores that are ranked again at a time."""


def top_items(scores: Float[Tensor, "B I"], excluded: Shaped[Ints, "n"], k: int) -> Shaped[Ints, "B K"]:
    """Return the best item rows by scores: the highest first, equal scores by row; -1 after the last
    item that may be ranked.

    `excluded` are places in the flat scores, which are set to -inf."""
    scores.view(-1)[torch.from_numpy(excluded).to(scores.device)] = -torch.inf
    top = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    values, rows = top.values.cpu().numpy(), top.indices.cpu().numpy()
    best: Ints = np.where(np.isfinite(values), rows, -1)[:, :k]
    # torch orders equal scores arbitrarily, and draws the cut through them anywhere.
    equal = (values[:, 1:] == values[:, :-1]) & np.isfinite(values[:, 1:])
    tied = np.flatnonzero(equal.any(1))
    best[tied] = _in_order(values[tied], rows[tied], k)
    cut = np.flatnonzero(equal[:, k - 1 :].any(1))
    falling = torch.arange(scores.shape[1], 0, -1, dtype=torch.int32, device=scores.device)
    for start in range(0, len(cut), TIED_ROWS):
        some = cut[start : start + TIED_ROWS]
        last = values[some, k - 1 : k]
        equals = scores[torch.from_numpy(some).to(scores.device)] == torch.from_numpy(last).to(scores.device)
        first = torch.where(equals, falling, 0).topk(k, dim=1).indices.cpu().numpy()
        place = np.arange(k) - (values[some, :k] > last).sum(1, keepdims=True)
        best[some] = np.where(place < 0, best[some], np.take_along_axis(first, np.maximum(place, 0), 1))
    return best


def _in_order(scores: Shaped[Floats, "B C"], rows: Shaped[Ints, "B C"], k: int) -> Shaped[Ints, "B K"]:
    """Return the first k of `rows` by scores, the highest first, equal ones by row; -1 for a score of -inf."""
    keys = ((0xFFFFFFFF - ordered_codes(scores)).astype(np.int64) << 32) | rows
    ordered = np.sort(keys.view(np.uint64), axis=1)[:, :k].view(np.int64) & 0xFFFFFFFF
    return np.where(np.arange(ordered.shape[1]) < (scores > -np.inf).sum(1)[:, None], ordered, -1)


def rank_catalogue(
    user_vectors: Float[Tensor, "U D"],
    item_vectors: Float[Tensor, "I D"],
    pairs: Pairs,
    seen: Iterable[Pairs],
    k: int,
    block: int = 512,
    max_scores: int = MAX_SCORES,
) -> tuple[Shaped[Ints, "Q"], Shaped[Ints, "Q K"], Shaped[Bools, "Q K"]]:
    """Return users, best item rows and hits by exact dot product over all items.

    The targets are the positives of `pairs`. The items of `seen` are excluded, also as targets; equal scores are ordered by
    item row. Users without a positive in `pairs` are left out. A block holds at most `block` users and
    `max_scores` scores, but at least 8 users.
    """
    queries = EvaluationQueries.build(pairs, seen, len(user_vectors), len(item_vectors), block, max_scores)
    best = queries.top_k(user_vectors, item_vectors, k)
    return queries.users, best, queries.hits(best)


@dataclass(frozen=True)
class EvaluationQueries:
    """Evaluation queries: the Q users with at least one held-out positive, ranked over N items.

    A key is q N + item, q the position of the user among the Q.
    """

    users: Shaped[Ints, "Q"]  # user rows, rising
    targets: Shaped[Ints, "n"]  # keys of the held-out positives, rising
    excluded: Shaped[Ints, "m"]  # keys of the items that are not ranked, rising
    n_items: int
    block: int  # users per block

    @classmethod
    def build(
        cls,
        pairs: Pairs,
        seen: Iterable[Pairs],
        n_users: int,
        n_items: int,
        block: int = 512,
        max_scores: int = MAX_SCORES,
    ) -> EvaluationQueries:
        """Make the positives of `pairs` the targets, except those in `seen`, and exclude the items of `seen`.

        A block holds at most `block` users and `max_scores` scores, but at least 8 users.
        """
        targets = np.sort(pair_keys(pairs.user, pairs.item, n_items)[pairs.positive])
        excluded = np.sort(np.concatenate([pair_keys(p.user, p.item, n_items) for p in seen] or [targets[:0]]))
        targets = targets[~is_in_sorted(excluded, targets)]
        has_target = np.zeros(n_users, bool)
        has_target[targets // n_items] = True
        # Subtracting the shift of a user turns a key of user rows into a key of query positions.
        shift = (np.arange(n_users) - np.cumsum(has_target) + 1) * n_items
        owner = excluded // n_items
        kept = has_target[owner]
        return cls(
            np.flatnonzero(has_target),
            targets - shift[targets // n_items],
            excluded[kept] - shift[owner[kept]],
            n_items,
            max(8, min(block, max_scores // n_items)),  # smaller blocks read all item vectors too often
        )

    def top_k(
        self, user_vectors: Float[Tensor, "U D"], item_vectors: Float[Tensor, "I D"], k: int
    ) -> Shaped[Ints, "Q K"]:
        """Return the best item rows, -1 after the last item that may be ranked."""
        device = item_vectors.device
        best = np.empty((len(self.users), min(k, self.n_items)), np.int64)
        for part, excluded in self._blocks(self.excluded):
            scores = user_vectors[torch.from_numpy(self.users[part]).to(device)] @ item_vectors.T
            best[part] = top_items(scores, excluded, best.shape[1])
        return best

    def hits(self, best: Shaped[Ints, "Q K"]) -> Shaped[Bools, "Q K"]:
        """Return a mask: true where an item of `best` is a target of its user."""
        hit = np.zeros(best.shape, bool)
        is_target = np.zeros((self.block, self.n_items), bool)
        for part, targets in self._blocks(self.targets):
            rows = best[part]
            is_target.flat[targets] = True
            hit[part] = is_target[np.arange(len(rows))[:, None], rows] & (rows >= 0)
            is_target.flat[targets] = False
        return hit

    def _blocks(self, keys: Shaped[Ints, "n"]) -> Iterator[tuple[slice, Shaped[Ints, "m"]]]:
        """Yield each block of users as a slice, and the `keys` of the block relative to its first user."""
        for start in range(0, len(self.users), self.block):
            first = start * self.n_items
            lo, hi = np.searchsorted(keys, [first, first + self.block * self.n_items])
            yield slice(start, start + self.block), keys[lo:hi] - first


def evaluation_queries(dataset: Dataset, part: int, config: EvaluationConfig) -> EvaluationQueries:
    """Return the queries of a part. Rankings exclude the items of earlier parts: train for validation, train and
    validation for test. With more than `config.max_users` users a fixed random sample of that size is ranked."""
    pairs, shape = pairs_of_part(dataset, part), (len(dataset.users), len(dataset.items))
    users = np.unique(pairs.user[pairs.positive])
    if not config.max_users or len(users) <= config.max_users:
        seen = {TRAIN: [], VALIDATION: [dataset.train], TEST: [dataset.train, dataset.validation]}[part]
        return EvaluationQueries.build(pairs, seen, *shape)
    some = np.sort(np.random.default_rng(0).choice(users, config.max_users, replace=False))
    keep = np.isin(pairs.user, some)
    return EvaluationQueries.build(pairs.take(keep), [dataset.pairs_before(part, some)], *shape)


def pairs_of_part(dataset: Dataset, part: int) -> Pairs:
    pairs: Pairs = getattr(dataset, PART_NAMES[part])  # cached, unlike `dataset.part`
    return pairs
