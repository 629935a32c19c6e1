"""Sections of the data: its source and its split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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


class DataConfig(Section):
    """Source of the data: tables, a prepared dataset, or a MovieLens by name."""

    start_here = ("users", "items", "interactions")

    dataset: Literal["", "ml-1m", "ml-100k", "ml-1m-titles", "ml-100k-titles"] = Field(
        "",
        description="Name of a MovieLens, or of queries made from its titles. Brings a [schema] where none is given. "
        "Empty: your own tables.",
    )
    archive: str = Field(
        "", description="Path of the MovieLens zip of `dataset`. Empty: TWOTOWER_DATA, then the network."
    )
    users: str = Field(
        "",
        description="Users: a CSV or Parquet file, a folder of them, or a pattern. Empty: the user ids of the "
        "interactions.",
    )
    items: str = Field(
        "",
        description="Items: a CSV or Parquet file, a folder of them, or a pattern. Empty: the item ids of the "
        "interactions.",
    )
    interactions: str = Field(
        "",
        description="Interactions: a CSV or Parquet file, a folder of them, or a pattern. Paths are relative to the "
        "config file.",
    )
    prepared: str = Field(
        "", description="Folder written by `twotower prepare`, to train on instead of tables. Empty: none."
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.archive and not self.dataset:
            raise ValueError("data.archive needs data.dataset; set it, or name data.interactions instead")
        if self.dataset and (self.users or self.items or self.interactions):
            raise ValueError("give either data.dataset or data.interactions (with users and items), not both")
        if self.prepared and self.dataset:
            raise ValueError("give either data.dataset or data.prepared, not both")
        return self


class DatasetConfig(Section):
    """The settings that decide the dataset: the source of the data and its split."""

    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
