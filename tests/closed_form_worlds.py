"""Logs from which closed forms find something: groups of items, and courses of stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence

ITEMS, GROUP = 60, 3
HISTORY: dict[str, Any] = {"side": "user", "share_embedding": False}
GROUPS = Schema(
    features=(
        Sequence(name="one", pooling={"kind": "ridge", "steps": 30}, **HISTORY),
        Sequence(name="two", pooling="sum", **HISTORY),
        Categorical(name="item_id", side="item"),
    )
)
COLUMN = SplitConfig(kind="column", column="part")


def groups(
    share: float = 0.0, validates: bool = True, users: int = 200, zipf: float = 0.0, schema: Schema = GROUPS
) -> Dataset:
    """Users take two of the three items of each of four groups, and eight of chance, by Zipf's law with the exponent
    `zipf`. A `share` of train validates where no part is given."""
    rng, rows = np.random.default_rng(5), list[tuple[int, int]]()
    odds = np.arange(1.0, ITEMS + 1) ** -zipf
    for user in range(users):
        some = rng.choice(ITEMS // GROUP, 4, replace=False)
        taken = {int(GROUP * g + i) for g in some for i in rng.choice(GROUP, 2, replace=False)}
        chance = rng.choice(ITEMS, 8, replace=bool(zipf), p=odds / odds.sum() if zipf else None)
        rows += [(user, item) for item in sorted(taken | {*chance.tolist()})]
    part = rng.choice(["train", "validation" if validates else "train", "test"], len(rows), p=[0.7, 0.2, 0.1])
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row").with_columns(part=pl.Series(part))
    split = COLUMN.model_copy(update={"validation": 0.1 if validates else share})
    return build_dataset(check(None, None, frame, schema), schema, split)


def courses(users: int, stage: str | None = "by number", **of_id: Any) -> Dataset:
    """Users take a course of each of six stages in turn; sizes tell nothing. Both columns may have one value, or
    none."""
    differs = stage == "by number"
    rng, rows = np.random.default_rng(7), list[tuple[int, int, int]]()
    stages, sizes = np.arange(ITEMS) % 6, rng.permutation(ITEMS) % 4
    for user in range(users):
        first = int(rng.integers(6))
        rows += [(user, int(rng.choice(np.flatnonzero(stages == (first + place) % 6))), place) for place in range(6)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "t"], orient="row")
    columns = {"stage": [f"s{n}" for n in stages], "size": [f"z{n}" for n in sizes]}
    items = pl.DataFrame({"item_id": range(ITEMS), **columns} if differs else {"item_id": range(ITEMS)})
    if not differs:
        items = items.with_columns(pl.lit(stage, pl.String).alias(name) for name in columns)
    schema = Schema(
        features=(
            Sequence(name="one", pooling={"kind": "decay", "rates": [0.5]}, **HISTORY),
            Sequence(name="two", pooling={"kind": "decay", "rates": [0.0, 1.0]}, **HISTORY),
            Categorical(name="item_id", side="item", **of_id),
            *(Categorical(name=name, side="item") for name in ("stage", "size")),
        ),
        time="t",
        time_unit="order",
    )
    return build_dataset(check(None, items, frame, schema), schema, SplitConfig(kind="last"))
