"""A world whose right item depends on the hour of the interaction and the group of the user."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from worlds import settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.schema import Schema

HOURS = 8
USERS = 150
Frames = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]
IDS = (
    Categorical(name="user_id", side="user"),
    Categorical(name="group", side="user"),
    Categorical(name="item_id", side="item"),
)
HOUR = Categorical(name="hour", side="context")


def flat(data: Dataset, name: str) -> npt.NDArray[Any]:
    """A column of the context with one code, or some numbers, a row."""
    column = data.context[name]
    assert isinstance(column, np.ndarray)
    return column


def right_item(user: int, hour: int) -> int:
    """The item that a user wants at an hour: even users and odd users want different ones."""
    return hour + HOURS * (user % 2)


def hourly(n: int = 900) -> Frames:
    """Interactions of users, each at distinct random hours with the right item, a minute apart; the column `device`
    says nothing."""
    rng = np.random.default_rng(5)
    moments = rng.permutation(USERS * HOURS)[:n]
    user, hour = moments // HOURS, moments % HOURS
    return (
        pl.DataFrame({"user_id": np.arange(USERS), "group": np.arange(USERS) % 2}),
        pl.DataFrame({"item_id": np.arange(2 * HOURS)}),
        pl.DataFrame(
            {
                "user_id": user,
                "item_id": hour + HOURS * (user % 2),
                "at": 1_700_000_000 + 60 * np.arange(n),
                "hour": hour,
                "device": [("phone", "tablet", "desktop")[i] for i in rng.integers(0, 3, n)],
            }
        ),
    )


def hourly_schema(*context: Feature) -> Schema:
    """The schema with some features of the context."""
    return Schema(time="at", duplicates="keep", features=(*IDS, *context))


def hourly_settings(**sections: dict[str, object]) -> Config:
    """A config that solves the world in a blink."""
    base: dict[str, dict[str, object]] = {
        "loss": {"kind": "softmax"},
        "negatives": {"full": True},
        "train": {"epochs": 8, "lr": 0.03, "batch_size": 64, "monitor": "validation.recall@1"},
        "evaluation": {"k": [1]},
        "split": {"kind": "time"},
    }
    return settings(**{name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}})
