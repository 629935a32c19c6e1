"""Weights of the parts of a pair's vectors beside the other pairs: a conditional logit of what users of validation take anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.sets import pair_keys
from twotower.arrays.types import F32, F64, Bools, Int, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors
from twotower.evaluation.recent_scores import RecentScores
from twotower.train.cold_items import later_items

MIN_ROWS, MAX_ROWS = 50, 2048
"""Rows of validation from which weights are fitted, and that are read."""
MAX_ITEMS, FEWEST_ITEMS = 1000, 100
"""Items that a row's own is compared with, drawn once from more; fewer of them, before fewer rows are read, where there are many parts."""
MAX_NUMBERS = 2**25
"""Numbers of the terms of all rows and items: some 128 MiB of float32, and three times that beside them."""
PRIOR_DEVIATION = 1.0
"""Standard deviation of the factor of a part before any row is seen. The scores of a discriminant are logarithms of odds, so that a value that few items
have cannot weigh as much as one of many."""
FIRST_DEVIATION = 1.0
"""That of the logarithm of the factor of the other dimensions, in standard deviations of their scores, whose mean is 0."""
COLD_DEVIATION = 100.0
"""That of the factor of cold items, which is free."""
ITERATIONS = 100
BLOCK_SCORES = 2**25
"""Scores of recent popularity, of all items, that are held at a time."""


class PartWeight(NamedTuple):
    """Weight of a part of the vectors."""

    factor: float
    """Factor of the items' numbers."""
    spread: float
    """Standard deviation of the part's scores by that factor, in that of the scores of all other dimensions, below 0 for a factor below 0."""


def part_weights(
    factors: Factors,
    parts: Sequence[Int[Tensor, "_"]],
    dataset: Dataset,
    seed: int,
    cold: Shaped[Bools, "items"] | None = None,
    popular: F32[Tensor, "items"] | None = None,
) -> list[PartWeight] | None:
    """Return a weight of the items' numbers in each of some `parts` of their dimensions, beside the score of all other dimensions and of recent popularity: under these the
    items that users take in the validation part, and did not take before, are most likely among items drawn at random, by a softmax over the
    scores (McFadden 1974, "Conditional Logit Analysis of Qualitative Choice Behavior"). None for no part, for fewer than MIN_ROWS such rows, for so
    many parts that MAX_NUMBERS leave no more, and where the other dimensions are the same for all items. Items that are `cold` have a term of
    their own, as a bias will raise them, and those that the test part alone has are not compared: else columns would tell which they are. `popular`
    numbers of the items have a weight too, the last one."""
    rng = np.random.default_rng(seed)
    users, items = _taken_anew(dataset)
    compared = np.arange(len(dataset.items))
    fits = MAX_NUMBERS // ((len(parts) + 2) * min(MAX_ROWS, max(1, len(users))))
    if len(compared) > (n_items := min(MAX_ITEMS, max(FEWEST_ITEMS, fits))):
        compared = np.sort(rng.choice(len(compared), n_items, replace=False))
    most = min(MAX_ROWS, MAX_NUMBERS // ((len(parts) + 2) * (len(compared) + 1)))
    if not parts or len(users) < MIN_ROWS or most < MIN_ROWS:
        return None
    rows = np.sort(rng.permutation(len(users))[:most])
    users, items = users[rows], items[rows]
    candidates = np.concatenate([items[:, None], np.broadcast_to(compared, (len(items), len(compared)))], 1)
    found = _terms(factors, parts, users, items, compared)
    if cold is not None:
        found.append(torch.from_numpy(cold[candidates]).float())
    if popular is not None:
        found.insert(len(parts) + 1, popular.cpu()[torch.from_numpy(candidates)])
    terms = torch.stack(found, 2)
    known = _have_taken(dataset, users, candidates)
    known[:, 1:] |= (candidates[:, 1:] == items[:, None]) | later_items(dataset)[compared]
    known[:, 0] = False
    n = 1 + len(parts) + (popular is not None)
    scale = terms[torch.from_numpy(~known)].std(0)
    if not scale[0] > 0:
        return None
    deviations = PRIOR_DEVIATION * scale.double().where(scale > 0, 1.0)
    deviations[0] = FIRST_DEVIATION
    if cold is not None:
        deviations[-1] = COLD_DEVIATION
    fit = _fit(terms / scale.where(scale > 0, 1.0), torch.from_numpy(known), deviations)[:n]
    scale = scale[:n]
    spreads = (fit[1:] / fit[0]).where(scale[1:] > 0, 0.0)
    factor = (spreads * scale[0] / scale[1:]).where(scale[1:] > 0, 0.0)
    return [PartWeight(*pair) for pair in zip(factor.tolist(), spreads.tolist(), strict=True)]


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


def _terms(
    factors: Factors,
    parts: Sequence[Int[Tensor, "_"]],
    users: Shaped[Ints, "n"],
    items: Shaped[Ints, "n"],
    compared: Shaped[Ints, "m"],
) -> list[F32[Tensor, "n k"]]:
    """Return the scores of each user's own item and the compared ones: those of all other dimensions, and of each part."""
    of_users, own = (
        factors.users[torch.from_numpy(users)].cpu().float(),
        factors.items[torch.from_numpy(items)].cpu().float(),
    )
    others = factors.items[torch.from_numpy(compared)].cpu().float()
    rest = torch.ones(of_users.shape[1], dtype=torch.bool)
    rest[torch.cat([*parts])] = False
    found = []
    for part in (rest.nonzero()[:, 0], *parts):
        u = of_users[:, part]
        found.append(torch.cat([(u * own[:, part]).sum(1, keepdim=True), u @ others[:, part].T], 1))
    if factors.recent is not None:
        found[0] += _popularity(factors.recent, users, items, compared)
    return found


def _popularity(
    recent: RecentScores, users: Shaped[Ints, "n"], items: Shaped[Ints, "n"], compared: Shaped[Ints, "m"]
) -> F32[Tensor, "n k"]:
    """Return what is popular at each user's time, of the user's own item and the compared ones."""
    size, found = max(1, BLOCK_SCORES // len(recent.held)), list[Tensor]()
    for start in range(0, len(users), size):
        some = slice(start, start + size)
        of_users = recent.take(users[some], compared)
        own = recent.of_pairs(users[some].astype(np.int32), items[some].astype(np.int32))
        n = len(own)
        others = of_users.added_to(torch.zeros(n, len(compared)), np.arange(n))
        found.append(torch.cat([torch.from_numpy(own).float()[:, None], others], 1))
    return torch.cat(found)


def _fit(
    terms: F32[Tensor, "n k T"], is_left_out: Shaped[Tensor, "n k"], deviations: F64[Tensor, "T"]
) -> F64[Tensor, "T"]:
    """Return the factors of terms under which the first item of each row is most likely, with a normal prior of each factor, of the first one's
    logarithm, as it is above 0."""
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
