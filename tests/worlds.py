"""Worlds whose right answer is known, and small tables with every kind of column."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from twotower.config.experiment import Config
from twotower.config.toml import parse_config
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.features.vector import Vector

ID_FEATURES = (
    Categorical(name="user_id", side="user"),
    Categorical(name="item_id", side="item"),
)
CHECKERBOARD_SCHEMA = Schema(label="liked", time="at", time_unit="order", features=ID_FEATURES)

REPLAYED_SCHEMA = Schema(time="at", time_unit="order", duplicates="keep", features=ID_FEATURES)


CHECKERBOARD_TOML = """
[schema]
label = "liked"
time = "at"
time_unit = "order"
[[schema.features]]
name = "user_id"
side = "user"
kind = "categorical"
[[schema.features]]
name = "item_id"
side = "item"
kind = "categorical"
"""
"""Schema of a config of the checkerboard by the ids alone."""


def checkerboard(n_users: int = 40, n_items: int = 30) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Even users like even items, odd users odd ones; every pair is shown once, in an order that mixes both."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(n_users * n_items)
    user, item = pairs // n_items, pairs % n_items
    return (
        pl.DataFrame({"user_id": np.arange(n_users)}),
        pl.DataFrame({"item_id": np.arange(n_items)}),
        pl.DataFrame(
            {
                "user_id": user,
                "item_id": item,
                "liked": ((user + item) % 2 == 0).astype(int),
                "at": np.arange(len(pairs)),
            }
        ),
    )


def replayed(n_users: int = 30, n_items: int = 60, n: int = 1500, seed: int = 0) -> pl.DataFrame:
    """Return interactions in the order of time, 60 % of which repeat an earlier one of their user, drawn among these.
    The others are items of the user's group: users and items have five groups."""
    rng, taken = np.random.default_rng(seed), [list[int]() for _ in range(n_users)]
    rows = []
    for at in range(n):
        user = int(rng.integers(n_users))
        past = taken[user]
        again = past and rng.random() < 0.6
        item = past[rng.integers(len(past))] if again else int(rng.integers(n_items // 5)) * 5 + user % 5
        past.append(item)
        rows.append((user, item, at))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "at"], orient="row")


EVERYTHING_SCHEMA = Schema(
    user_id="uid",
    item_id="iid",
    label="stars",
    positive_above=3,
    time="when",
    title="name",
    features=(
        Categorical(name="uid", side="user"),
        Categorical(name="city", side="user", min_count=2),
        Numeric(name="age", side="user"),
        Numeric(name="income", side="user", buckets=4),
        Sequence(name="liked", side="user", interactions="positive"),
        Sequence(
            name="disliked", side="user", interactions="negative", share_embedding=False, pooling="sqrt", max_length=5
        ),
        Text(name="motto", side="user", pooling="mean", min_count=2),
        Categorical(name="iid", side="item"),
        Categorical(name="brand", side="item", hash_buckets=7),
        MultiHot(name="tags", side="item", separator="|"),
        Vector(name="picture", side="item"),
        Numeric(name="shown", side="item", statistic="count"),
        Numeric(name="mean_stars", side="item", statistic="mean"),
        Sequence(name="fans", side="item", interactions="positive", share_embedding=False),
        Text(name="label", side="item", column="name", hash_buckets=50),
    ),
)


def everything(n_users: int = 60, n_items: int = 40, n: int = 1200) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Tables with every kind of column and some missing values; ids are text; taste follows city and brand."""
    rng = np.random.default_rng(7)
    users = pl.DataFrame(
        {
            "uid": [f"u{i}" for i in range(n_users)],
            "city": [None if i % 11 == 0 else f"city{i % 4}" for i in range(n_users)],
            "age": [None if i % 9 == 0 else float(18 + i) for i in range(n_users)],
            "income": [float("nan") if i % 13 == 0 else float(i * i) for i in range(n_users)],
            "motto": [
                None if i % 10 == 0 else ["more is more", "Less IS more!", "少即是多", ""][i % 4]
                for i in range(n_users)
            ],
        }
    )
    items = pl.DataFrame(
        {
            "iid": [f"i{i}" for i in range(n_items)],
            "name": [f"Item {i}" for i in range(n_items)],
            "brand": [f"brand{i % 5}" for i in range(n_items)],
            "tags": ["|".join(f"t{t}" for t in range(i % 4)) or None for i in range(n_items)],
            "picture": [[float(i % 3), 1.0, -0.5 * i] for i in range(n_items)],
        }
    )
    pairs = rng.choice(n_users * n_items, n, replace=False)
    user, item = pairs // n_items, pairs % n_items
    likes = (user % 4 == item % 4) | (rng.random(n) < 0.2)
    actions = pl.DataFrame(
        {
            "uid": [f"u{u}" for u in user],
            "iid": [f"i{i}" for i in item],
            "stars": np.where(likes, 5, 2),
            "when": 1_600_000_000 + rng.permutation(n) * 60,
        }
    )
    return users, items, actions


def settings(**sections: dict[str, Any] | list[Any]) -> Config:
    """A config that trains in a blink; sections override."""
    base: dict[str, Any] = {
        "train": {"epochs": 2, "batch_size": 256, "lr": 0.02, "device": "cpu"},
        "model": {"width": 8, "pairs": [{"user": {"layers": [8]}, "item": {"layers": [8]}}]},
        "evaluation": {"k": [5], "bootstrap": 0},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return parse_config(base)[1]


def write_movielens_archive(path: Path) -> Path:
    """A small world in the layout of ml-1m.zip: films of a user's parity get 5, others 1."""
    rng = np.random.default_rng(0)
    pairs = rng.choice(40 * 30, 900, replace=False)
    ratings = "\n".join(
        f"{p // 30 + 1}::{p % 30 + 1}::{5 if (p // 30 + p % 30) % 2 == 0 else 1}::{978300000 + n}"
        for n, p in enumerate(pairs)
    )
    users = "\n".join(f"{u}::{'FM'[u % 2]}::{(1, 18, 25)[u % 3]}::{u % 7}::0{u}" for u in range(1, 41))
    movies = "\n".join(f"{i}::Film {i} ({1950 + i})::{'Comedy' if i % 2 else 'Drama|War'}" for i in range(1, 31))
    with zipfile.ZipFile(path, "w") as z:
        for name, text in (("ratings", ratings), ("users", users), ("movies", movies)):
            z.writestr(f"ml-1m/{name}.dat", text + "\n")
    return path
