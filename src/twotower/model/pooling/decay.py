"""Pooling `decay`: exponentially decayed means."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from twotower.model.pooling.pooling import Pooling

Rate = Annotated[float, Field(ge=0, le=1)]


class Decay(Pooling):
    """Exponentially decayed means at several rates, side by side: sum_n r^n x_n / sum_n r^n for each rate r, x_n the
    embedding of the n-th latest interaction.

    Use when recent interactions matter most; an event updates a mean in constant time. Needs
    `train.history_scope = "causal"`.
    """

    kind = "decay"
    needs_time_order = True
    rates: tuple[Rate, ...] = Field(
        (0.0, 0.5, 0.8, 0.93, 0.98, 1.0),
        min_length=1,
        description="Rates. At rate r the n-th latest interaction weighs r^n; 0: the latest alone, 1: the plain mean.",
    )

    @property
    def pieces(self) -> int:
        """Number of rates."""
        return len(self.rates)
