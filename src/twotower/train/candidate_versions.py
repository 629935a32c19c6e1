"""Versions of the candidates of a contrastive batch: each positive sees the candidates as they were at its time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import offsets_of, run_indices
from twotower.arrays.types import I64, Ints, Shaped
from twotower.data.versions import Versions
from twotower.train.negatives.candidates import Candidates


class CandidateVersions:
    """Versions of the I candidates of a batch that one of its times sees: X input rows, those of a candidate side by side."""

    def __init__(
        self, candidates: Candidates, versions: Versions, times: Shaped[Ints, "n"], device: torch.device
    ) -> None:
        """Find the versions that hold at one of the `times` of the whole batch, at least one of each candidate."""
        items, self._times = candidates.items, np.unique(times)
        last = versions.at(items, np.broadcast_to(self._times[-1], items.shape))
        first = versions.at(items, np.broadcast_to(self._times[0], items.shape))
        n = last - first + 1
        rows, owner = run_indices(first, n), np.repeat(np.arange(len(items)), n)
        # A version is seen from the first of the times that is not before it, up to that of the next version.
        seen_from = np.searchsorted(self._times, np.maximum(versions.since[rows], self._times[0]))
        kept = np.r_[(owner[1:] != owner[:-1]) | (seen_from[1:] != seen_from[:-1]), len(rows) > 0]
        self.rows: Ints = rows[kept]
        """(X,) Rows of the versions in the tables of all versions."""
        self.shared = int(offsets_of(np.bincount(owner[kept], minlength=len(items)))[candidates.shared])
        """Number of versions of the shared candidates, which stand first."""
        self.several = len(self.rows) > len(items)
        """True if a candidate has more than one version in the batch."""
        self._keys = torch.from_numpy(owner[kept] * len(self._times) + seen_from[kept]).to(device)

    def seen_at(self, times: Shaped[Ints, "B"]) -> SeenVersions:
        """Return the versions that B positives see at their times, which are times of the batch."""
        steps = torch.from_numpy(np.searchsorted(self._times, times)).to(self._keys.device)
        return SeenVersions(self._keys, len(self._times), steps, self.shared)


@dataclass(frozen=True)
class SeenVersions:
    """Versions, out of X, that B positives see at their steps of time."""

    keys: I64[Tensor, "X"]  # candidate * n_steps + first step that sees the version, rising
    n_steps: int
    steps: I64[Tensor, "B"]
    shared: int  # number of versions of the shared candidates

    def find(self, candidates: I64[Tensor, "b C"], rows: slice = slice(None)) -> I64[Tensor, "B C"]:
        """Return the places among the X versions of candidates, by place among the I, for some of the positives; b is their
        number, or 1."""
        wanted = candidates * self.n_steps + self.steps[rows, None]
        return torch.searchsorted(self.keys, wanted, right=True) - 1

    def of_shared(self, rows: slice) -> I64[Tensor, "b C"]:
        """Return the places among the versions of all shared candidates for some of the positives, without a search for each."""
        steps, order = self.steps[rows].sort()
        # In the order of their steps, neighbouring positives see one version of a candidate.
        first, until = self._shown
        n = torch.searchsorted(steps, until) - torch.searchsorted(steps, first)
        places = torch.arange(self.shared, device=n.device).repeat_interleave(n).view(-1, len(steps))
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        return places[:, rank].T.contiguous()

    @cached_property
    def _shown(self) -> tuple[I64[Tensor, "S"], I64[Tensor, "S"]]:
        """First step that sees each version of the shared candidates, and the first that no longer does."""
        keys = self.keys[: self.shared]
        first, owner = keys % self.n_steps, keys // self.n_steps
        until = torch.full_like(first, self.n_steps)
        until[:-1] = torch.where(owner[1:] == owner[:-1], first[1:], self.n_steps)
        return first, until
