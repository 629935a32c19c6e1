"""Items that the present model ranks in a window, as per-positive negatives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twotower.arrays.ragged import Ragged
from twotower.arrays.sets import pair_keys
from twotower.arrays.types import Codes, Ints
from twotower.errors import ConfigError
from twotower.evaluation.ranking import top_items
from twotower.train.negatives.config import NegativesConfig

HARD_NEGATIVES_PER_USER = 64
"""Items of a user's rank window that are kept from one refresh of the hard negatives to the next."""
MAX_BLOCK_SCORES = 2**25
"""Scores that a refresh of the hard negatives holds at a time, by default: 128 MiB of float32."""


class HardNegatives:
    """Draws from the items that the present model ranks between `hard_ranks` for a user, without the user's positives.

    To refine a trained ranking (Huang et al. 2020, section 6.1).
    """

    def __init__(self, positives: Ragged, n_items: int, config: NegativesConfig, seed: int) -> None:
        """Take the `positives` of each user. Raises ConfigError if the ranks start beyond the catalogue."""
        if config.hard_ranks[0] > n_items:
            raise ConfigError(
                f"negatives.hard_ranks starts at {config.hard_ranks[0]}, and the catalogue has {n_items} items; lower it"
            )
        self._positives, self._n_items, self._config, self._seed = positives, n_items, config, seed
        self.windows: Codes | None = None
        """(n_users, HARD_NEGATIVES_PER_USER) item rows of each user's rank window, filled up with -1; None before the first
        refresh."""

    def is_due(self, epoch: int) -> bool:
        """Return True if epoch `epoch` (0, 1, …) begins with a refresh: every `hard_every`-th but the first."""
        return epoch > 0 and (epoch - 1) % self._config.hard_every == 0

    def refresh(
        self, users: Tensor, items: Tensor, epoch: int, block: int = 1024, max_block_scores: int = MAX_BLOCK_SCORES
    ) -> None:
        """Rank the catalogue for every user by `users` (n_users, D) . `items` (N, D), without the user's positives, and keep
        a random part of the window `hard_ranks`.

        At most `block` users are ranked at a time, and at most `max_block_scores` scores, but at least one user.
        """
        first, last = self._config.hard_ranks
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

    def draw(self, user: Codes, others: float, rng: np.random.Generator) -> Ints:
        """Draw item rows (B, hard) of each user's rank window; -1 where the window, or `hard_ratio`, allows fewer.

        On average min(hard, others / hard_ratio) for `others` other candidates of a positive: the fraction is rounded at
        random (Huang et al. 2020, section 6.1, blend 100 easy negatives with each hard one). Nothing before the first
        refresh: (B, 0).
        """
        if self.windows is None:
            return np.zeros((len(user), 0), np.int64)
        c = self._config
        windows = self.windows[user]
        n = (windows >= 0).sum(1)[:, None]
        place = ((rng.random((len(user), 1)) * n).astype(np.int64) + np.arange(c.hard)) % np.maximum(n, 1)
        drawn = np.where(np.arange(c.hard) < n, np.take_along_axis(windows, place, 1), -1).astype(np.int64)
        limit = np.floor(min(c.hard, others / c.hard_ratio) + rng.random(len(user)))
        return np.where(np.arange(c.hard) < limit[:, None], drawn, -1)

    def state(self) -> dict[str, Tensor]:
        """Return the windows."""
        return {} if self.windows is None else {"windows": torch.from_numpy(self.windows)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state, if it holds windows."""
        if state:
            self.windows = state["windows"].numpy()
