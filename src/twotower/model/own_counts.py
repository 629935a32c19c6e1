"""Own counts: scores of the items of a user's own history, added to the product of the vectors."""

from __future__ import annotations

import torch
from torch import nn

from twotower.data.own_items import Recency
from twotower.errors import ConfigError
from twotower.features.field import InputField


class OwnCounts(nn.Module):
    """Weight of each code of a history of the users, 0 at first.

    The score of an item is factor * log(1 + s). The n-th latest interaction of a user adds the weight of its code times
    rate^(n - 1) n^-exponent to the sum s of its item. No vector holds these scores: rankings add them.
    """

    def __init__(self, fields: tuple[InputField, ...], name: str) -> None:
        """Find the history by its name among the fields of the users. Raises ConfigError."""
        super().__init__()
        field = next((f for f in fields if f.name == name and f.sequence), None)
        if field is None:
            found = ", ".join(f.name for f in fields if f.sequence) or "none"
            raise ConfigError(
                f"model.own_counts = '{name}' is no history of the users (found: {found}); name a feature of kind "
                "'sequence', or leave it out"
            )
        self.weights = nn.Parameter(torch.zeros(field.rows), requires_grad=False)
        self.rate = nn.Parameter(torch.ones(()), requires_grad=False)
        self.exponent = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.factor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def recency(self) -> Recency:
        """Rate and exponent."""
        return Recency(float(self.rate), float(self.exponent))

    @property
    def are_fitted(self) -> bool:
        """True if a score depends on them."""
        return bool(self.factor and self.weights.any())
