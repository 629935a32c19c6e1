"""Items in a window of the current model's ranking as per-positive negatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import F32, Codes, Ints, Shaped
from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.evaluation.factors import Factors
from twotower.evaluation.ranking import top_items
from twotower.section import Positive
from twotower.train.negatives.source import PerPositiveSampler, PerPositiveSource, Positives

HARD_NEGATIVES_PER_USER = 64
"""Maximum number of items of a user's rank window that are stored at a refresh."""
MAX_BLOCK_SCORES = 2**25
"""Default number of scores that a refresh holds at a time: 128 MiB of float32."""


class HardNegatives(PerPositiveSource):
    """Items that the current model ranks in a window of the catalogue, without the user's positives.

    Use it to refine a trained ranking (Huang et al. 2020, "Embedding-based Retrieval in Facebook Search", section 6.1).
    """

    kind = "hard"
    warms_up = True
    research = ("ratio", "every", "margin")

    n: int = Field(1, ge=1, le=16, description="Maximum number of items per positive; values above 2 seldom help.")
    ranks: tuple[Positive, Positive] = Field(
        (101, 500),
        description="First and last rank, from 1, of the current model's ranking, from which items are drawn.",
    )
    ratio: float = Field(100.0, gt=0, description="Minimum number of other candidates per hard negative.")
    every: int = Field(1, ge=1, description="Epochs between refreshes of the windows, from the second epoch on.")
    margin: float = Field(0.0, ge=0, description="Drop items that score within this margin of the positive. 0: off.")

    @model_validator(mode="after")
    def _check(self) -> HardNegatives:
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks {list(self.ranks)} ends before it begins")
        return self

    def check(self, dataset: Dataset) -> None:
        if dataset.schema.side("context"):
            raise ConfigError(
                "negatives.hard ranks the catalogue once for each user, and with features of the context a user has a "
                "ranking for each context; drop negatives.hard"
            )

    def build(self, dataset: Dataset, seed: int, device: torch.device) -> PerPositiveSampler:
        return HardSampler(self, dataset.positive_items, len(dataset.items), seed)


class HardSampler(PerPositiveSampler):
    """Draws from a random part of each user's rank window, refreshed at the start of epochs."""

    def __init__(self, options: HardNegatives, positives: Ragged, n_items: int, seed: int) -> None:
        """Take the `positives` of each user. Raises ConfigError if the ranks start beyond the catalogue."""
        if options.ranks[0] > n_items:
            raise ConfigError(
                f"negatives.hard.ranks starts at {options.ranks[0]}, and the catalogue has {n_items} items; lower it"
            )
        self._options, self._positives, self._n_items, self._seed = options, positives, n_items, seed
        if options.margin:
            self.margin = options.margin
        self.windows: Codes | None = None
        """Up to HARD_NEGATIVES_PER_USER item rows of each user's window, padded with -1; None before a refresh."""

    def begin_epoch(self, factors: Callable[[], Factors], epoch: int) -> None:
        """Refresh the windows every `every` epochs, from the second on."""
        if epoch > 0 and (epoch - 1) % self._options.every == 0:
            current = factors()
            self.refresh(current.users, current.items, epoch)

    def refresh(
        self, users: F32[Tensor, "U D"], items: F32[Tensor, "I D"], epoch: int, block: int = 1024,
        max_block_scores: int = MAX_BLOCK_SCORES,
    ) -> None:  # fmt: skip
        """Rank the catalogue without positives for each user, and store a random part of the window `ranks`.

        At most `block` users, and `max_block_scores` scores, but at least one user, are ranked at a time.
        """
        first, last = self._options.ranks
        block = max(1, min(block, max_block_scores // self._n_items))
        rng = np.random.Generator(np.random.Philox(key=[self._seed, 0x6D69], counter=[0, 0, 0, epoch]))
        windows = np.full((len(users), HARD_NEGATIVES_PER_USER), -1, np.int32)
        for start in range(0, len(users), block):
            rows = np.arange(start, min(start + block, len(users)))
            indices, lengths = self._positives.indices(rows)
            positives = pair_keys(np.repeat(rows - start, lengths), self._positives.values[indices], self._n_items)
            scores = users[start : start + block] @ items.T
            window = top_items(scores, positives, min(last, self._n_items))[:, first - 1 :]
            order = np.where(window >= 0, rng.random(window.shape), 1.0).argsort(1)[:, :HARD_NEGATIVES_PER_USER]
            windows[rows, : order.shape[1]] = np.take_along_axis(window, order, 1)
        self.windows = windows

    def draw(self, positives: Positives, rng: np.random.Generator) -> Shaped[Ints, "B n"]:
        """Draw items of each user's rank window; -1 if the window, or `ratio`, allows fewer.

        The average number is min(n, others / ratio) for `others` other candidates: the fraction is rounded at random
        (Huang et al. 2020, section 6.1, blend 100 easy negatives with each hard one). It is 0 before the first refresh.
        """
        user, most = positives.user, self._options.n
        if self.windows is None:
            return np.zeros((len(user), 0), np.int64)
        windows = self.windows[user]
        n = (windows >= 0).sum(1)[:, None]
        place = ((rng.random((len(user), 1)) * n).astype(np.int64) + np.arange(most)) % np.maximum(n, 1)
        drawn = np.where(np.arange(most) < n, np.take_along_axis(windows, place, 1), -1).astype(np.int64)
        limit = np.floor(min(most, positives.others / self._options.ratio) + rng.random(len(user)))
        return np.where(np.arange(most) < limit[:, None], drawn, -1)

    def state(self) -> dict[str, Shaped[Tensor, "*_"]]:
        return {} if self.windows is None else {"windows": torch.from_numpy(self.windows)}

    def load_state(self, state: dict[str, Shaped[Tensor, "*_"]]) -> None:
        if state:
            self.windows = state["windows"].numpy()
