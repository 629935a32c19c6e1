"""Logs whose shape is made: length, order, labels, new items, queries."""

from __future__ import annotations

import numpy as np
import polars as pl

START = 1_600_000_000
"""Time of the first row, in seconds since 1970."""


def log(n_users: int = 60, length: int = 12, strength: float = 0.9, n_items: int = 40, seed: int = 0) -> pl.DataFrame:
    """Return interactions, the users in turn: with a probability `strength` an item is followed by its successor, else
    by any."""
    rng = np.random.default_rng(seed)
    items = np.empty((length, n_users), np.int64)
    items[0] = rng.integers(n_items, size=n_users)
    for at in range(1, length):
        follows = rng.random(n_users) < strength
        items[at] = np.where(follows, (items[at - 1] + 1) % n_items, rng.integers(n_items, size=n_users))
    return pl.DataFrame(
        {
            "user_id": np.tile(np.arange(n_users), length),
            "item_id": items.ravel(),
            "timestamp": START + 60 * np.arange(n_users * length),
        }
    )


def with_label(actions: pl.DataFrame, negatives: float, scale: int = 2) -> pl.DataFrame:
    """Return a log with a label: 0 in a share `negatives` of the rows and 1 in others, or ratings 1 to `scale` of such
    halves."""
    n = actions.height
    refused = np.random.default_rng(1).permutation(n) < round(negatives * n)
    if scale == 2:
        return actions.with_columns(pl.Series("clicked", (~refused).astype(int)))
    stars = np.where(refused, 1 + np.arange(n) % (scale // 2), scale - np.arange(n) % (scale // 2))
    return actions.with_columns(pl.Series("rating", stars))


def with_new_items(actions: pl.DataFrame, share: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return a log of whose latest tenth a share of the rows is of new items, and its items with a category and a
    brand."""
    n = actions.height
    late = n - n // 10
    new = np.arange(n) >= n - round(share * (n - late))
    actions = actions.with_columns(pl.Series("item_id", np.where(new, 10_000 + np.arange(n) % 7, actions["item_id"])))
    ids = actions["item_id"].unique().sort()
    items = pl.DataFrame(
        {"item_id": ids, "category": [f"c{i % 4}" for i in ids], "price": [float(i % 13) + i / 1e6 for i in ids]}
    )
    return actions, items


def sessions(n: int = 300, length: int = 6, returning: int = 0) -> pl.DataFrame:
    """Return a log of sessions, one after the other, each of `length` rows of one of four groups of so many items, in
    no order, with repeats. The `returning` last ones are of the users of the first."""
    rng = np.random.default_rng(4)
    user = np.arange(n) % (n - returning)
    item = rng.integers(4, size=(n, 1)) + 4 * rng.integers(length, size=(n, length))
    return pl.DataFrame(
        {"user_id": np.repeat(user, length), "item_id": item.ravel(), "timestamp": START + 60 * np.arange(n * length)}
    )


def with_columns(
    share: float, each: int = 2, n_users: int = 600, n_items: int = 40
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return a log without times of `each` rows of a user, and users with a city and a shoe size. A share of the rows
    is of the items of the city, of which there are four, each with a quarter of the items; others are of any."""
    rng = np.random.default_rng(2)
    city, item = rng.integers(4, size=n_users), np.empty((n_users, each), np.int64)
    for user in range(n_users):
        own = rng.random(each) < share
        odds = rng.random(n_items)
        inside = np.arange(n_items) % 4 == city[user]
        item[user] = [*np.argsort(-odds - inside)[: own.sum()], *np.argsort(-odds)[:each]][:each]
    log = pl.DataFrame({"user_id": np.repeat(np.arange(n_users), each), "item_id": item.ravel()})
    users = {
        "user_id": np.arange(n_users),
        "city": [f"in{c}" for c in city],
        "shoe": rng.integers(36, 46, size=n_users),
    }
    return log, pl.DataFrame(users)


FILMS = ("red planet", "blue moon", "green river", "old city", "dark forest", "silent sea", "golden hill", "last train")
"""Titles of two words."""


def queries(clicks: int = 1, n: int = 80) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return users that are queries, items with titles, and `clicks` clicks of each query."""
    words = [FILMS[i % 8].split() for i in range(n)]
    users = pl.DataFrame({"query_id": range(n), "query": [f"{a} {b} {i % 3}" for i, (a, b) in enumerate(words)]})
    items = pl.DataFrame({"item_id": range(24), "title": [f"{FILMS[i % 8]} {'I' * (i // 8 + 1)}" for i in range(24)]})
    pairs = [(q, (q % 8 + 8 * (q + c)) % 24) for q in range(n) for c in range(clicks)]
    actions = pl.DataFrame(pairs, schema=["query_id", "item_id"], orient="row")
    return users, items, actions.with_columns(timestamp=START + pl.int_range(pl.len()))
