"""Item vectors of earlier batches as shared negatives."""

from __future__ import annotations

import torch
from torch import Tensor


class CrossBatchMemory:
    """A queue of the item vectors of the latest `size` positives of earlier batches, without gradient.

    They are shared negatives that cost no tower run, as vectors change slowly from step to step. Use it where the batch is
    small beside the catalogue (Wang et al. 2020, "Cross-Batch Memory for Embedding Learning", section 3; for two towers
    Wang et al. 2021, "Cross-Batch Negative Sampling").
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        """Make an empty queue of vectors on `device`; size 0 keeps nothing."""
        self.size, self._device = size, device
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
            self.items, self.vectors = (state[name].to(self._device) for name in ("items", "vectors"))
