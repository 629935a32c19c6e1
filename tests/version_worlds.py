"""Worlds of users and items that change: their tables hold versions, with the time from which each holds."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
from worlds import EVERYTHING_SCHEMA, everything

from twotower.features.categorical import Categorical
from twotower.features.schema import Schema

Tables = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]

N_CITIES, N_ITEMS = 6, 30
CITY_SCHEMA = Schema(
    time="at",
    valid_from="since",
    features=(
        Categorical(name="city", side="user"),
        Categorical(name="item_id", side="item"),
        Categorical(name="town", side="item"),
    ),
)
"""Users are known by their city alone, which is that of the items that they like."""
DAY = timedelta(days=1)
START = datetime(2020, 1, 1)


def _log(at: list[tuple[int, int, datetime]]) -> pl.DataFrame:
    return pl.DataFrame(at, schema=["user_id", "item_id", "at"], orient="row")


def _items() -> pl.DataFrame:
    return pl.DataFrame({"item_id": np.arange(N_ITEMS), "town": [f"c{i % N_CITIES}" for i in range(N_ITEMS)]})


def leaking_city(n_users: int = 90, clicks: int = 4) -> Tables:
    """Each user buys items of the city that it moves to after its last click, from a city that says nothing of it. The
    newest row of a user betrays its clicks; the row of their time does not."""
    rng = np.random.default_rng(3)
    users, log = [], []
    for u in range(n_users):
        before, after = rng.integers(N_CITIES, size=2).tolist()
        users += [(u, f"c{before}", START), (u, f"c{after}", START + 400 * DAY)]
        items = rng.permutation(np.arange(after, N_ITEMS, N_CITIES))[:clicks]
        log += [(u, int(i), START + int(rng.integers(1, 300)) * DAY) for i in items]
    return pl.DataFrame(users, schema=["user_id", "city", "since"], orient="row"), _items(), _log(log)


def moving_city(n_users: int = 60, moves: int = 4) -> Tables:
    """Each user lives in one city after another, and buys items of the city in which it lives; after its last click it
    moves once more. The row of the time of a click says what was bought; the newest row does not."""
    rng = np.random.default_rng(4)
    users, log = [], []
    for u in range(n_users):
        for move in range(moves + 1):
            city, begin = int(rng.integers(N_CITIES)), 100 * move
            users.append((u, f"c{city}", START + begin * DAY))
            bought = rng.permutation(np.arange(city, N_ITEMS, N_CITIES))[: 2 if move < moves else 0]
            log += [(u, int(i), START + (begin + int(rng.integers(0, 100))) * DAY) for i in bought]
    shuffled = pl.DataFrame(users, schema=["user_id", "city", "since"], orient="row").sample(
        fraction=1.0, shuffle=True, seed=0
    )
    return shuffled, _items(), _log(log).unique(["user_id", "item_id"], keep="last", maintain_order=True)


CHANGING_SCHEMA = EVERYTHING_SCHEMA.model_copy(update={"valid_from": "since"})


def changing(seed: int = 1) -> Tables:
    """`everything`, in which users and items have one to four versions, some after their first interactions."""
    users, items, actions = everything()
    rng = np.random.default_rng(seed)
    low, high = int(actions["when"].to_numpy().min()), int(actions["when"].to_numpy().max())

    def versions(frame: pl.DataFrame, *columns: str) -> pl.DataFrame:
        n = rng.integers(1, 5, frame.height)
        table = frame[np.repeat(np.arange(frame.height), n)]
        since = np.concatenate([rng.choice(np.arange(low - 20_000, high, 60), k, replace=False) for k in n])
        mixed = [table[c].sample(fraction=1.0, shuffle=True, seed=len(c)).alias(c) for c in columns]
        return table.with_columns(*mixed, pl.Series("since", since)).sample(fraction=1.0, shuffle=True, seed=2)

    return versions(users, "city", "age", "motto"), versions(items, "brand", "tags", "picture"), actions
