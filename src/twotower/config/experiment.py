"""The settings of an experiment, composed of the sections that stand beside their code."""

from __future__ import annotations

from twotower.data.source import DataConfig
from twotower.data.splits import SplitConfig
from twotower.index.choose import IndexConfig
from twotower.section import Section
from twotower.train.recipe import Recipe


class _Data(Section):
    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()


class Config(Recipe, _Data):
    """All settings without the schema: data, split, the recipe of the model, and its index."""

    index: IndexConfig = IndexConfig()
