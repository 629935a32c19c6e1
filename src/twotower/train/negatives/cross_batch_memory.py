"""Item vectors of earlier batches as shared negatives."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twotower.arrays.types import F32, I64, Codes, Doubles, Float, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.train.negatives.source import Memory, SharedSampler, SharedSource, positive_shares


class CrossBatchMemory(SharedSource):
    """Item vectors of the latest positives of earlier batches, as shared candidates.

    They cost no tower run, as vectors change slowly from step to step, and have no gradient. Use it if the batch is
    much smaller than the catalogue (Wang et al. 2020, "Cross-Batch Memory for Embedding Learning", section 3; for two
    towers Wang et al. 2021, "Cross-Batch Negative Sampling"). With M vectors, an item with k of the N training
    positives is expected M k / N times.
    """

    kind = "cross_batch_memory"
    beyond_batch = True
    warms_up = True

    n: int = Field(
        10_000, ge=1, description="Number of positives of earlier batches whose item vectors are candidates."
    )

    @property
    def remembered(self) -> int:
        return self.n

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> VectorQueue:
        return VectorQueue(self.n, positive_shares(dataset), device)


class VectorQueue(SharedSampler):
    """A queue of the item vectors of the latest `size` positives, without gradient."""

    def __init__(self, size: int, shares: Shaped[Doubles, "items"], device: torch.device | None = None) -> None:
        """Make an empty queue on `device`; `shares` are the shares of items in the training positives."""
        self.size, self._shares, self._device = size, shares, device

    def draw(self, item: Shaped[Codes, "B"], rng: np.random.Generator) -> Shaped[Ints, 0]:
        """Draw nothing: the candidates are in `memory`."""
        return np.zeros(0, np.int64)

    def expected(self, items: Shaped[Ints, "n"], positives: float) -> Shaped[Doubles, "n"]:
        return self._shares[items] * (0 if self.memory is None else float(self.memory.draws.sum()))

    def remember(self, items: I64[Tensor, "B"], vectors: Float[Tensor, "B D"], weights: F32[Tensor, "B"]) -> None:
        every = Memory(items, vectors.detach(), weights)
        if self.memory is not None:
            every = Memory(*(torch.cat(columns) for columns in zip(self.memory, every, strict=True)))
        self.memory = Memory(*(column[-self.size :] for column in every))

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        return {} if self.memory is None else self.memory._asdict()

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        if state:
            self.memory = Memory(**{name: tensor.to(self._device) for name, tensor in state.items()})
