"""Recent popularity of the items, as part of their biases."""

from __future__ import annotations

import torch
from torch import nn

from twotower.data.recent_popularity import PopularityTerms
from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.model.id_prior import IdPrior


class RecentPopularityBias(IdPrior):
    """Score of the recent popularity of each item at the end of the rows before the test part, 0 at first.

    An unknown id has the score of an item without a row."""

    def __init__(self, fields: tuple[InputField, ...]) -> None:
        """Find the ids among the fields of the items. Raises ConfigError."""
        super().__init__(fields, "recent_popularity")
        if self.field is None:
            raise ConfigError(
                "model.recent_popularity is a bias of each item, and no feature of the items is their id without "
                "hash_buckets; add one, or set model.recent_popularity = false"
            )
        self.numbers = nn.Parameter(torch.tensor(PopularityTerms(1.0, 0.0)), requires_grad=False)
        """Half-life, in rows of the log, and weights, in the order of `PopularityTerms`."""

    @property
    def terms(self) -> PopularityTerms:
        """Half-life and weights."""
        return PopularityTerms(*self.numbers.tolist())

    @property
    def is_fitted(self) -> bool:
        """True if a score depends on it."""
        return any(self.terms[1:])
