"""Candidates of a contrastive batch: columns with their counts and log-q, and per-positive negatives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.types import Ints
from twotower.train.negatives.exclusions import Exclusions


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
    exclusions: Exclusions | None
    # row numbers of the interactions that disliked negatives come from: no history of the batch may hold them
    disliked: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    # int64 columns of the positives of the whole batch, of which the B may be one rank's part
    batch_positive: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def mask_excluded(self, logits: Tensor, rows: slice) -> None:
        """Write -inf into the excluded columns of the logits (b, C) of some rows, in place."""
        if self.exclusions is not None:
            self.exclusions.mask(logits, rows)

    def take(self, rows: Tensor) -> Candidates:
        """Return the candidates of some of the positives."""
        exclusions = None if self.exclusions is None else self.exclusions.take(rows)
        return replace(self, positive=self.positive[rows], per_positive=self.per_positive[rows], exclusions=exclusions)
