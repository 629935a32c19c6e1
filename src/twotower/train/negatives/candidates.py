"""Candidates of a contrastive batch: columns with their counts and log-q, those that a row leaves out, and per-positive
negatives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.types import F32, I64, Float, Ints, Shaped
from twotower.train.negatives.source_tally import SourceDraws


@dataclass(frozen=True)
class Candidates:
    """The candidates of B positives: C shared columns, the last M of them from memory, and H negatives of each positive."""

    items: Shaped[Ints, "I"]  # distinct item rows whose vectors are needed; the first `shared` of them are columns
    shared: int
    memory_items: I64[Tensor, "M"]  # item rows of remembered vectors, columns after the shared ones
    positive: I64[Tensor, "B"]  # column of each row's positive
    counts: F32[Tensor, "C"]  # number of draws of the column; 0: present for its positive only
    log_q: F32[Tensor, "C"]  # log of the expected number of draws of the column's item
    per_positive: I64[Tensor, "B H"]  # into `items`, -1 for none
    exclusions: Exclusions | None
    memory_vectors: Float[Tensor, "M D"] | None = None
    # a per-positive negative that scores within this margin of its positive is left out; None: none is
    margins: F32[Tensor, "H"] | None = None
    # row numbers of the interactions that per-positive negatives come from: no history of the batch may hold them
    interactions: Shaped[Ints, "_"] = field(default_factory=lambda: np.zeros(0, np.int64))
    # columns of the positives of the whole batch, of which the B may be one rank's part
    batch_positive: I64[Tensor, "_"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    # the source of each candidate, if the caller asked for it
    draws: SourceDraws | None = None

    def mask_excluded(self, logits: F32[Tensor, "b C"], rows: slice) -> None:
        """Write -inf into the excluded columns of the logits of some rows, in place."""
        if self.exclusions is not None:
            self.exclusions.mask(logits, rows)

    def take(self, rows: I64[Tensor, "b"]) -> Candidates:
        """Return the candidates of some of the positives."""
        exclusions = None if self.exclusions is None else self.exclusions.take(rows)
        return replace(self, positive=self.positive[rows], per_positive=self.per_positive[rows], exclusions=exclusions)


@dataclass(frozen=True)
class Exclusions:
    """Columns that B rows leave out; the rows of a group leave out the same."""

    group: I64[Tensor, "B"]
    columns: I64[Tensor, "n"]  # group after group
    offsets: I64[Tensor, "_"]  # (groups + 1,), where the columns of each group begin

    def take(self, rows: I64[Tensor, "b"]) -> Exclusions:
        """Return the exclusions of some rows."""
        return replace(self, group=self.group[rows])

    def mask(self, logits: F32[Tensor, "b C"], rows: slice) -> None:
        """Write -inf into the excluded columns of the logits of some rows, in place."""
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

    def __call__(self, columns: Shaped[Ints, "C"], wanted: Shaped[Ints, "n"], lengths: Shaped[Ints, "G"]) -> Ragged:
        """Return for each of G groups the places in `columns`, item rows, that hold one of its wanted items.

        `wanted` are the items of the groups, one group after another, `lengths` their numbers.
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
