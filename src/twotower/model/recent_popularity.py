"""Recent popularity of the items, as part of their biases."""

from __future__ import annotations

import torch
from torch import nn

from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.model.id_prior import IdPrior


class RecentPopularityBias(IdPrior):
    """Weight times log(1 + n) for each item, n how often it is taken in the latest rows before the test part; 0 at first and for an id that reads as
    unknown."""

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        """Find the ids among the fields of the items. Raises ConfigError."""
        super().__init__(fields, "recent_popularity")
        if self.field is None:
            raise ConfigError(
                "model.recent_popularity is a bias of each item, and no feature of the items is their id without hash_buckets; add one, or set "
                "model.recent_popularity = false"
            )
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.half_life = nn.Parameter(torch.ones(()), requires_grad=False)
        """Rows of the log after which one counts half."""

    @property
    def is_fitted(self) -> bool:
        """True if a score depends on it."""
        return bool(self.weight)
