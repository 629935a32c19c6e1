"""The settings of an experiment, composed of the sections that stand beside their code."""

from __future__ import annotations

from typing import Annotated

from twotower.data.config import DatasetConfig
from twotower.index import INDEXES
from twotower.index.auto import Auto
from twotower.index.protocol import IndexConfig
from twotower.train.recipe import Recipe


class Config(Recipe, DatasetConfig):
    """All settings without the schema: those of the dataset, the recipe of the model, and its index."""

    index: Annotated[IndexConfig, INDEXES] = Auto()
