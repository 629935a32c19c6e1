"""Candidates of a contrastive batch, drawn from a mixture of sources with one log-q.

Shared negatives are columns for every positive of the batch, per-positive negatives belong to one positive. The log-q
of a shared candidate is the logarithm of its expected number of draws, summed over the sources: with n_i positives of
item i among all N training positives, for a batch of B positives and M remembered ones,

    log q_i = log( (B in_batch + M) n_i / N + uniform / items + popularity n_i^alpha / sum_j n_j^alpha )

n_i, N, B and M are sums of the positives' weights: a positive of weight 2 counts as two draws.

Draws depend on (seed, step) only, so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.pieces import ones, pieces
from twotower.arrays.ragged import Column, Ragged, run_indices
from twotower.arrays.sets import DistinctRows, PairSet, distinct_keys, find_in_sorted, is_in_sorted, pair_keys
from twotower.arrays.types import F32, I64, Array, Bools, Codes, Float, Floats, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.evaluation.factors import Factors
from twotower.train.negatives.candidates import Candidates, ColumnFinder, Exclusions
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.source import NegativeSampler, Positives
from twotower.train.order import Examples

BLOCK_PAIRS = 2**15
"""Drawn pairs that are compared with positives at a time."""


class CandidateSampler:
    """Draws the candidates of each batch from the sources of a config."""

    def __init__(
        self, dataset: Dataset, config: NegativesConfig, seed: int, device: torch.device = torch.device("cpu")
    ) -> None:
        """Build the sources. Raises ConfigError if the dataset does not allow one."""
        self._config, self._seed, self._device = config, seed, device
        self._shared = {s.kind: s.build(dataset, seed, device) for s in config.shared}
        self._per_positive = {s.kind: s.build(dataset, seed, device) for s in config.per_positive}
        self._known = (ContextPositives if dataset.schema.side("context") else UserPositives)(dataset)
        self._distinct = DistinctRows(len(dataset.items))
        self._find_columns = ColumnFinder(len(dataset.items))
        self._pairs = dataset.pairs

    @property
    def samplers(self) -> dict[str, NegativeSampler]:
        return {**self._shared, **self._per_positive}

    @property
    def gives_interactions(self) -> bool:
        """True if a negative may be an interaction, which no history of the batch may hold."""
        return any(s.gives_interactions for s in self._per_positive.values())

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        present = cache(factors)
        for sampler in self.samplers.values():
            sampler.begin_epoch(present, epoch)

    def remember(self, items: I64[Tensor, "B"], vectors: Float[Tensor, "B D"], weights: F32[Tensor, "B"]) -> None:
        for sampler in self._shared.values():
            sampler.remember(items, vectors, weights)

    def log_q(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Floats, "n"]:
        """Return the log of the expected draws of each item by all shared sources; zeros without a shared source.

        `positives` is the total weight of the positives of the batch.
        """
        if not self._shared:
            return np.zeros(len(items), np.float32)
        expected = sum((s.expected(items, positives) for s in self._shared.values()), np.zeros(len(items)))
        logarithm: Floats = np.log(np.maximum(expected, 1e-30)).astype(np.float32)
        return logarithm

    def __call__(
        self, batch: Examples, step: int, later: bool = False, ends: Shaped[Ints, "S"] | None = None,
        own: slice = slice(None),
    ) -> Candidates:  # fmt: skip
        """Draw the candidates of the positives `own` of a batch. A positive that is a candidate counts as many draws as
        it weighs.

        - `later`: a negative that is an interaction must be later than its positive.
        - `ends`: ends of the batch's shards, whose draws do not depend on each other.
        """
        rng, user, item = self._rng(step), batch.user, batch.item
        own = slice(*own.indices(len(user))[:2])
        drawn = [sampler.draw(item, rng) for sampler in self._shared.values()]
        items, index = self._distinct(np.concatenate([item, *drawn]).astype(np.int32))
        shared, positive = len(items), index[: len(item)]
        each = zip(self._shared.values(), drawn, strict=True)
        times = np.concatenate([np.zeros(0), *(batch.weight if s.draws_positives else ones(len(d)) for s, d in each)])
        counts = np.bincount(index[len(item) :], times, minlength=shared).astype(np.float32)
        memories = [s.memory for s in self._shared.values() if s.memory is not None]
        memory_items = torch.cat([torch.zeros(0, dtype=torch.int64, device=self._device), *(m.items for m in memories)])
        remembered = np.concatenate([np.zeros(0, np.float32), *(m.draws.cpu().numpy() for m in memories)])
        # Numbers of candidates, without weights.
        others = len(index) - len(item) + len(memory_items) + sum(s.easy for s in self._per_positive.values())
        drawn_apart = self._draw_by_shard(Positives(user, item, batch.source, later, others), step, ends, own, rng)
        items, per_positive = _append_items(items, drawn_apart.items)
        columns = np.concatenate([items[:shared], memory_items.cpu().numpy()])
        counts = np.concatenate([counts, remembered])
        return Candidates(
            items=items,
            shared=shared,
            memory_items=memory_items,
            memory_vectors=torch.cat([m.vectors for m in memories]) if memories else None,
            positive=self._tensor(positive[own]),
            counts=self._tensor(counts),
            log_q=self._tensor(self.log_q(columns, float(batch.weight.sum()))),
            per_positive=self._tensor(per_positive),
            margins=self._tensor(drawn_apart.margins) if np.isfinite(drawn_apart.margins).any() else None,
            exclusions=self._exclusions(user[own], item[own], columns, len(memory_items) > 0, batch.source[own]),
            weights=self._tensor(batch.weight[own]),
            interactions=drawn_apart.interactions,
            batch_positive=self._tensor(positive),
        )  # fmt: skip

    def _rng(self, step: int, shard: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, 0x6361], counter=[0, 0, shard, step]))

    def _tensor(self, array: Shaped[Array, "*_"]) -> Shaped[Tensor, "*_"]:
        return torch.from_numpy(array).to(self._device)

    def _exclusions(
        self, user: Shaped[Codes, "B"], item: Shaped[Codes, "B"], columns: Shaped[Ints, "C"], repeats: bool,
        interactions: Shaped[Ints, "B"],
    ) -> Exclusions | None:  # fmt: skip
        """Return the columns that each row leaves out.

        With `mask_positives` these are the user's positives, or those in the same context. Otherwise it is the
        positive, if a column may hold it again (`repeats`).
        """
        if self._config.mask_positives:
            group, items, lengths = self._known.by_group(user, interactions)
        elif repeats:
            groups, group = self._distinct(item)
            items, lengths = groups, np.ones(len(groups), np.int64)
        else:
            return None
        found = self._find_columns(columns, items, lengths)
        return Exclusions(*map(self._tensor, (group, found.values.astype(np.int64), found.offsets)))

    def _draw_by_shard(
        self, whole: Positives, step: int, ends: Shaped[Ints, "S"] | None, own: slice, rng: np.random.Generator
    ) -> _PerPositive:
        """Draw the negatives of the positives `own`; draws of shards are independent."""
        drawn, first = [], 0
        for shard, end in enumerate([len(whole.user)] if ends is None else ends.tolist()):
            part, first = slice(first, end), end
            low, high = max(own.start, part.start), min(own.stop, end)
            if low < high:
                found = self._draw_per_positive(whole.take(part), self._rng(step, shard) if shard else rng)
                drawn.append(found._replace(items=found.items[low - part.start : high - part.start]))
        if not drawn:  # a rank without a row
            none = np.zeros(0, np.int64)
            return _PerPositive(none.reshape(0, 0), np.zeros(0, np.float32), none)
        return drawn[0]._replace(
            items=np.concatenate([d.items for d in drawn]),
            interactions=np.concatenate([d.interactions for d in drawn]),
        )

    def _draw_per_positive(self, positives: Positives, rng: np.random.Generator) -> _PerPositive:
        user, item = positives.user, positives.item
        drawn = [np.zeros((len(user), 0), np.int64)]
        margins, interactions = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for sampler in self._per_positive.values():
            found = sampler.draw(positives, rng)
            if sampler.gives_interactions:
                interactions.append(found[found >= 0])
                found = np.where(found >= 0, self._pairs.item[found], -1).astype(np.int64)
            drawn.append(found)
            margins.append(np.full(found.shape[1], sampler.margin, np.float32))
        items = np.concatenate(drawn, 1)
        items[items == item[:, None]] = -1
        if items.shape[1] and self._config.mask_positives:
            items[self._known.contain(positives.user, positives.interactions, items)] = -1
        return _PerPositive(items, np.concatenate(margins), np.concatenate(interactions))


class _PerPositive(NamedTuple):
    """Negatives of B positives."""

    items: Shaped[Ints, "B H"]  # item rows, -1 for none
    margins: Shaped[Floats, "H"]
    interactions: Shaped[Ints, "_"]  # indices


def _append_items(items: Shaped[Ints, "I"], rows: Shaped[Ints, "B H"]) -> tuple[Shaped[Ints, "_"], Shaped[Ints, "B H"]]:
    """Append to distinct `items` the missing items of `rows`, and return them with `rows` as places in them."""
    if not rows.shape[1]:
        return items, rows
    distinct, index = np.unique(rows, return_inverse=True)
    order = np.argsort(items)
    at, known = find_in_sorted(items[order], distinct)
    place = np.where(known, order[at], -1)
    new = (place < 0) & (distinct >= 0)
    place[new] = len(items) + np.arange(new.sum())
    return np.concatenate([items, distinct[new]]), place[index.reshape(rows.shape)]


class UserPositives:
    """The distinct training positives of users, by which candidates are masked."""

    def __init__(self, dataset: Dataset) -> None:
        self._positives = PairSet(dataset.positive_items, len(dataset.items))
        self._distinct = DistinctRows(len(dataset.users))

    def by_group(
        self, users: Shaped[Codes, "B"], interactions: Shaped[Ints, "B"]
    ) -> tuple[Shaped[Ints, "B"], Shaped[Ints, "L"], Shaped[Ints, "G"]]:
        """Return the group of each interaction, the items of the groups, one after another, and their numbers."""
        groups, group = self._distinct(users)
        indices, lengths = self._positives.items.indices(groups)
        return group, self._positives.items.values[indices].astype(np.int64), lengths

    def contain(
        self, users: Shaped[Codes, "B"], interactions: Shaped[Ints, "B"], items: Shaped[Ints, "B H"]
    ) -> Shaped[Bools, "B H"]:
        """Return a mask of items that are positives of the interaction's user."""
        return self._positives.contains(users[:, None].astype(np.int64), items)


