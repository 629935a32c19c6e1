"""Share of each source of negatives in the gradients of one batch of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.arrays.types import F32, I64, Float, Shaped
from twotower.distributed import DistributedContext
from twotower.train.progress import EpochRecord

PREFIX = "train.negatives."
"""Prefix of names in the record of an epoch: train.negatives.uniform.share, ….above, ….n."""

MAX_ROWS = 512
"""Default number of positives of a batch, on each rank, whose negatives are counted: the first rows."""


class SourceDraws(NamedTuple):
    """Kinds of the sources of a batch's candidates, and the source of each candidate."""

    kinds: list[str]
    shared: F32[Tensor, "S C"]
    """Number of draws of each of C shared columns by each of S sources; 0 for a per-positive source."""
    own: I64[Tensor, "H"]
    """Index into `kinds` of the source of each row's own negatives."""


class SourceTally:
    """Sums over the negatives of one batch by source: absolute gradients of their logits, their number, and the number
    that scores above the positive.

    A candidate drawn n times counts n times. Sources that drew the same candidate share it in proportion to their
    draws.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        """Count the first `max_rows` positives of a batch."""
        self.max_rows = max_rows
        self._sums: dict[str, Float[Tensor, "4"]] = {}  # by kind: gradients, negatives, negatives above, positives

    def begin(self, kinds: Iterable[str]) -> None:
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in kinds}

    def add(
        self, draws: SourceDraws, gradient: F32[Tensor, "b C"], above: Shaped[Tensor, "b C"],
        present: Shaped[Tensor, "b C"], positive: I64[Tensor, "b 1"],
    ) -> None:  # fmt: skip
        """Add the candidates of b positives: the gradients of their logits, and masks of candidates above the positive
        and of candidates that are not left out. Shared columns come first; `positive` is the column of the positive."""
        present = present.scatter(1, positive, torch.zeros_like(positive, dtype=torch.bool))
        rows = gradient.abs() * present, present, above & present
        by_column = torch.stack([each.float().sum(0) for each in rows]).double().cpu()
        n, drawn = draws.shared.shape[1], draws.shared.double().cpu()
        of_shared, of_own = by_column[:, :n], by_column[:, n:]
        parts = drawn / drawn.sum(0).clamp(min=1e-30)
        sums = torch.stack([parts @ of_shared[0], drawn @ of_shared[1], drawn @ of_shared[2]])
        sums.index_add_(1, draws.own.cpu(), of_own)
        for kind, column in zip(draws.kinds, sums.T, strict=True):
            self._sums[kind][:3] += column

    def add_sums(self, kind: str, gradients: float, negatives: float, above: float) -> None:
        self._sums[kind][:3] += torch.tensor([gradients, negatives, above], dtype=torch.float64)

    def end(self, positives: int, context: DistributedContext) -> None:
        """Sum a batch over the ranks, with `positives` counted on this rank; all ranks call it."""
        for sums in self._sums.values():
            sums[3] = positives
            sums.copy_(torch.tensor(context.all_reduce_sum(*sums.tolist()), dtype=torch.float64))

    def take(self) -> EpochRecord:
        """Return and reset the counts of each source with negatives: its share of all negatives' gradients, the share
        of its negatives above the positive, and its negatives per positive."""
        total = sum(float(sums[0]) for sums in self._sums.values())
        record: EpochRecord = {}
        for kind, sums in self._sums.items():
            gradients, negatives, above, positives = sums.tolist()
            if negatives and positives and total > 0:
                record[f"{PREFIX}{kind}.share"] = gradients / total
                record[f"{PREFIX}{kind}.above"] = above / negatives
                record[f"{PREFIX}{kind}.n"] = negatives / positives
        self._sums = {}
        return record

    def state(self) -> dict[str, Float[Tensor, "4"]]:
        """Return the sums by kind; empty before the counted batch of an epoch."""
        return dict(self._sums)

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        self._sums = {kind: sums.double().cpu() for kind, sums in state.items()}
