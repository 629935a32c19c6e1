"""Source of the data: tables, a prepared dataset, or a named data set."""

from __future__ import annotations

import logging
from typing import Literal

from pydantic import Field, model_validator

from twotower.data.dataset import Dataset
from twotower.data.datasets import movielens
from twotower.data.memmap import MemmapDataset
from twotower.data.splits import SplitConfig
from twotower.data.tables import Tables, check
from twotower.errors import ConfigError
from twotower.features.schema import Schema
from twotower.section import Section

log = logging.getLogger(__name__)


class DataConfig(Section):
    """Source of the data: tables, a prepared dataset, or a MovieLens by name."""

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


def read(config: DatasetConfig, schema: Schema | None) -> tuple[Tables | Dataset, Schema]:
    """Read the tables that `config.data` names and check them against the schema, or open the prepared dataset.

    Returns the data and its schema. Raises ConfigError or DataError for what cannot be used."""
    data = config.data
    if data.prepared:
        dataset = MemmapDataset.open(data.prepared)
        dataset.check(schema, config.split)
        return dataset, dataset.schema
    if data.dataset:
        schema = schema or movielens.SCHEMAS[data.dataset]
        raw = movielens.load(data.dataset, data.archive or None)
        tables = check(raw.users, raw.items, raw.interactions, schema)
    else:
        if not data.interactions:
            raise ConfigError("data.interactions is missing; name a CSV or Parquet file, or set data.dataset")
        if schema is None:
            raise ConfigError("[schema] is missing; `config_template()` gives a template")
        tables = check(data.users or None, data.items or None, data.interactions, schema)
    for note in tables.notes:
        log.info(note)
    return tables, schema