class ContextPositives:
    """Training positives of users in the context of an interaction. In another context they stay candidates."""

    def __init__(self, dataset: Dataset) -> None:
        self._positives, self._items = dataset.positives_by_user, dataset.pairs.item
        self._users = dataset.pairs.user
        self._context, self._n_items = dataset.context, len(dataset.items)

    def __call__(
        self, users: Shaped[Codes, "B"], interactions: Shaped[Ints, "B"]
    ) -> tuple[Shaped[Ints, "L"], Shaped[Ints, "B"]]:
        """Return the distinct items of each user's positives in the context of the interaction, and their numbers.

        The L items are in the order of the B users.
        """
        at, lengths = self._positives.indices(users)
        rows, owner = self._positives.values[at].astype(np.int64), np.repeat(np.arange(len(users)), lengths)
        for column in self._context.values():
            same = _equal(column, rows, interactions[owner])
            rows, owner = rows[same], owner[same]
        found, items = np.divmod(distinct_keys(pair_keys(owner, self._items[rows], self._n_items)), self._n_items)
        return items, np.bincount(found, minlength=len(users))

    def by_group(
        self, users: Shaped[Codes, "B"], interactions: Shaped[Ints, "B"]
    ) -> tuple[Shaped[Ints, "B"], Shaped[Ints, "L"], Shaped[Ints, "B"]]:
        """As `UserPositives`; each interaction is a group."""
        return np.arange(len(users)), *self(users, interactions)

    def contain(
        self, users: Shaped[Codes, "B"], interactions: Shaped[Ints, "B"], items: Shaped[Ints, "B H"]
    ) -> Shaped[Bools, "B H"]:
        """Return a mask of items that are positives of the interaction's user in its context."""
        positives, lengths = self(users, interactions)
        at = np.arange(len(users))
        members = pair_keys(np.repeat(at, lengths), positives, self._n_items)
        return is_in_sorted(members, pair_keys(at[:, None], items, self._n_items))

    def include(self, interactions: Shaped[Ints, "n"], items: Shaped[Ints, "n"]) -> Shaped[Bools, "n"]:
        """Return a mask of items that are positives of the interaction's user in its context."""
        found = np.empty(len(items), np.bool_)
        for block in pieces(len(items), BLOCK_PAIRS):
            rows = interactions[block]
            found[block] = self.contain(self._users[rows], rows, items[block][:, None])[:, 0]
        return found


def _equal(column: Column, a: Shaped[Ints, "n"], b: Shaped[Ints, "n"]) -> Shaped[Bools, "n"]:
    """Return a mask of equal values of the rows `a` and `b` of a column."""
    if not isinstance(column, Ragged):
        same: Bools = np.equal(column[a], column[b])
        return same if same.ndim == 1 else np.logical_and.reduce(same, 1)
    lengths, others = (column.offsets[rows + 1] - column.offsets[rows] for rows in (a, b))
    same = lengths == others
    lengths = np.where(same, lengths, 0)
    values = (column.values[run_indices(column.offsets[rows], lengths)] for rows in (a, b))
    differs = np.not_equal(*values)
    same[np.repeat(np.arange(len(a)), lengths)[differs]] = False
    return same
