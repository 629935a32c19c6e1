"""Data sets that several measurements share: the seven plain fields of MovieLens 1M, and tables with a split."""

import polars as pl

from twotower import Categorical, Config, Schema
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.datasets import movielens
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.tables import check

Side = pl.DataFrame | None
FIELDS = {"user": ("user_id", "gender", "age", "occupation"), "item": ("item_id", "genre", "year")}


def prepare_movielens() -> Dataset:
    """Read MovieLens 1M with FIELDS, each categorical."""
    raw = MovieLens1M().load()
    items = raw.items.with_columns(genre=pl.col("genres").list.first())
    features = tuple(Categorical(name=name, side=side) for side, names in FIELDS.items() for name in names)
    schema = movielens.SCHEMA.model_copy(update={"features": features})
    return dataset(raw.users, items, raw.interactions, schema)


def dataset(users: Side, items: Side, actions: pl.DataFrame, schema: Schema, config: Config | None = None) -> Dataset:
    """Encode tables with the split of a config."""
    return build_dataset(check(users, items, actions, schema), schema, (config or Config()).split)
