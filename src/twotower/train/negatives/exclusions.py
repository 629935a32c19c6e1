"""Columns that the rows of a contrastive batch leave out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.types import Ints


@dataclass(frozen=True)
class Exclusions:
    """Columns that B rows leave out; the rows of a group leave out the same."""

    group: Tensor  # (B,) int64
    columns: Tensor  # (n,) int64, group after group
    offsets: Tensor  # (groups + 1,) int64, where the columns of each group begin

    def take(self, rows: Tensor) -> Exclusions:
        """Return the exclusions of some rows."""
        return replace(self, group=self.group[rows])

    def mask(self, logits: Tensor, rows: slice) -> None:
        """Write -inf into the excluded columns of the logits (b, C) of some rows, in place."""
        if not len(self.columns):
            return
        group = self.group[rows]
        n = self.offsets[group + 1] - self.offsets[group]
        row = torch.repeat_interleave(torch.arange(len(group), device=n.device), n)
        within = torch.arange(len(row), device=n.device) - torch.repeat_interleave(n.cumsum(0) - n, n)
        column = self.columns[self.offsets[group].repeat_interleave(n) + within]
        logits.view(-1)[row * logits.shape[1] + column] = -torch.inf


class ColumnFinder:
    """Finds the columns that hold given items, with a slot per item of the catalogue."""

    def __init__(self, n_items: int) -> None:
        self._slot = np.zeros(n_items, np.int64)

    def __call__(self, columns: Ints, wanted: Ints, lengths: Ints) -> Ragged:
        """Return for each of G groups the places in `columns`, item rows (C,), that hold one of its wanted items.

        `wanted` are the items of the groups, one group after another, `lengths` (G,) their numbers.
        """
        order = np.argsort(columns, kind="stable")
        ordered = columns[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.r_[starts[1:], len(ordered)]
        items = ordered[starts]
        # One slot per item, not cleared between batches: a slot counts only if `items` has the item at its place.
        self._slot[items] = np.arange(len(items))
        at = np.minimum(self._slot[wanted], len(items) - 1)
        n = np.where(items[at] == wanted, ends[at] - starts[at], 0)
        places = run_indices(starts[at], n)
        groups = np.repeat(np.repeat(np.arange(len(lengths)), lengths), n)
        return Ragged(order[places].astype(np.int32), offsets_of(np.bincount(groups, minlength=len(lengths))))
