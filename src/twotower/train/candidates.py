"""Candidates of a contrastive batch: negatives drawn from a mixture of sources, their log-q, and a mask.

Shared negatives are columns for every positive of the batch:

    in_batch            the batch's own positives, so popular items more often. Costs no tower run. The default (Yi et al.
                        2019, section 3)
    uniform             items drawn uniformly. Beside in-batch negatives, so that unpopular items are trained too (mixed
                        negative sampling, Yang et al. 2020)
    popularity          items drawn by popularity^alpha; alpha 0.75 is that of word2vec (Mikolov et al. 2013, section 2.2)
    cross_batch_memory  item vectors of earlier batches. For small batches (`CrossBatchMemory`)
    full                the whole catalogue, which makes the softmax exact. For catalogues of up to some 10^5 items

Per-positive negatives stand against one positive alone:

    random     items that the user has not seen, uniformly (DSSM, Huang et al. 2013, section 3.3)
    disliked   training interactions that the user did not like. Where dislikes are observed
    attribute  items that share a value of an item feature with the positive, such as its city. Where users choose within it
    hard       items that the present model ranks in a window, such as 101 to 500. To refine a trained ranking (Huang et al.
               2020, section 6.1)

The log-q of a shared candidate is the logarithm of its expected number of draws, summed over the sources: with n_i positives
of item i among all N training positives,

    log q_i = log( (B in_batch + M) n_i / N + uniform / items + popularity n_i^alpha / sum_j n_j^alpha )

for a batch of B positives and M remembered ones. Draws depend on (seed, step) only, so a resumed run draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.sets import DistinctRows, find_in_sorted, pair_keys
from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN
from twotower.errors import ConfigError, did_you_mean
from twotower.evaluation.ranking import top_items
from twotower.features.values import UNKNOWN
from twotower.train.negatives import NegativesConfig, PairSet, RandomNegatives

HARD_NEGATIVES_PER_USER = 64
"""Items of a user's rank window that are kept from one refresh of the hard negatives to the next."""
MAX_BLOCK_SCORES = 2**25
"""Scores that a refresh of the hard negatives holds at a time, by default: 128 MiB of float32."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of B positives: C shared columns, the last M of them from memory, and H negatives of each positive."""

    items: Ints  # (I,) distinct item rows whose vectors are needed; the first `shared` of them are columns
    shared: int
    memory_items: Tensor  # (M,) int64 item rows of remembered vectors, columns after the shared ones
    positive: Tensor  # (B,) int64 column of each row's positive
    counts: Tensor  # (C,) float32 number of draws of the column; 0: present for its positive only
    log_q: Tensor  # (C,) float32 log of the expected number of draws of the column's item
    per_positive: Tensor  # (B, H) int64 into `items`, -1 for none; the last `hard` of them are hard negatives
    hard: int
    group: Tensor | None  # (B,) int64: the rows of a group have the same excluded columns; None: no exclusion
    excluded: Tensor  # (n,) int64 columns, group after group
    excluded_offsets: Tensor  # (groups + 1,) int64, where the columns of each group begin
    # row numbers of the interactions that disliked negatives come from: no history of the batch may hold them
    disliked: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    # int64 columns of the positives of the whole batch, of which the B may be one rank's part
    batch_positive: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def mask_excluded(self, logits: Tensor, rows: slice) -> None:
        """Write -inf into the excluded columns of the logits (b, C) of some rows, in place."""
        if self.group is None or not len(self.excluded):
            return
        group = self.group[rows]
        n = self.excluded_offsets[group + 1] - self.excluded_offsets[group]
        row = torch.repeat_interleave(torch.arange(len(group), device=n.device), n)
        within = torch.arange(len(row), device=n.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        column = self.excluded[self.excluded_offsets[group].repeat_interleave(n) + within]
        logits.view(-1)[row * logits.shape[1] + column] = -torch.inf


class CrossBatchMemory:
    """A queue of the item vectors of the latest `size` positives of earlier batches, without gradient.

    They are shared negatives that cost no tower run, as vectors change slowly from step to step. Use it where the batch is
    small beside the catalogue (Wang et al. 2020, "Cross-Batch Memory for Embedding Learning", section 3; for two towers
    Wang et al. 2021, "Cross-Batch Negative Sampling").
    """

    def __init__(self, size: int) -> None:
        """Make an empty queue; 0 keeps nothing."""
        self.size = size
        self.items = torch.zeros(0, dtype=torch.int64)
        self.vectors: Tensor | None = None

    def enqueue(self, items: Tensor, vectors: Tensor) -> None:
        """Add a batch's positives (B,) and their vectors (B, D), and drop the oldest beyond `size`."""
        if not self.size:
            return
        vectors = vectors.detach()
        if self.vectors is not None:
            items, vectors = torch.cat([self.items, items]), torch.cat([self.vectors, vectors])
        self.items, self.vectors = items[-self.size :], vectors[-self.size :]

    def state(self) -> dict[str, Tensor]:
        """Return the items and vectors of the queue."""
        return {} if self.vectors is None else {"items": self.items, "vectors": self.vectors}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state, if a queue is kept and the state holds one."""
        if self.size and state:
            self.items, self.vectors = state["items"], state["vectors"]


class CandidateSampler:
    """Draws the candidates of each batch from the sources that a config names."""

    def __init__(self, dataset: Dataset, config: NegativesConfig, seed: int) -> None:
        """Prepare the sources. Raises ConfigError if `config.attribute` is no item feature with codes, or `config.hard_ranks`
        starts beyond the catalogue."""
        self._config, self._seed = config, seed
        self._n_items = len(dataset.items)
        if config.hard and config.hard_ranks[0] > self._n_items:
            raise ConfigError(
                f"negatives.hard_ranks starts at {config.hard_ranks[0]}, and the catalogue has {self._n_items} items; "
                "lower it"
            )
        counts = dataset.item_positive_counts.astype(np.float64)
        self._popularity = counts / counts.sum()
        powered = np.where(counts > 0, counts**config.popularity_alpha, 0.0)
        self._powered = powered / powered.sum()
        self._cumulative = np.cumsum(self._powered)
        self._positives = PairSet(dataset.positive_items, self._n_items)
        self._distinct = DistinctRows(self._n_items)
        self._slot = np.zeros(self._n_items, np.int64)
        self._distinct_users = DistinctRows(len(dataset.users))
        self._disliked: Ragged | None = None
        if config.disliked:
            disliked = np.flatnonzero((dataset.parts == TRAIN) & ~dataset.pairs.positive)
            order = np.random.default_rng(seed).permutation(disliked)
            # Row numbers of each user's dislikes, in a random order; and the place in time of every interaction.
            self._disliked = Ragged.from_pairs(dataset.pairs.user[order], order, len(dataset.users))
            self._item_of = dataset.pairs.item
            self._place_in_time: Ints | None = None  # None: a user's row numbers rise in time
            if not dataset.grouped_by_user:
                in_order = dataset.sort_by_time(dataset.parts == TRAIN)
                self._place_in_time = np.zeros(len(dataset.parts), np.int64)
                self._place_in_time[in_order] = np.arange(len(in_order))
        self._random: RandomNegatives | None = None
        if config.random:
            self._random = RandomNegatives(dataset.seen_items, self._n_items)
        self._attribute = _attribute_maps(dataset, config.attribute) if config.attribute else None
        self.hard: Codes | None = None
        """(n_users, HARD_NEGATIVES_PER_USER) item rows of each user's rank window, filled up with -1; None before the first
        refresh."""

    def state(self) -> dict[str, Tensor]:
        """Return the hard negatives."""
        return {} if self.hard is None else {"hard": torch.from_numpy(self.hard)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state, if hard negatives are drawn and the state holds some."""
        if self._config.hard and state:
            self.hard = state["hard"].numpy()

    def log_q(self, items: Ints, positives: int, memory: int) -> npt.NDArray[np.float32]:
        """Return the log of the expected number of draws of each of `items` (n,), all shared sources added.

        The batch has `positives` positives and as many as `memory` remembered ones. Zeros where no source is sampled.
        """
        c = self._config
        if c.full or not (c.in_batch or c.cross_batch_memory or c.uniform or c.popularity):
            return np.zeros(len(items), np.float32)
        expected = self._popularity[items] * (positives * c.in_batch + memory)
        expected += c.uniform / self._n_items + c.popularity * self._powered[items]
        logarithm: npt.NDArray[np.float32] = np.log(np.maximum(expected, 1e-30)).astype(np.float32)
        return logarithm

    def __call__(
        self, user: Codes, item: Codes, step: int, memory_items: Tensor, device: torch.device,
        source: Ints | None = None, ends: Ints | None = None, own: slice = slice(None),
    ) -> Candidates:  # fmt: skip
        """Draw the candidates of the positives `own` of a batch, which is aligned (B,) user and item rows.

        `memory_items` (M,) are the item rows of the cross-batch memory. With `source` (B,), the row numbers of the
        positives, a disliked negative is an interaction after the positive. `ends` are the ends of the batch's shards,
        whose draws do not depend on each other.
        """
        c, n = self._config, self._n_items
        rng = self._rng(step)
        own = slice(*own.indices(len(user))[:2])
        per_positive, disliked = np.zeros((own.stop - own.start, 0), np.int64), np.zeros(0, np.int64)
        if c.full:
            items, shared, positive = np.arange(n), n, item.astype(np.int64)
            counts = np.ones(n, np.float32)
        else:
            uniform = rng.integers(0, n, c.uniform)
            popular = np.minimum(np.searchsorted(self._cumulative, rng.random(c.popularity), side="right"), n - 1)
            items, index = self._distinct(np.concatenate([item, uniform, popular]).astype(np.int32))
            shared, positive = len(items), index[: len(item)]
            counts = np.bincount(index if c.in_batch else index[len(item) :], minlength=shared).astype(np.float32)
            others = counts.sum() + len(memory_items) + c.random
            by_shard, first = [], 0
            for shard, end in enumerate([len(user)] if ends is None else ends.tolist()):
                part, first = slice(first, end), end
                low, high = max(own.start, part.start), min(own.stop, part.stop)
                if low < high:
                    part_source = None if source is None else source[part]
                    shard_rng = self._rng(step, shard) if shard else rng
                    drawn = self._draw_per_positive(user[part], item[part], part_source, others, shard_rng)
                    by_shard.append((drawn[0][low - part.start : high - part.start], drawn[1]))
            if by_shard:
                per_positive, disliked = (np.concatenate(parts) for parts in zip(*by_shard, strict=True))
            if per_positive.shape[1]:
                items, per_positive = self._append_items(items, per_positive)
        columns = np.concatenate([items[:shared], memory_items.cpu().numpy()])
        counts = np.concatenate([counts, np.ones(len(memory_items), np.float32)])
        group, excluded = self._excluded_columns(user[own], item[own], columns, len(memory_items) > 0)

        def tensor(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Candidates(
            items=items,
            shared=shared,
            memory_items=memory_items,
            positive=tensor(positive[own]),
            counts=tensor(counts),
            log_q=tensor(self.log_q(columns, len(user), len(memory_items))),
            per_positive=tensor(per_positive),
            hard=c.hard if self.hard is not None else 0,
            group=None if group is None else tensor(group),
            excluded=tensor(excluded.values.astype(np.int64)),
            excluded_offsets=tensor(excluded.offsets),
            disliked=disliked,
            batch_positive=tensor(positive),
        )

    def _rng(self, step: int, shard: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, 0x6361], counter=[0, 0, shard, step]))

    def _excluded_columns(self, user: Codes, item: Codes, columns: Ints, repeats: bool) -> tuple[Ints | None, Ragged]:
        """Return the group of each row (B,), or None, and the columns that each group's rows leave out.

        With `mask_positives` these are the user's positives; else, if `repeats` says that a column may hold a row's positive
        again, the positive.
        """
        if self._config.mask_positives:
            groups, group = self._distinct_users(user)
            indices, lengths = self._positives.items.indices(groups)
            values = self._positives.items.values[indices].astype(np.int64)
        elif repeats:
            groups, group = self._distinct(item)
            values, lengths = groups, np.ones(len(groups), np.int64)
        else:
            return None, Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64))
        order = np.argsort(columns, kind="stable")
        ordered = columns[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.r_[starts[1:], len(ordered)]
        items = ordered[starts]
        # One slot per item, not cleared between batches: a slot counts only if `items` has the item at its place.
        self._slot[items] = np.arange(len(items))
        at = np.minimum(self._slot[values], len(items) - 1)
        low, n = starts[at], np.where(items[at] == values, ends[at] - starts[at], 0)
        places = run_indices(low, n)
        rows = np.repeat(np.repeat(np.arange(len(groups)), lengths), n)
        offsets = offsets_of(np.bincount(rows, minlength=len(groups)))
        return group, Ragged(order[places].astype(np.int32), offsets)

    def _draw_per_positive(
        self, user: Codes, item: Codes, source: Ints | None, others: float, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Return item rows (B, H) for each positive, -1 for none, and the row numbers of the disliked ones.

        The columns are random, disliked, by attribute, hard. `others` is the number of other candidates of a positive.
        """
        c = self._config
        parts = []
        disliked = np.zeros((len(user), 0), np.int64)
        if self._random is not None:
            parts.append(self._random.draw_distinct(user.astype(np.int64), c.random, rng))
        if self._disliked is not None:
            disliked = self._draw_disliked(self._disliked, user, source, rng)
            parts.append(np.where(disliked >= 0, self._item_of[disliked], -1).astype(np.int64))
        if self._attribute is not None:
            parts.append(self._draw_by_attribute(*self._attribute, item, rng))
        if self.hard is not None:
            parts.append(self._draw_hard(self.hard, user, others, rng))
        if not parts:
            return np.zeros((len(user), 0), np.int64), disliked.ravel()
        drawn = np.concatenate(parts, 1)
        drawn[drawn == item[:, None]] = -1
        if c.mask_positives:
            drawn[self._positives.contains(user[:, None].astype(np.int64), drawn)] = -1
        return drawn, disliked[disliked >= 0]

    def _draw_disliked(self, dislikes: Ragged, user: Codes, source: Ints | None, rng: np.random.Generator) -> Ints:
        """Draw the row numbers (B, disliked) of interactions that each user did not like; -1 where a user has fewer.

        With `source`, only interactions after the positive's, as a causal history holds the earlier ones.
        """
        drawn = _neighbours_from_random_start(dislikes, user, self._config.disliked, rng)
        if source is not None:
            place = self._place_in_time
            when, positive_when = (drawn, source) if place is None else (place[drawn], place[source])
            drawn[when < positive_when[:, None]] = -1
        return drawn

    def _draw_by_attribute(self, values: Ragged, by_value: Ragged, item: Codes, rng: np.random.Generator) -> Ints:
        """Draw item rows (B, attribute_items) that share one random attribute value with each positive; -1 for none."""
        value = _neighbours_from_random_start(values, item, 1, rng)[:, 0]
        drawn = _neighbours_from_random_start(by_value, np.maximum(value, 0), self._config.attribute_items, rng)
        return np.where(value[:, None] >= 0, drawn, -1)

    def _draw_hard(self, hard: Codes, user: Codes, others: float, rng: np.random.Generator) -> Ints:
        """Draw item rows (B, hard) of each user's rank window; -1 where the window, or `hard_ratio`, allows fewer.

        On average min(hard, others / hard_ratio): the fraction is rounded at random (Huang et al. 2020, section 6.1, blend
        100 easy negatives with each hard one).
        """
        c = self._config
        windows = hard[user]
        n = (windows >= 0).sum(1)[:, None]
        place = ((rng.random((len(user), 1)) * n).astype(np.int64) + np.arange(c.hard)) % np.maximum(n, 1)
        drawn = np.where(np.arange(c.hard) < n, np.take_along_axis(windows, place, 1), -1).astype(np.int64)
        limit = np.floor(min(c.hard, others / c.hard_ratio) + rng.random(len(user)))
        return np.where(np.arange(c.hard) < limit[:, None], drawn, -1)

    def _append_items(self, items: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Append to distinct `items` those of `rows` that they lack, and return them with `rows` as places in them."""
        distinct, index = np.unique(rows, return_inverse=True)
        order = np.argsort(items)
        at, known = find_in_sorted(items[order], distinct)
        place = np.where(known, order[at], -1)
        new = (place < 0) & (distinct >= 0)
        place[new] = len(items) + np.arange(new.sum())
        return np.concatenate([items, distinct[new]]), place[index.reshape(rows.shape)]

    def refresh_hard_negatives(
        self, users: Tensor, items: Tensor, epoch: int, block: int = 1024, max_block_scores: int = MAX_BLOCK_SCORES
    ) -> None:
        """Rank the catalogue for every user by `users` (n_users, D) . `items` (N, D), without the user's positives, and keep
        a random part of the window `hard_ranks`.

        At most `block` users are ranked at a time, and at most `max_block_scores` scores, but at least one user.
        """
        first, last = self._config.hard_ranks
        block = max(1, min(block, max_block_scores // self._n_items))
        rng = np.random.Generator(np.random.Philox(key=[self._seed, 0x6D69], counter=[0, 0, 0, epoch]))
        hard = np.full((len(users), HARD_NEGATIVES_PER_USER), -1, np.int32)
        for start in range(0, len(users), block):
            rows = np.arange(start, min(start + block, len(users)))
            indices, lengths = self._positives.items.indices(rows)
            positives = pair_keys(
                np.repeat(rows - start, lengths), self._positives.items.values[indices], self._n_items
            )
            scores = users[start : start + block] @ items.T
            window = top_items(scores, positives, min(last, self._n_items))[:, first - 1 :]
            finite = window >= 0
            order = np.where(finite, rng.random(window.shape), 1.0).argsort(1)[:, :HARD_NEGATIVES_PER_USER]
            hard[rows, : order.shape[1]] = np.take_along_axis(window, order, 1)
        self.hard = hard


def _neighbours_from_random_start(
    ragged: Ragged, rows: npt.NDArray[np.integer], n: int, rng: np.random.Generator
) -> Ints:
    """Return (len(rows), n) distinct values of each row: n neighbours from a random place on; -1 where a row has fewer."""
    lengths = ragged.offsets[rows + 1] - ragged.offsets[rows]
    start = (rng.random(len(rows)) * lengths).astype(np.int64)
    place = (start[:, None] + np.arange(n)) % np.maximum(lengths, 1)[:, None]
    if not len(ragged.values):
        return np.full((len(rows), n), -1, np.int64)
    at = np.minimum(ragged.offsets[rows][:, None] + place, len(ragged.values) - 1)
    return np.where(np.arange(n) < lengths[:, None], ragged.values[at], -1).astype(np.int64)


def _attribute_maps(dataset: Dataset, name: str) -> tuple[Ragged, Ragged]:
    """Return item -> its codes of a feature, and code -> the items that have it. Raises ConfigError without such a feature."""
    columns = dataset.items.columns
    coded = [n for n, c in columns.items() if isinstance(c, Ragged) or (c.ndim == 1 and c.dtype == np.int32)]
    if name not in coded:
        raise ConfigError(
            f"negatives.attribute: no item feature '{name}' with values to share{did_you_mean(name, coded)} "
            f"(allowed: {', '.join(coded)})"
        )
    column: Any = columns[name]
    n, many = len(dataset.items), isinstance(column, Ragged)
    owner, codes = (column.owners, column.values) if many else (np.arange(n), column)
    values = Ragged.from_pairs(owner[codes != UNKNOWN], codes[codes != UNKNOWN], n)
    items = values.owners
    shuffled = np.random.default_rng(0).permutation(len(items))
    by_value = Ragged.from_pairs(values.values[shuffled], items[shuffled], int(values.values.max(initial=0)) + 1)
    return values, by_value
