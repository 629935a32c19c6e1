"""Rankings of the whole catalogue for users, without the items that they have seen."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import pieces
from twotower.arrays.sets import find_in_sorted, is_in_sorted, pair_keys
from twotower.arrays.types import Bools, Doubles, Float, Floats, Ints, Shaped
from twotower.data.context import distinct_contexts
from twotower.data.dataset import Dataset
from twotower.data.pairs import GroupedPairs, counts
from twotower.evaluation.config import EvaluationConfig, Repeats
from twotower.evaluation.factors import CatalogueScorer
from twotower.evaluation.metrics.auc import ordered_codes
from twotower.evaluation.metrics.measured import RankedItems, Rankings, TargetWeights
from twotower.evaluation.slices import TableSlice
from twotower.progress import JobProgress, Summary

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Contexts:
    """Users in contexts: G groups of interactions of one user in one context."""

    users: Shaped[Ints, "G"]  # user rows, rising
    interactions: Shaped[Ints, "G"]  # the first interaction of each group


@dataclass(frozen=True)
class EvaluationQueries:
    """Evaluation queries: the Q users with at least one held-out positive, ranked over N items. With a context each
    user has a query for each context of a held-out positive, whose targets are the positives in that context.

    The pairs of a block of users are read when the block is ranked, so that memory does not grow with the pairs.
    """

    users: Shaped[Ints, "Q"]  # user rows, rising; with a context a user has a query for each
    n_targets: Shaped[Ints, "Q"]  # items to find of each user: held-out positives that may be ranked
    pairs: GroupedPairs  # of the evaluated part
    seen: Sequence[GroupedPairs]  # whose items are not ranked, or ranked alone
    only_seen: bool  # rank the items of `seen` alone
    n_items: int
    block: int  # users per block
    summary: Summary
    groups: Shaped[Ints, "Q"]  # rows of the queries in `pairs`: the users, or users in a context
    interactions: Shaped[Ints, "Q"] | None = None  # indices of interactions with the context of each query

    @classmethod
    def build(
        cls,
        pairs: GroupedPairs,
        seen: Sequence[GroupedPairs],
        n_positives: Shaped[Ints, "U"],
        n_items: int,
        max_users: int = 0,
        block: int = 512,
        max_scores: int = MAX_SCORES,
        repeats: Repeats = "exclude",
        contexts: Contexts | None = None,
    ) -> EvaluationQueries:
        """Make the positives of `pairs` with a weight above 0 the targets, and by `repeats` exclude the items of
        `seen`, rank them as all others, or rank them alone.

        `n_positives` counts these positives of each user in `pairs`. With more than `max_users` users that have one, a
        fixed random sample of that size is ranked; 0 ranks all. A block holds at most `block` users and `max_scores`
        scores, but at least 8 users. With `contexts` the rows of `pairs` are users in a context, and queries.
        """
        summary = Summary("users in their contexts" if contexts else "users", read=int(np.count_nonzero(pairs.lengths)))
        groups = np.flatnonzero(n_positives)
        summary.drop("have no positive", summary.read - len(groups))
        if max_users and len(groups) > max_users:
            summary.drop("are beyond evaluation.max_users", len(groups) - max_users)
            groups = np.sort(np.random.default_rng(0).choice(groups, max_users, replace=False))
        users, interactions = groups, None
        if contexts:
            users, interactions = contexts.users[groups], contexts.interactions[groups]
        block = max(8, min(block, max_scores // n_items))  # smaller blocks read all item vectors too often
        seen, only = (() if repeats == "allow" else seen), repeats == "only"
        every = cls(users, n_positives[groups], pairs, seen, only, n_items, block, summary, groups, interactions)
        n_targets = every.count_targets()
        kept = n_targets > 0
        reason = "have no positive of earlier parts" if only else "have only positives of earlier parts"
        summary.drop(reason, int(len(users) - kept.sum()))
        return replace(every, n_targets=n_targets).take(kept)

    def take(self, rows: slice | Shaped[Bools, "Q"]) -> EvaluationQueries:
        """Return some of the queries."""
        columns = {name: getattr(self, name) for name in ("users", "n_targets", "groups", "interactions")}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})

    def top_k(self, factors: CatalogueScorer, k: int) -> Shaped[Ints, "Q K"]:
        """Return the best item rows by the vectors, -1 after the last item that may be ranked."""
        best = np.empty((len(self.users), min(k, self.n_items)), np.int64)
        progress = JobProgress(log, "users ranked", len(self.users), seconds=60.0)
        for part in self._blocks():
            some = self.take(part)
            scores = factors.catalogue_scores(some.users, some.interactions)
            cells = np.concatenate(self._seen_cells(some.users))
            if self.only_seen:
                at = torch.from_numpy(cells).to(scores.device)
                ranked = torch.full_like(scores, -torch.inf)
                ranked.view(-1)[at] = scores.view(-1)[at]
                scores, cells = ranked, cells[:0]
            best[part] = top_items(scores, cells, best.shape[1])
            progress.advance(len(some.users))
        return best

    def hits(self, best: Shaped[Ints, "Q K"]) -> Shaped[Bools, "Q K"]:
        """Return a mask: true where an item of `best`, which holds no excluded item, is a target of its user."""
        hit = np.zeros(best.shape, bool)
        for part in self._blocks():
            pairs, rows = self.pairs.take(self.groups[part]), best[part]
            targets = np.sort(pair_keys(pairs.user, pairs.item, self.n_items)[pairs.target])
            cells = pair_keys(np.arange(len(rows))[:, None], rows, self.n_items)
            hit[part] = is_in_sorted(targets, cells) & (rows >= 0)
        return hit

    def count_targets(self, items: Shaped[Bools, "I"] | None = None) -> Shaped[Ints, "Q"]:
        """Return the number of distinct items of each user, of all or those in a mask, that are positives and may be
        ranked."""
        found = np.zeros(len(self.users), np.int64)
        for part in self._blocks():
            owners, rows = np.divmod(self._targets(part)[0], self.n_items)
            found[part] = np.bincount(owners if items is None else owners[items[rows]], minlength=len(found[part]))
        return found

    def target_weights(self, best: Shaped[Ints, "Q K"], items: Shaped[Bools, "I"] | None = None) -> TargetWeights:
        """Return the weights of the targets, of all or those in a mask of items, for rankings."""
        (n, k), n_items = best.shape, self.n_items
        hit, total, heaviest = np.zeros((n, k)), np.zeros(n), np.zeros((n, k))
        for part in self._blocks():
            keys, weights = self._targets(part)
            if items is not None:
                keep = items[keys % n_items]
                keys, weights = keys[keep], weights[keep]
            owners = keys // n_items
            total[part] = np.bincount(owners, weights, part.stop - part.start)
            falling = weights[np.lexsort((-weights, owners))]
            rank = np.arange(len(keys)) - np.searchsorted(owners, owners)
            shown = rank < k
            heaviest[part][owners[shown], rank[shown]] = falling[shown]
            cells = pair_keys(np.arange(part.stop - part.start)[:, None], best[part], n_items)
            places, found = find_in_sorted(keys, cells)
            hit[part] = np.where(found & (best[part] >= 0), np.append(weights, 0.0)[places], 0.0)
        return TargetWeights(hit, total, heaviest)

    def rankings(self, best: Shaped[Ints, "Q K"], items: RankedItems, weighted: bool) -> Rankings:
        """Return the rankings with these best items, with the weights of their targets if `weighted`."""
        found = Rankings.alike(best, self.hits(best), self.n_targets, items)
        return replace(found, weights=self.target_weights(best)) if weighted else found

    def sliced(self, rankings: Rankings, of: TableSlice, weighted: bool) -> tuple[Shaped[Ints, "S"], Rankings]:
        """Return the users in a slice, or of items those with a target among them, and their rankings of the queries,
        in which items of the slice are the only targets."""
        if of.side == "user":
            kept = of.rows[self.users]
            return self.users[kept], rankings.of_users(kept)
        best, n_targets = rankings.best, self.count_targets(of.rows)
        found = Rankings.alike(best, rankings.hit & of.rows[best], n_targets, rankings.items)
        if weighted:
            found = replace(found, weights=self.target_weights(best, of.rows))
        return self.users[n_targets > 0], found.of_users(n_targets > 0)

    def _targets(self, part: slice) -> tuple[Shaped[Ints, "n"], Shaped[Doubles, "n"]]:
        """Return the places of the targets of a block in its flat scores, each once and rising, and their weights."""
        pairs = self.pairs.take(self.groups[part])
        target = pairs.target
        keys, place = np.unique(pair_keys(pairs.user, pairs.item, self.n_items)[target], return_inverse=True)
        sums: Doubles = np.bincount(place, pairs.weight[target], len(keys)).astype(np.float64)
        left = is_in_sorted(np.sort(np.concatenate(self._seen_cells(self.users[part]))), keys) == self.only_seen
        return keys[left], sums[left]

    def _seen_cells(self, users: Shaped[Ints, "B"]) -> list[Shaped[Ints, "_"]]:
        """Return the places of the seen items of a block in its flat scores."""
        taken = (pairs.take(users) for pairs in self.seen)
        return [np.zeros(0, np.int64), *(pair_keys(p.user, p.item, self.n_items) for p in taken)]

    def _blocks(self) -> Iterator[slice]:
        return pieces(len(self.users), self.block)


def evaluation_queries(dataset: Dataset, part: int, config: EvaluationConfig) -> EvaluationQueries:
    """Return the queries of a part. Rankings exclude the items of earlier parts (train for validation, train and
    validation for test), unless `config.repeats` says otherwise. With more than `config.max_users` users a fixed random
    sample of that size is ranked."""
    pairs = dataset.pairs_of(part)
    positives = counts(pairs.user, len(dataset.users), pairs.target)
    if dataset.schema.side("context"):
        grouped, positives, contexts = _in_contexts(dataset, part, positives, config.max_users)
        seen = dataset.grouped_before(part)
        return EvaluationQueries.build(
            grouped, seen, positives, len(dataset.items), repeats=config.repeats, contexts=contexts
        )
    return EvaluationQueries.build(
        dataset.grouped(part), dataset.grouped_before(part), positives, len(dataset.items), config.max_users,
        repeats=config.repeats,
    )  # fmt: skip


def _in_contexts(
    dataset: Dataset, part: int, positives: Shaped[Ints, "U"], max_users: int
) -> tuple[GroupedPairs, Shaped[Ints, "G"], Contexts]:
    """Return the targets of a part by user and context, their numbers, and these users and contexts. With more than
    `max_users` users that have a target, those of a fixed random sample of users; 0 takes all."""
    users = np.flatnonzero(positives)
    if max_users and len(users) > max_users:
        users = np.sort(np.random.default_rng(0).choice(users, max_users, replace=False))
    chosen = np.zeros(len(positives), bool)
    chosen[users] = True
    pairs = dataset.pairs_of(part)
    targets = np.flatnonzero(chosen[pairs.user] & pairs.target)
    pairs, rows = pairs.take(targets), dataset.part_indices(part)[targets]
    group, first = distinct_contexts(pairs.user, dataset.context, rows)
    grouped = GroupedPairs.of(replace(pairs, user=group.astype(np.int32)), len(first))
    contexts = Contexts(pairs.user[first].astype(np.int64), rows[first])
    return grouped, np.bincount(group, minlength=len(first)), contexts
