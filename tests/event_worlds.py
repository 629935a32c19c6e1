"""Worlds whose right item depends on what a history says beside its items: the types of its events, or the time between
them."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from worlds import settings

from twotower.config.experiment import Config
from twotower.features.categorical import Categorical
from twotower.features.event_sequence import EventSequence
from twotower.features.feature import Feature
from twotower.features.field import PoolingSpec
from twotower.features.gap_sequence import GapSequence
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence

BROWSED, USERS, ROUNDS = 8, 160, 5
"""Items to look at; item BROWSED + i is what somebody buys who wants item i."""
MINUTE, DAY = 60, 86_400
ATTENTION = PoolingSpec.model_validate({"kind": "transformer", "window": 400, "heads": 2, "blocks": 2, "dropout": 0.0,
    "input_dropout": 0.0})  # fmt: skip
TYPES = EventSequence(name="how", side="user")
GAPS = GapSequence(name="gaps", side="user")


def shopping(by: str) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Rounds of two items, then the purchase of one of them: with `by` "type" of the one in the cart, with "gap" of the
    first if the second followed within a minute, else of the second. The last purchase of each user is the test
    part."""
    rng, rows = np.random.default_rng(0), list[tuple[Any, ...]]()
    for user in range(USERS):
        at = 1_700_000_000 + int(rng.integers(0, 1000))
        for turn in range(ROUNDS):
            pair, second = rng.permutation(BROWSED)[:2].tolist(), bool(rng.integers(2))
            types = ["view", "view"]
            if by == "type":
                types[second] = "cart"
            gap = (DAY if second else 10) if by == "gap" else 10 * MINUTE
            rows += [(user, pair[0], types[0], at, "train"), (user, pair[1], types[1], at + gap, "train")]
            part = "test" if turn == ROUNDS - 1 else "train"
            rows.append((user, BROWSED + pair[second], "buy", at + gap + 600, part))
            at += gap + 3 * DAY
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "type", "at", "part"], orient="row")
    return pl.DataFrame({"user_id": np.arange(USERS)}), pl.DataFrame({"item_id": np.arange(2 * BROWSED)}), log


def shop_schema(*beside: Feature, **options: Any) -> Schema:
    """The schema of the worlds, with some sequences beside that of the items."""
    features = (
        Categorical(name="item_id", side="item"),
        *beside,
        Sequence(name="history", side="user", pooling=ATTENTION, beside=tuple(f.name for f in beside)),
    )
    return Schema.model_validate(
        {"time": "at", "event": "type", "events": {"view": "input", "cart": "input", "buy": 1}, "duplicates": "keep",
            "features": features}
        | options
    )  # fmt: skip


def shop_settings(**sections: dict[str, object]) -> Config:
    """A config that solves the worlds in seconds."""
    base: dict[str, dict[str, object]] = {
        "model": {"width": 32, "bias": False, "pairs": [{"user": {"layers": [32]}, "item": {"layers": [32]}}]},
        "loss": {"kind": "softmax"},
        "negatives": {"full": True},
        "train": {"epochs": 40, "lr": 0.01, "batch_size": 256, "history_scope": "causal"},
        "evaluation": {"k": [1], "repeats": "allow"},
        "split": {"kind": "column", "column": "part", "ordered": True, "validation": 0},
        "index": {"kind": "exact"},
    }
    return settings(**{name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}})
