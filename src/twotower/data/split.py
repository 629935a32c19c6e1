"""Section of the split, which a manifest has too: neither numpy nor polars is imported with it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from twotower.section import Section


class SplitConfig(Section):
    """Split of the interactions into train, validation and test part."""

    start_here = ("kind",)
    research = ("seed",)

    kind: Literal["random", "last", "time"] = Field(
        "random",
        description="Rule of the split. random: random rows. last: each user's last row tests and the one before "
        "validates. time: the latest rows.",
    )
    test: float = Field(0.2, gt=0, lt=1, description="Share of all rows in the test part (kinds random and time).")
    validation: float = Field(
        0.1, gt=0, lt=1, description="Share of the remaining rows in the validation part (kinds random and time)."
    )
    seed: int = Field(2022, ge=0, lt=2**32, description="Seed of the random split.")

    @property
    def follows_time(self) -> bool:
        """True if a validation or test row is later than the training rows of its user."""
        return self.kind != "random"

    @property
    def has_boundaries(self) -> bool:
        """True if two times divide the rows of all users into parts."""
        return self.kind == "time"
