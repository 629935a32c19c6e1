"""Section of the split, which a manifest has too: neither numpy nor polars is imported with it."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from twotower.section import Section

PART_NAMES = ("train", "validation", "test")
"""Names of the parts by code."""


class SplitConfig(Section):
    """Split of the interactions into train, validation and test part.

    Kinds: random (random rows), user_random (random rows of each user), last (each user's last row tests, and the one
    before validates), time (the latest rows), user_ratio (each user's latest rows), column (the part that a column
    names), files (the part whose file has the row: data.train, data.validation, data.test).

    `validation` is a share of the rows that are not of the test part; with the kinds column and files it has an effect
    if no given row validates, and with the kind last only 0 has one. `from_train`: random is a share drawn at random,
    last is each user's last positive and what follows, time is the latest share; histories of the test part hold these
    rows. Rows of the users that `users` leaves out are all of the train part. `gap` drops rows that a bundle would not
    know yet when it is served."""

    start_here = ("kind",)
    research = ("seed",)
    kinds_of_users: ClassVar[tuple[str, ...]] = ("last", "user_ratio", "user_random")
    """Rules that take a part of each user's rows."""

    kind: Literal["random", "user_random", "last", "time", "user_ratio", "column", "files"] = Field(
        "random",
        description="Rule that chooses the rows of the parts: at random, by time, or as the log names them.",
    )
    column: str = Field(
        "", description="Column of the interactions that names a row's part: train, validation or test (kind column)."
    )
    ordered: bool = Field(
        False,
        description="Given parts follow one another in time, so histories of the test part hold the validation part "
        "(kinds column and files).",
    )
    test: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of all rows in the test part (kinds random, user_random, time and user_ratio).",
    )
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the remaining rows in the validation part. "
        "0: no validation part, and training keeps the last epoch.",
    )
    from_train: Literal["", "random", "last", "time"] = Field(
        "",
        description="Training rows that validate if no given row does (kinds column and files). "
        "Empty: random, or of ordered parts as test follows train.",
    )
    users: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of users whose rows test and validate, drawn by their ids (kinds last, user_ratio and "
        "user_random). 1: all users.",
    )
    gap: float = Field(
        0.0,
        ge=0,
        description="Time before the validation and the test part whose rows are dropped, in seconds (kind time). "
        "0: none.",
    )
    seed: int = Field(2022, ge=0, lt=2**32, description="Seed of the random splits, and of the drawn users.")

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        if self.kind == "column" and not self.column:
            raise ValueError("kind = 'column' needs the name of a column; set split.column")
        of = {
            "column": ("column",),
            "ordered": ("column", "files"),
            "from_train": ("column", "files"),
            "gap": ("time",),
            "users": self.kinds_of_users,
        }
        for name, kinds in of.items():
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.kind not in kinds:
                other = " or ".join(f"'{kind}'" for kind in kinds)
                out = f"leave it out, or set split.{name} = {json.dumps(default)}"
                raise ValueError(f"{name} goes with split.kind = {other}, not '{self.kind}'; {out}")
        if self.from_train and not self.validation:
            raise ValueError(
                "from_train takes a validation part from train; set split.validation above 0, or leave it out"
            )
        return self

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Shares that are set and not read by the rule."""
        if self.kind != "last" and not self.is_given:
            return ()
        kept = ("validation",) if self.is_given or not self.validation else ()
        fields = type(self).model_fields
        return tuple(n for n in ("test", "validation") if n not in kept and getattr(self, n) != fields[n].default)

    @property
    def is_given(self) -> bool:
        """True if the log names the part of each row."""
        return self.kind in ("column", "files")

    @property
    def needs_time(self) -> bool:
        """True if the rule reads times."""
        return self.kind in ("last", "time", "user_ratio")

    @property
    def follows_time(self) -> bool:
        """True if a validation or test row is later than the training rows of its user."""
        return self.needs_time or self.ordered

    @property
    def histories_grow(self) -> bool:
        """True if histories of the test part hold the validation part too: it is earlier, or of the rows that train in
        no order."""
        return self.follows_time or self.kind == "user_random" or bool(self.from_train)

    @property
    def is_by_user(self) -> bool:
        """True if the part of a row depends on the rows of its user alone, not on times or rows of the whole log."""
        rule = self.rule_of_train or self
        return rule.kind in ("last", "user_ratio") or rule.is_given

    @property
    def rule_of_train(self) -> SplitConfig | None:
        """Split of the given training rows whose test part validates; None if none does."""
        shares = {"test": self.validation, "validation": 0, "seed": self.seed}
        return SplitConfig.model_validate({"kind": self.from_train, **shares}) if self.from_train else None

    @property
    def has_boundaries(self) -> bool:
        """True if two times divide the rows of all users into parts."""
        return self.kind == "time"

    @property
    def needs_validation(self) -> bool:
        """True if the validation part must have rows."""
        return bool(self.validation) and not self.is_given
