"""Tables of a run or bundle: users, items, and the interactions as rows with their part."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from twotower import files
from twotower.data.bucket_columns import context_of
from twotower.data.dataset import Dataset, assemble_dataset
from twotower.data.interaction_columns import CONTEXT_PREFIX
from twotower.data.pairs import Pairs
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.data.versions import Versions, read_versions, stored_versions
from twotower.errors import DataError, RunError, first_line
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_checked, read_parquet

MAX_WEIGHT = float(np.finfo(np.float32).max)


def save_tables(dataset: Dataset, folder: Path) -> None:
    """Write the encoders and the three tables, the interactions as rows with their part.

    encoders.json is written first: it distinguishes the tables of a run from tables of a user."""
    dataset.encoders.save(folder)
    pairs = pl.DataFrame(dataset.pairs.arrays | {"part": dataset.parts})
    if dataset.schema.time:
        pairs = pairs.with_columns(time=dataset.times)
    pairs = pairs.with_columns(dataset.context_frame.rename(lambda name: CONTEXT_PREFIX + name))
    frames = {layout.table(side): dataset.side(side).frame for side in SIDES} | {layout.INTERACTIONS: pairs}
    for side in SIDES:
        if (versions := dataset.side(side).versions) is None:
            (folder / layout.versions(side)).unlink(missing_ok=True)  # of an earlier training
        else:
            more = dataset.side(side).frame.columns
            frames[layout.versions(side)] = stored_versions(versions, side, dataset.schema, more)
    for name, frame in frames.items():
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        files.write(folder / name, buffer.getvalue())


def load_tables(
    folder: Path, schema: Schema, split: SplitConfig, encode: tuple[SideName, ...] = SIDES, newest: bool = False
) -> Dataset:
    """Read the files of `save_tables`; only the sides in `encode` get columns. With `newest` tables of versions may be
    missing, as in a bundle.

    Raises RunError if a file is missing, damaged or does not fit the schema."""
    encoders = Encoders.load(schema, folder)
    users, items = (
        read_checked(folder / layout.table(side), partial(read_side, schema=schema, side=side)) for side in SIDES
    )
    versions = dict[SideName, Versions]()
    for side, frame in zip(SIDES, (users, items), strict=True):
        path, named = folder / layout.versions(side), schema.valid_from and schema.columns(side)
        if named and schema.valid_from in frame.columns and (path.exists() or not newest):
            check = partial(read_versions, newest=frame, schema=schema, side=side)
            versions[side] = Versions(read_checked(path, check))
    actions = read_checked(
        folder / layout.INTERACTIONS,
        lambda path: _check_interactions(read_parquet(path), users, items, schema),
    )
    try:
        pairs = Pairs.of({name: actions[name].to_numpy() for name in actions.columns if name in Pairs.columns()})
        times = actions["time"].to_numpy() if "time" in actions.columns else None
        context = context_of(actions, schema)
        parts = actions["part"].to_numpy()
        dataset = assemble_dataset(encoders, users, items, pairs, parts, times, split, encode, versions, context)
        if len(encode) == len(SIDES):
            _ = dataset.context  # encoded here, so that damage is found
        return dataset
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError, IndexError, DataError) as e:
        raise RunError(f"{folder}: a table or encoders.json is damaged, or of another run ({first_line(e)})") from e


def read_side(path: Path, schema: Schema, side: SideName) -> pl.DataFrame:
    """Read the table of a side. Raises ValueError if a column that the schema names is missing, or the ids are
    incomplete. A reader for `read_checked`."""
    frame, key = read_parquet(path), schema.id_column(side)
    features = [f.source for f in schema.columns(side)]
    for column in [key, *features, *([schema.title] if schema.title and side == "item" else [])]:
        if column not in frame.columns:
            raise ValueError(f"column '{column}' is missing")
    if frame[key].null_count() or frame[key].dtype.is_nested():
        raise ValueError(f"column '{key}' does not hold one id for each row")
    return frame


def _check_interactions(
    actions: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, schema: Schema
) -> pl.DataFrame:
    """Return interactions of rows, parts, times and labels unchanged. Raises ValueError for other types or ranges."""
    below = {"user": users.height, "item": items.height, "part": len(PART_NAMES)}
    if schema.reads_types:
        below["event"] = len(schema.event_types) + 1
    for name in (*below, "positive", *({"time"} & {*actions.columns})):
        column = actions[name]
        if column.null_count() or not (column.dtype == pl.Boolean if name == "positive" else column.dtype.is_integer()):
            raise ValueError(f"column '{name}' has gaps, or is of another type ({column.dtype})")
        first, last = int(column.min() or 0), int(column.max() or 0)  # type: ignore[arg-type]
        if name in below and len(column) and not 0 <= first <= last < below[name]:
            what = f"{name}s.parquet holds" if name in SIDES else "there are"
            raise ValueError(f"column '{name}' goes from {first} to {last}, {what} {below[name]:,}")
    if schema.weighted and (
        actions["weight"].null_count()
        or actions["weight"].dtype != pl.Float32
        or not actions["weight"].is_between(0, MAX_WEIGHT).all()
    ):
        raise ValueError("column 'weight' holds other values than weights")
    return actions
