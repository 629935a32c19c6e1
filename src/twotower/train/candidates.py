"""What stands against the positives of a batch: items drawn from a mixture of sources, each with the logarithm of how
often it is expected to be drawn, and a mask.

Draws depend on (seed, step) only, so a resumed run sees the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.config import NegativesConfig
from twotower.data.batches import Distinct
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN
from twotower.encoders import UNKNOWN, Codes, Ints, Ragged
from twotower.errors import ConfigError, nearest
from twotower.train.negatives import PairSet, RandomNegatives

HARD_NEGATIVES_PER_USER = 64
"""Items of a user's rank window that are remembered between two minings."""
_CELLS = 2**25  # scores that are held at a time while mining


@dataclass(frozen=True)
class Candidates:
    """The columns of a contest of B positives: C shared ones, the last M of them from memory, and H own ones."""

    items: Ints  # (I,) distinct item rows whose vectors are needed; the first `shared` of them are columns
    shared: int
    memory: Tensor  # (M,) int64 item rows of remembered vectors, columns after the shared ones
    positive: Tensor  # (B,) int64 column of the row's positive
    drawn: Tensor  # (C,) float32 how often the column was drawn; 0: it is there for its positive only
    log_q: Tensor  # (C,) float32 log of how often its item is expected to be drawn
    own: Tensor  # (B, H) int64 into items, -1 for none; the last `hard` of them are hard negatives
    hard: int
    group: Tensor | None  # (B,) int64: rows of one group share their banned columns
    banned: Tensor  # (n,) int64 columns, group after group
    offsets: Tensor  # (groups + 1,) int64
    # numbers of the interactions that observed candidates are: no history of the batch may hold them
    observed: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    # int64 columns of the positives of the whole batch, of which the B may be one rank's part
    batch: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def ban(self, logits: Tensor, rows: slice) -> None:
        """Put -inf into the banned columns of logits (b, C), in place."""
        if self.group is None or not len(self.banned):
            return
        group = self.group[rows]
        n = self.offsets[group + 1] - self.offsets[group]
        row = torch.repeat_interleave(torch.arange(len(group), device=n.device), n)
        inside = torch.arange(len(row), device=n.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        column = self.banned[self.offsets[group].repeat_interleave(n) + inside]
        logits.view(-1)[row * logits.shape[1] + column] = -torch.inf


class CrossBatchMemory:
    """The item vectors of the latest positives of earlier batches, without gradient (Wang et al. 2020, "Cross-Batch
    Memory"; Wang et al. 2021 for two towers)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items = torch.zeros(0, dtype=torch.int64)
        self.vectors: Tensor | None = None

    def keep(self, items: Tensor, vectors: Tensor) -> None:
        """Add the batch's positives (B,) and their vectors (B, D); the oldest go."""
        if not self.size:
            return
        vectors = vectors.detach()
        if self.vectors is not None:
            items, vectors = torch.cat([self.items, items]), torch.cat([self.vectors, vectors])
        self.items, self.vectors = items[-self.size :], vectors[-self.size :]


class CandidateSampler:
    """Draws the candidates of each batch."""

    def __init__(self, dataset: Dataset, config: NegativesConfig, seed: int) -> None:
        """Raises ConfigError if `config.attribute` is no feature with codes on the item side, or `config.hard_ranks`
        starts beyond the catalogue."""
        self._config, self._seed = config, seed
        self._n_items = len(dataset.items)
        if config.hard and config.hard_ranks[0] > self._n_items:
            raise ConfigError(
                f"negatives.hard_ranks starts at {config.hard_ranks[0]}, and the catalogue has {self._n_items} items; "
                "lower it"
            )
        counts = dataset.positives_of_item.astype(np.float64)
        self._popularity = counts / counts.sum()
        powered = np.where(counts > 0, counts**config.popularity_alpha, 0.0)
        self._powered = powered / powered.sum()
        self._cumulative = np.cumsum(self._powered)
        self._liked = PairSet(dataset.positive_items, self._n_items)
        self._distinct = Distinct(self._n_items)
        self._slot = np.zeros(self._n_items, np.int64)
        self._distinct_users = Distinct(len(dataset.users))
        self._disliked: Ragged | None = None
        if config.disliked:
            disliked = np.flatnonzero((dataset.parts == TRAIN) & ~dataset.pairs.positive)
            order = np.random.default_rng(seed).permutation(disliked)
            # Their numbers, in a random order; and, where that is another, the place in time of every interaction.
            self._disliked = Ragged.from_pairs(dataset.pairs.user[order], order, len(dataset.users))
            self._item_of = dataset.pairs.item
            self._moment: Ints | None = None  # the numbers of a user's interactions rise in time
            if not dataset.by_user:
                in_order = dataset.in_order(dataset.parts == TRAIN)
                self._moment = np.zeros(len(dataset.parts), np.int64)
                self._moment[in_order] = np.arange(len(in_order))
        self._random: RandomNegatives | None = None
        if config.random:
            self._random = RandomNegatives(dataset.seen_items, self._n_items)
        self._attribute = _attribute_maps(dataset, config.attribute) if config.attribute else None
        self.hard: Codes | None = None
        """(n_users, KEPT) item rows of each user's rank window; -1 from the place on where there are no more."""

    def log_q(self, items: Ints, positives: int, memory: int) -> npt.NDArray[np.float32]:
        """Log of how often each of `items` is expected among the shared candidates of a batch of `positives`, all
        sources together: the density of the mixture times the number of draws."""
        c = self._config
        if c.full or not (c.in_batch or c.cross_batch_memory or c.uniform or c.popularity):
            return np.zeros(len(items), np.float32)  # nothing is sampled, or no candidate is shared
        expected = self._popularity[items] * (positives * c.in_batch + memory)
        expected += c.uniform / self._n_items + c.popularity * self._powered[items]
        logarithm: npt.NDArray[np.float32] = np.log(np.maximum(expected, 1e-30)).astype(np.float32)
        return logarithm

    def __call__(
        self, user: Codes, item: Codes, step: int, memory: Tensor, device: torch.device, source: Ints | None = None,
        ends: Ints | None = None, mine: slice = slice(None),
    ) -> Candidates:  # fmt: skip
        """The candidates of the positives `mine` of a batch: aligned (B,) user and item rows.

        With `source` (B,), the interactions they are, no observed candidate is one that the user had met before.
        `ends` says where each of the batch's shards ends: what is drawn for one does not depend on the others.
        """
        c, n = self._config, self._n_items
        rng = self._rng(step)
        mine = slice(*mine.indices(len(user))[:2])
        own, observed = np.zeros((mine.stop - mine.start, 0), np.int64), np.zeros(0, np.int64)
        if c.full:
            items, shared, positive = np.arange(n), n, item.astype(np.int64)
            drawn = np.ones(n, np.float32)
        else:
            uniform = rng.integers(0, n, c.uniform)
            popular = np.minimum(np.searchsorted(self._cumulative, rng.random(c.popularity), side="right"), n - 1)
            items, index = self._distinct(np.concatenate([item, uniform, popular]).astype(np.int32))
            shared, positive = len(items), index[: len(item)]
            drawn = np.bincount(index if c.in_batch else index[len(item) :], minlength=shared).astype(np.float32)
            others = drawn.sum() + len(memory) + c.random
            found, first = [], 0
            for shard, end in enumerate([len(user)] if ends is None else ends.tolist()):
                part, first = slice(first, end), end
                low, high = max(mine.start, part.start), min(mine.stop, part.stop)
                if low < high:
                    of = None if source is None else source[part]
                    drawn_own = self._own(user[part], item[part], of, others, self._rng(step, shard) if shard else rng)
                    kept = slice(low - part.start, high - part.start)
                    found.append((drawn_own[0][kept], drawn_own[1]))
            if found:
                own, observed = (np.concatenate(parts) for parts in zip(*found, strict=True))
            if own.shape[1]:
                items, own = self._with_own(items, own)
        columns = np.concatenate([items[:shared], memory.cpu().numpy()])
        drawn = np.concatenate([drawn, np.ones(len(memory), np.float32)])
        group, banned = self._banned(user[mine], item[mine], columns, len(memory) > 0)

        def tensor(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Candidates(
            items=items,
            shared=shared,
            memory=memory,
            positive=tensor(positive[mine]),
            drawn=tensor(drawn),
            log_q=tensor(self.log_q(columns, len(user), len(memory))),
            own=tensor(own),
            hard=c.hard if self.hard is not None else 0,
            group=None if group is None else tensor(group),
            banned=tensor(banned.values.astype(np.int64)),
            offsets=tensor(banned.offsets),
            observed=observed,
            batch=tensor(positive),
        )

    def _rng(self, step: int, shard: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, 0x6361], counter=[0, 0, shard, step]))

    def _banned(self, user: Codes, item: Codes, columns: Ints, repeats: bool) -> tuple[Ints | None, Ragged]:
        """The group of each row and the columns each group may not be measured against."""
        if self._config.mask_positives:
            groups, group = self._distinct_users(user)
            values, lengths = _rows_of(self._liked.items, groups)
        elif repeats:  # a remembered copy of the positive is no negative of it
            groups, group = self._distinct(item)
            values, lengths = groups, np.ones(len(groups), np.int64)
        else:
            return None, Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64))
        order = np.argsort(columns, kind="stable")
        ordered = columns[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.r_[starts[1:], len(ordered)]
        items = ordered[starts]
        # A slot per item, not cleared between batches: what it says is believed if the item is really there.
        self._slot[items] = np.arange(len(items))
        at = np.minimum(self._slot[values], len(items) - 1)
        low, found = starts[at], np.where(items[at] == values, ends[at] - starts[at], 0)
        places = np.repeat(low, found) + np.arange(found.sum()) - np.repeat(np.cumsum(found) - found, found)
        rows = np.repeat(np.repeat(np.arange(len(groups)), lengths), found)
        offsets = np.zeros(len(groups) + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=len(groups)), out=offsets[1:])
        return group, Ragged(order[places].astype(np.int32), offsets)

    def _own(
        self, user: Codes, item: Codes, source: Ints | None, others: float, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """(B, H) item rows that stand against one positive alone, -1 for none: random, observed, of the same attribute,
        mined; and the numbers of the interactions that the observed ones are."""
        c = self._config
        parts = []
        observed = np.zeros((len(user), 0), np.int64)
        if self._random is not None:
            parts.append(self._random.draw_distinct(user.astype(np.int64), c.random, rng))
        if self._disliked is not None:
            observed = _values_from_random_start(self._disliked, user, c.disliked, rng)
            if source is not None:
                of, own = (observed, source) if self._moment is None else (self._moment[observed], self._moment[source])
                observed[of < own[:, None]] = -1
            parts.append(np.where(observed >= 0, self._item_of[observed], -1).astype(np.int64))
        if self._attribute is not None:
            values, by_value = self._attribute
            value = _values_from_random_start(values, item, 1, rng)[:, 0]
            found = _values_from_random_start(by_value, np.maximum(value, 0), c.attribute_items, rng)
            parts.append(np.where(value[:, None] >= 0, found, -1))
        if self.hard is not None:
            mined = self.hard[user]
            n = (mined >= 0).sum(1)[:, None]
            place = ((rng.random((len(user), 1)) * n).astype(np.int64) + np.arange(c.hard)) % np.maximum(n, 1)
            found = np.where(np.arange(c.hard) < n, np.take_along_axis(mined, place, 1), -1).astype(np.int64)
            # So many that the others outnumber them: the fraction is rounded at random.
            each = min(c.hard, others / c.hard_ratio)
            wanted = np.floor(each + rng.random(len(user)))
            parts.append(np.where(np.arange(c.hard) < wanted[:, None], found, -1))
        if not parts:
            return np.zeros((len(user), 0), np.int64), observed.ravel()
        own = np.concatenate(parts, 1)
        own[own == item[:, None]] = -1
        if c.mask_positives:
            own[self._liked.holds(user[:, None].astype(np.int64), own)] = -1
        return own, observed[observed >= 0]

    def _with_own(self, items: Ints, own: Ints) -> tuple[Ints, Ints]:
        """Items with those of `own` that are not among them put at the end, and `own` as places in them."""
        wanted, index = np.unique(own, return_inverse=True)
        order = np.argsort(items)
        at = np.minimum(np.searchsorted(items[order], wanted), len(items) - 1)
        place = np.where(items[order][at] == wanted, order[at], -1)
        new = (place < 0) & (wanted >= 0)
        place[new] = len(items) + np.arange(new.sum())
        return np.concatenate([items, wanted[new]]), place[index.reshape(own.shape)]

    def refresh_hard_negatives(self, users: Tensor, items: Tensor, epoch: int, block: int = 1024) -> None:
        """Rank the catalogue for every user by `users` (n_users, D) . `items` (N, D), what they liked left out, and
        remember a random part of the window `hard_ranks`. At most `block` users at a time."""
        first, last = self._config.hard_ranks
        block = max(1, min(block, _CELLS // self._n_items))
        rng = np.random.Generator(np.random.Philox(key=[self._seed, 0x6D69], counter=[0, 0, 0, epoch]))
        mined = np.full((len(users), HARD_NEGATIVES_PER_USER), -1, np.int32)
        for start in range(0, len(users), block):
            rows = np.arange(start, min(start + block, len(users)))
            scores = users[start : start + block] @ items.T
            liked, lengths = _rows_of(self._liked.items, rows)
            flat = np.repeat(np.arange(len(rows)), lengths) * self._n_items + liked
            scores.view(-1)[torch.from_numpy(flat).to(scores.device)] = -torch.inf
            top = scores.topk(min(last, self._n_items), dim=1)
            there = np.isfinite(top.values[:, first - 1 :].cpu().numpy())
            window = np.where(there, top.indices[:, first - 1 :].cpu().numpy(), -1)
            order = np.where(there, rng.random(window.shape), 1.0).argsort(1)[:, :HARD_NEGATIVES_PER_USER]
            mined[rows, : order.shape[1]] = np.take_along_axis(window, order, 1)
        self.hard = mined


def _rows_of(ragged: Ragged, rows: Ints) -> tuple[Ints, Ints]:
    """Values of some rows, row after row, and their lengths."""
    lengths = ragged.offsets[rows + 1] - ragged.offsets[rows]
    ends = np.cumsum(lengths)
    inside = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return ragged.values[np.repeat(ragged.offsets[rows], lengths) + inside].astype(np.int64), lengths


def _values_from_random_start(ragged: Ragged, rows: npt.NDArray[np.integer], n: int, rng: np.random.Generator) -> Ints:
    """(len(rows), n) values of each row, neighbours from a random place on, none twice; -1 where a row has fewer."""
    lengths = ragged.offsets[rows + 1] - ragged.offsets[rows]
    start = (rng.random(len(rows)) * lengths).astype(np.int64)
    place = (start[:, None] + np.arange(n)) % np.maximum(lengths, 1)[:, None]
    if not len(ragged.values):
        return np.full((len(rows), n), -1, np.int64)
    at = np.minimum(ragged.offsets[rows][:, None] + place, len(ragged.values) - 1)
    return np.where(np.arange(n) < lengths[:, None], ragged.values[at], -1).astype(np.int64)


def _attribute_maps(dataset: Dataset, name: str) -> tuple[Ragged, Ragged]:
    """Item -> its values of a feature, and value -> the items that have it."""
    columns = dataset.items.columns
    coded = [n for n, c in columns.items() if isinstance(c, Ragged) or (c.ndim == 1 and c.dtype == np.int32)]
    if name not in coded:
        raise ConfigError(
            f"negatives.attribute: no item feature '{name}' with values to share{nearest(name, coded)} "
            f"(allowed: {', '.join(coded)})"
        )
    column: Any = columns[name]
    n, many = len(dataset.items), isinstance(column, Ragged)
    owner, codes = (np.repeat(np.arange(n), column.lengths), column.values) if many else (np.arange(n), column)
    values = Ragged.from_pairs(owner[codes != UNKNOWN], codes[codes != UNKNOWN], n)
    items = np.repeat(np.arange(n), values.lengths)
    shuffled = np.random.default_rng(0).permutation(len(items))
    by_value = Ragged.from_pairs(values.values[shuffled], items[shuffled], int(values.values.max(initial=0)) + 1)
    return values, by_value
