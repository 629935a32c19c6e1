"""Rows of interactions with the features of both sides, and the dataset of their distinct users and items."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.types import Bools
from twotower.data.dataset import Dataset, assemble_dataset
from twotower.data.labels import WEIGHT, weighted
from twotower.data.pairs import Pairs
from twotower.data.splits import TRAIN, VALIDATION, Parts
from twotower.errors import DataError, did_you_mean
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES


class LabelledRows(NamedTuple):
    """Rows with the features of both sides, and the label (n,) of each."""

    x: pl.DataFrame
    y: Bools


def check_labels(y: npt.ArrayLike, what: str) -> Bools:
    """Return labels of 0 and 1, in any numeric type, as booleans. Raises DataError."""
    try:
        values = np.asarray(y, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise DataError(f"{what}: labels are not numbers; give 0 and 1") from None
    bad = ~np.isin(values, (0.0, 1.0))
    if bad.any():
        raise DataError(f"{what}: found label {values[bad][0]:g}, expected 0 or 1")
    if not len(values) or values.all() or not values.any():
        raise DataError(f"{what}: labels are of one class only; AUC and training need both 0 and 1")
    return values.astype(bool)


def distinct_rows(x: pl.DataFrame, columns: list[str]) -> tuple[pl.DataFrame, npt.NDArray[np.int32]]:
    """Return the distinct rows of some columns, and for every row of `x` the index of its distinct row."""
    part = x.select(columns)
    keys = part.with_columns(pl.col(c).arr.to_list() for c, t in part.schema.items() if isinstance(t, pl.Array))
    groups = keys.with_row_index("__at").group_by(columns, maintain_order=True).agg(pl.col("__at"))
    at = groups["__at"].explode().to_numpy()
    number = np.repeat(np.arange(groups.height, dtype=np.int32), groups["__at"].list.len().to_numpy())
    rows = np.empty(x.height, np.int32)
    rows[at] = number
    return part[groups["__at"].list.first().to_list()], rows


def dataset_of(schema: Schema, rows: LabelledRows, val: LabelledRows | None) -> Dataset:
    """Return the dataset of the distinct users and items of training and validation rows, with encoders fitted on the
    training rows.

    Without validation rows, a tenth of the training rows is the validation part. Raises DataError."""
    x, y = rows
    columns = [*(f.source for f in schema.features), *filter(None, [schema.weight])]
    if val is not None:
        if missing := [c for c in columns if c not in val.x.columns]:
            raise DataError(f"val_x: no column '{missing[0]}'{did_you_mean(missing[0], val.x.columns)}")
        parts = np.repeat(np.array([TRAIN, VALIDATION], np.int8), [x.height, val.x.height])
        x = pl.concat([x.select(columns), val.x.select(columns)], how="vertical_relaxed")
        y = np.concatenate([y, val.y])
    else:
        # A tenth of each class, so that both parts hold both classes.
        parts = np.zeros(x.height, np.int8)
        order = np.random.RandomState(2022).permutation(x.height)
        for label in (False, True):
            labelled = order[y[order] == label]
            if len(labelled) < 2:
                raise DataError(
                    f"y: only {len(labelled)} rows are labelled {int(label)}; give more rows, or val_x and val_y"
                )
            parts[labelled[: max(1, len(labelled) // 10)]] = VALIDATION
    return assemble_rows(schema, LabelledRows(x, y), parts)


def assemble_rows(schema: Schema, rows: LabelledRows, parts: Parts, encoders: Encoders | None = None) -> Dataset:
    """Return the dataset of rows with labels and parts, and with weights if they have the column.

    Without `encoders`, new ones are fitted on the train part. Raises DataError."""
    frames, row_of = {}, {}
    for side in SIDES:
        frame, row_of[side] = distinct_rows(rows.x, [f.source for f in schema.side(side)])
        frames[side] = frame.with_columns(pl.Series(schema.id_column(side), np.arange(frame.height)))
    train = parts == TRAIN
    if encoders is None:
        counts = {s: np.bincount(row_of[s][train], minlength=frames[s].height) for s in SIDES}
        encoders = Encoders.fit(schema, frames, counts)
    pairs = Pairs(row_of["user"], row_of["item"], rows.y)
    if schema.weight in rows.x.columns:
        pairs = replace(pairs, weight=weighted(rows.x, schema, "x")[WEIGHT].to_numpy())
    return assemble_dataset(encoders, frames["user"], frames["item"], pairs, parts, None)
