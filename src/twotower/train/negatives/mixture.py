"""Candidates of a contrastive batch: negatives drawn from a mixture of sources, with one log-q.

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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.arrays.sets import DistinctRows, PairSet, find_in_sorted
from twotower.arrays.types import Codes, Ints
from twotower.data.dataset import Dataset
from twotower.train.negatives.attribute import AttributeNegatives
from twotower.train.negatives.candidates import Candidates, ColumnFinder, Exclusions
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.disliked import DislikedNegatives
from twotower.train.negatives.hard import HardNegatives
from twotower.train.negatives.random import RandomNegatives


class CandidateSampler:
    """Draws the candidates of each batch from the sources that a config names."""

    def __init__(self, dataset: Dataset, config: NegativesConfig, seed: int) -> None:
        """Prepare the sources. Raises ConfigError if `config.attribute` is no item feature with codes, or `config.hard_ranks`
        starts beyond the catalogue."""
        self._config, self._seed = config, seed
        n = self._n_items = len(dataset.items)
        positives = dataset.positive_items
        self.hard = HardNegatives(positives, n, config, seed) if config.hard else None
        counts = dataset.item_positive_counts.astype(np.float64)
        self._popularity = counts / counts.sum()
        powered = np.where(counts > 0, counts**config.popularity_alpha, 0.0)
        self._powered = powered / powered.sum()
        self._cumulative = np.cumsum(self._powered)
        self._positives = PairSet(positives, n)
        self._distinct, self._distinct_users = DistinctRows(n), DistinctRows(len(dataset.users))
        self._find_columns = ColumnFinder(n)
        self._disliked = DislikedNegatives(dataset, config.disliked, seed) if config.disliked else None
        self._random = RandomNegatives(dataset.seen_items, n) if config.random else None
        attribute = config.attribute
        self._attribute = AttributeNegatives(dataset, attribute, config.attribute_items) if attribute else None

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

        def tensor(array: npt.NDArray[np.number]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Candidates(
            items=items,
            shared=shared,
            memory_items=memory_items,
            positive=tensor(positive[own]),
            counts=tensor(counts),
            log_q=tensor(self.log_q(columns, len(user), len(memory_items))),
            per_positive=tensor(per_positive),
            hard=c.hard if self.hard and self.hard.windows is not None else 0,
            exclusions=self._exclusions(user[own], item[own], columns, len(memory_items) > 0, device),
            disliked=disliked,
            batch_positive=tensor(positive),
        )

    def _rng(self, step: int, shard: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, 0x6361], counter=[0, 0, shard, step]))

    def _exclusions(
        self, user: Codes, item: Codes, columns: Ints, repeats: bool, device: torch.device
    ) -> Exclusions | None:
        """Return the columns that each row (B,) leaves out.

        With `mask_positives` these are the user's positives; else, if `repeats` says that a column may hold a row's positive
        again, the positive.
        """
        if self._config.mask_positives:
            groups, group = self._distinct_users(user)
            indices, lengths = self._positives.items.indices(groups)
            items = self._positives.items.values[indices].astype(np.int64)
        elif repeats:
            groups, group = self._distinct(item)
            items, lengths = groups, np.ones(len(groups), np.int64)
        else:
            return None
        found = self._find_columns(columns, items, lengths)
        arrays = (group, found.values.astype(np.int64), found.offsets)
        return Exclusions(*(torch.from_numpy(array).to(device) for array in arrays))

    def _draw_per_positive(
        self, user: Codes, item: Codes, source: Ints | None, others: float, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Return item rows (B, H) for each positive, -1 for none, and the row numbers of the disliked ones.

        The columns are random, disliked, by attribute, hard. `others` is the number of other candidates of a positive.
        """
        parts = [np.zeros((len(user), 0), np.int64)]
        interactions = parts[0]
        if self._random:
            parts.append(self._random.draw_distinct(user.astype(np.int64), self._config.random, rng))
        if self._disliked:
            disliked, interactions = self._disliked.draw(user, source, rng)
            parts.append(disliked)
        if self._attribute:
            parts.append(self._attribute.draw(item, rng))
        if self.hard:
            parts.append(self.hard.draw(user, others, rng))
        drawn = np.concatenate(parts, 1)
        drawn[drawn == item[:, None]] = -1
        if drawn.shape[1] and self._config.mask_positives:
            drawn[self._positives.contains(user[:, None].astype(np.int64), drawn)] = -1
        return drawn, interactions[interactions >= 0]

    def _append_items(self, items: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Append to distinct `items` those of `rows` that they lack, and return them with `rows` as places in them."""
        distinct, index = np.unique(rows, return_inverse=True)
        order = np.argsort(items)
        at, known = find_in_sorted(items[order], distinct)
        place = np.where(known, order[at], -1)
        new = (place < 0) & (distinct >= 0)
        place[new] = len(items) + np.arange(new.sum())
        return np.concatenate([items, distinct[new]]), place[index.reshape(rows.shape)]
