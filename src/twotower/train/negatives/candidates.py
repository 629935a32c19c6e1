"""Candidates of a contrastive batch: shared columns with counts and log-q, excluded columns, negatives of each
positive, and versions of the items at the times of the positives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged, offsets_of, run_indices
from twotower.arrays.types import F32, I64, Float, Ints, Shaped
from twotower.data.side import Side


@dataclass(frozen=True)
class Candidates:
    """Candidates of B positives: C shared columns, the last M from memory, and H negatives of each positive."""

    items: Shaped[Ints, "I"]  # distinct item rows whose vectors are needed; the first `shared` are columns
    shared: int
    memory_items: I64[Tensor, "M"]  # item rows of remembered vectors, in the last columns
    positive: I64[Tensor, "B"]  # column of each row's positive
    counts: F32[Tensor, "C"]  # number of draws of the column; 0: present for a positive only
    log_q: F32[Tensor, "C"]  # log of the expected number of draws of the column's item
    per_positive: I64[Tensor, "B H"]  # into `items`, -1 for none
    exclusions: Exclusions | None
    weights: F32[Tensor, "B"]
    memory_vectors: Float[Tensor, "M D"] | None = None
    # per-positive negatives that score within this margin of the positive are left out; None: none
    margins: F32[Tensor, "H"] | None = None
    # indices of interactions that are per-positive negatives: no history of the batch may hold them
    interactions: Shaped[Ints, "_"] = field(default_factory=lambda: np.zeros(0, np.int64))
    # columns of the positives of the whole batch; the B positives may be one rank's part
    batch_positive: I64[Tensor, "_"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def mask_excluded(self, logits: F32[Tensor, "b C"], rows: slice) -> None:
        if self.exclusions is not None:
            self.exclusions.mask(logits, rows)

    def take(self, rows: I64[Tensor, "b"]) -> Candidates:
        exclusions = None if self.exclusions is None else self.exclusions.take(rows)
        return replace(
            self, positive=self.positive[rows], per_positive=self.per_positive[rows], exclusions=exclusions,
            weights=self.weights[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class Exclusions:
    """Columns that B rows leave out; rows of a group leave out the same columns."""

    group: I64[Tensor, "B"]
    columns: I64[Tensor, "n"]  # group after group
    offsets: I64[Tensor, "_"]  # (groups + 1,) first column of each group

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
    """Index from items to columns, with one slot per item of the catalogue."""

    def __init__(self, n_items: int) -> None:
        self._slot = np.zeros(n_items, np.int64)

    def __call__(self, columns: Shaped[Ints, "C"], wanted: Shaped[Ints, "n"], lengths: Shaped[Ints, "G"]) -> Ragged:
        """Return for each of G groups the places in `columns` (item rows) of its wanted items.

        `wanted` holds the items group by group, `lengths` the number of each group.
        """
        order = np.argsort(columns, kind="stable")
        ordered = columns[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.r_[starts[1:], len(ordered)]
        items = ordered[starts]
        # Slots are not cleared between batches: a slot is valid only if `items` has the item at its place.
        self._slot[items] = np.arange(len(items))
        at = np.minimum(self._slot[wanted], len(items) - 1)
        n = np.where(items[at] == wanted, ends[at] - starts[at], 0)
        places = run_indices(starts[at], n)
        groups = np.repeat(np.repeat(np.arange(len(lengths)), lengths), n)
        return Ragged(order[places].astype(np.int32), offsets_of(np.bincount(groups, minlength=len(lengths))))


class CandidateVersions:
    """Versions of I candidates that are valid at one of the times of a batch: X input rows, grouped by candidate."""

    several = False
    """True if a candidate has more than one version in the batch."""

    def __init__(self, candidates: Candidates, side: Side, times: Shaped[Ints, "n"], device: torch.device) -> None:
        """Find the versions of the items, a side, that are valid at one of the `times` of the whole batch, at least one
        of each candidate; without versions the candidates themselves."""
        items, versions = candidates.items, side.versions
        self.rows: Ints = items
        """(X,) Rows in the tables of all versions."""
        self.shared = candidates.shared
        """Number of versions of the shared candidates, which are first."""
        if versions is None:
            return
        self._times = np.unique(times)
        last = versions.at(items, np.broadcast_to(self._times[-1], items.shape))
        first = versions.at(items, np.broadcast_to(self._times[0], items.shape))
        n = last - first + 1
        rows, owner = run_indices(first, n), np.repeat(np.arange(len(items)), n)
        # A version is seen from the first time at or after it, up to that of the next version.
        seen_from = np.searchsorted(self._times, np.maximum(versions.since[rows], self._times[0]))
        kept = np.r_[(owner[1:] != owner[:-1]) | (seen_from[1:] != seen_from[:-1]), len(rows) > 0]
        self.rows = rows[kept]
        self.shared = int(offsets_of(np.bincount(owner[kept], minlength=len(items)))[candidates.shared])
        self.several = len(self.rows) > len(items)
        self._keys = torch.from_numpy(owner[kept] * len(self._times) + seen_from[kept]).to(device)

    def seen_at(self, times: Shaped[Ints, "B"]) -> SeenVersions:
        """Return the versions that B positives of the batch see at their times."""
        steps = torch.from_numpy(np.searchsorted(self._times, times)).to(self._keys.device)
        return SeenVersions(self._keys, len(self._times), steps, self.shared)


@dataclass(frozen=True)
class SeenVersions:
    """Versions, out of X, that B positives see at their times."""

    keys: I64[Tensor, "X"]  # candidate * n_steps + first step that sees the version, ascending
    n_steps: int
    steps: I64[Tensor, "B"]
    shared: int  # number of versions of the shared candidates

    def find(self, candidates: I64[Tensor, "b C"], rows: slice = slice(None)) -> I64[Tensor, "B C"]:
        """Return places among the X versions for places among the I candidates; b is the number of positives, or 1."""
        wanted = candidates * self.n_steps + self.steps[rows, None]
        return torch.searchsorted(self.keys, wanted, right=True) - 1

    def of_shared(self, rows: slice) -> I64[Tensor, "b C"]:
        """Return the places of all shared candidates for some positives, without a search for each positive."""
        steps, order = self.steps[rows].sort()
        # In the order of steps, adjacent positives see the same version of a candidate.
        first, until = self._shown
        n = torch.searchsorted(steps, until) - torch.searchsorted(steps, first)
        places = torch.arange(self.shared, device=n.device).repeat_interleave(n).view(-1, len(steps))
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        return places[:, rank].T.contiguous()

    @cached_property
    def _shown(self) -> tuple[I64[Tensor, "S"], I64[Tensor, "S"]]:
        """First step that sees each version of the shared candidates, and the first step that does not."""
        keys = self.keys[: self.shared]
        first, owner = keys % self.n_steps, keys // self.n_steps
        until = torch.full_like(first, self.n_steps)
        until[:-1] = torch.where(owner[1:] == owner[:-1], first[1:], self.n_steps)
        return first, until
