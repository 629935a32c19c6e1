"""Meaning of the types of events of a log: the target and the weight of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from twotower.section import Section

WEIGHT_RANGE = 1e-6, 1e6
"""Smallest and largest weight above 0, of a column and of a rule."""
OTHER_EVENTS = "*"
"""Key of the rule of all types that have none of their own."""


class EventRule(Section):
    """Meaning of one type of events. A number stands for the weight of a positive, a text for a target."""

    target: Literal["positive", "negative", "input", "ignored"] = Field(
        "positive",
        description="positive, negative: a row that training learns from. input: a row in histories that is no target. "
        "ignored: a row that is left out.",
    )
    weight: float = Field(
        1.0,
        ge=0,
        le=WEIGHT_RANGE[1],
        description="Weight of a row: 0, or from 1e-6 to 1e6. It multiplies that of schema.weight.",
    )

    @model_validator(mode="before")
    @classmethod
    def _spelled_short(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"target": data}
        if isinstance(data, int | float) and not isinstance(data, bool):
            return {"weight": data}
        if not isinstance(data, Mapping | EventRule):
            raise ValueError(f"expected a weight, a target or both as {{target, weight}}, got {data!r:.60}")
        return data

    @model_validator(mode="after")
    def _weigh_targets(self) -> EventRule:
        if 0 < self.weight < WEIGHT_RANGE[0]:
            raise ValueError(
                f"weight is {self.weight:g}, expected 0, or at least {WEIGHT_RANGE[0]:g}; scale all weights"
            )
        if self.target in ("input", "ignored") and self.weight != 1:
            raise ValueError(
                f"weight is {self.weight:g}, and rows of the target '{self.target}' have none; leave it out"
            )
        return self

    @property
    def positive(self) -> bool:
        """True for rows that are positives; those of "input" are positives of weight 0."""
        return self.target in ("positive", "input")

    @property
    def factor(self) -> float:
        """Weight of the rows, 0 for "input"."""
        return 0.0 if self.target == "input" else self.weight
