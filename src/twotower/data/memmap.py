"""A prepared dataset: a folder of memory-mapped arrays.

prepared.json           format, counts, split, schema, digest
encoders.json  vocabularies.arrow      statistics and vocabularies of the train part
users|items.parquet     ids and raw features, the only files that are loaded whole; users in the order of data/buckets
arrays/*.npy            interactions sorted by part, user and time; interactions and items by user; encoded columns

A ragged column is two files, values and offsets, or three with the source interactions of the values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twotower import files
from twotower.arrays.ragged import Column, Ragged
from twotower.data.bucket_columns import context_of
from twotower.data.dataset import BY_USER, Dataset, assemble_dataset
from twotower.data.interaction_columns import CONTEXT_PREFIX, WEIGHT, stored_columns
from twotower.data.pairs import Pairs
from twotower.data.side import Side
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.data.splits import TEST
from twotower.data.versions import Versions, read_versions, stored_versions
from twotower.errors import ConfigError, DataError, RunError, first_line
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_array, read_checked, read_json, read_parquet
from twotower.kinds import untrusted_kind
from twotower.section import first_problem

MEMMAP_FORMAT = 7
"""Format of a prepared dataset, in prepared.json."""
MAX_WEIGHT = float(np.finfo(np.float32).max)


class PreparedFacts(BaseModel):
    """Content of prepared.json."""

    model_config = ConfigDict(frozen=True)

    rows: int
    """Number of interactions."""
    ends: tuple[int, ...]
    """End of each part but the last."""
    columns: dict[SideName, list[str]]
    """Encoded columns of each side, in the order of their arrays."""
    table_schema: Schema = Field(alias="schema")
    split: SplitConfig
    digest: str

    @model_validator(mode="after")
    def _check(self) -> PreparedFacts:
        bounds = [0, *self.ends, self.rows]
        if len(self.ends) != len(PART_NAMES) - 1 or sorted(bounds) != bounds or set(self.columns) != {*SIDES}:
            raise ValueError(f"ends: {[*self.ends]}, columns of {', '.join(self.columns)}")
        return self


def read_facts(folder: Path) -> PreparedFacts:
    """Return the facts of a prepared dataset. Raises RunError if they are damaged, or of another format."""
    path = folder / layout.PREPARED_FACTS
    facts = read_json(path)
    form = facts.get("format") if isinstance(facts, dict) else None
    if form != MEMMAP_FORMAT:
        maker = f", made by twotower {facts.get('twotower')}" if isinstance(facts, dict) else ""
        raise RunError(f"{path}: format {form!r}{maker}, this version reads {MEMMAP_FORMAT}; prepare the tables again")
    try:
        return PreparedFacts.model_validate(facts)
    except ValidationError as e:
        if foreign := untrusted_kind(e):
            raise RunError(f"{path}: {foreign.in_data}") from None
        raise RunError(
            f"{path}: damaged, or of another version ({first_problem(e)}); prepare the tables again"
        ) from None


class _Arrays:
    """The arrays of a dataset by name. All are mapped at once, because the folder may be replaced later."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, npt.NDArray[Any]] = {
            path.stem: np.asarray(read_checked(path, _load)) for path in sorted(folder.glob("*.npy"))
        }

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._checked(name, "biu", 1)

    def _checked(self, name: str, kinds: str, max_ndim: int) -> npt.NDArray[Any]:
        """Return an array of 1 to `max_ndim` dimensions whose numpy kind is in `kinds`. Raises RunError for any
        other."""
        path, found = self._folder / f"{name}.npy", self._found.get(name)
        if found is None:
            raise RunError(f"{path}: no such file; the folder is not complete")
        if not 1 <= found.ndim <= max_ndim or found.dtype.kind not in kinds:
            raise RunError(f"{path}: damaged (it holds {found.dtype} of shape {found.shape})")
        return found

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """Return an array of one dimension; that of weights holds fractions, and their sums may."""
        return self._checked(name, {WEIGHT: "f", "item_positive_counts": "iuf"}.get(name, "biu"), 1)

    def ragged(self, name: str) -> Ragged:
        values, offsets = self[f"{name}.values"], self[f"{name}.offsets"]
        if offsets.dtype.kind not in "iu" or not len(offsets) or offsets[0] or offsets[-1] != len(values):
            path = self._folder / f"{name}.offsets.npy"
            raise RunError(f"{path}: damaged (not the offsets of {len(values):,} values)")
        return Ragged(values, offsets, self[f"{name}.source"] if f"{name}.source" in self._found else None)

    def has(self, name: str) -> bool:
        """Return True if there is a column of this name."""
        return name in self._found or f"{name}.values" in self._found

    def column(self, name: str) -> Column:
        return self._checked(name, "iuf", 2) if name in self._found else self.ragged(name)


@dataclass(frozen=True, repr=False)
class MemmapDataset(Dataset):
    """A dataset of memory-mapped arrays. Its interactions are sorted by part, user and time."""

    folder: Path = Path()
    facts: PreparedFacts = field(kw_only=True)
    arrays: _Arrays = field(kw_only=True)

    @classmethod
    def open(cls, folder: Path | str, encode: tuple[SideName, ...] = SIDES) -> MemmapDataset:
        """Open the dataset in a folder; only the sides in `encode` get columns. Raises RunError if it is damaged, or of
        another format."""
        folder = Path(folder)
        facts = read_facts(folder)
        schema, columns = facts.table_schema, facts.columns
        arrays = _Arrays(folder / layout.ARRAYS)
        plain = ("part", *stored_columns(schema))
        if {len(arrays.numbers(name)) for name in plain} != {facts.rows}:
            raise RunError(f"{folder}: damaged (the interactions' arrays are not of {facts.rows:,} rows)")
        frames = {
            side: read_checked(folder / layout.table(side), partial(read_side, schema=schema, side=side))
            for side in SIDES
        }
        sides = {
            side: Side(
                frames[side],
                {name: arrays.column(f"{side}.{i}") for i, name in enumerate(columns[side])} if side in encode else {},
                schema.id_column(side),
                _versions(folder, arrays, frames[side], schema, side, side in encode) if schema.valid_from else None,
            )
            for side in SIDES
        }
        return cls(
            schema,
            Encoders.load(schema, folder),
            sides["user"],
            sides["item"],
            Pairs.of({name: arrays.numbers(name) for name in plain}),
            arrays["part"],
            arrays["time"],
            facts.split,
            folder,
            facts=facts,
            arrays=arrays,
            context_frame=(
                read_checked(folder / layout.CONTEXT, partial(_read_context, schema=schema))
                if schema.context_columns()
                else pl.DataFrame()
            ),
        )

    def _made_otherwise(self, section: str, options: str) -> ConfigError:
        return ConfigError(
            f"data.prepared: {self.folder} was prepared with another {section} ({options}); "
            "prepare the tables again, or restore these settings"
        )

    def __post_init__(self) -> None:
        """Take the arrays of the folder, where a dataset in memory would make them."""
        found = {name: self.arrays.ragged(name) for name in BY_USER}
        context = {f.name: self.arrays.column(f"context.{i}") for i, f in enumerate(self.schema.side("context"))}
        if any(len(column) != self.facts.rows for column in context.values()):
            raise RunError(f"{self.folder}: damaged (the context's arrays are not of {self.facts.rows:,} rows)")
        vars(self).update(found, context=context, item_positive_counts=self.arrays.numbers("item_positive_counts"),
            train_indices=found["timeline"].values, positive_indices=found["positives_by_user"].values)  # fmt: skip

    @property
    def digest(self) -> str:
        """Digest of the prepared files and of the schema: 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.facts.digest} {self.schema.model_dump_json()}".encode()).hexdigest()[:16]

    def link(self, folder: Path) -> None:
        """Hard-link the dataset's files into `folder`, or copy them on a file system without hard links.

        Raises RunError, also if another dataset has replaced this one."""
        if not ((folder / layout.PREPARED_FACTS).exists() and folder.resolve() == self.folder.resolve()):
            shutil.rmtree(folder, ignore_errors=True)
            to = folder
            try:
                for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                    to = folder / path.relative_to(self.folder)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    files.link(path, to)
            except OSError as e:
                raise RunError(f"{to}: cannot be written ({e.strerror or e})") from e
        if read_facts(self.folder) != self.facts:
            raise RunError(f"{self.folder}: another dataset has replaced it; open the folder again")

    def of_part(self, part: int) -> slice:
        ends = [0, *self.facts.ends, len(self.parts)]
        return slice(ends[part], ends[part + 1])

    def side_before(self, side: SideName, part: int) -> Side:
        known = self.side(side)
        if part != TEST or side == "item" or not known.columns or not self.time_ordered:
            return known
        names = [h.name for h in self.schema.histories(side)]
        later = {n: self.arrays.ragged(f"user.{list(known.columns).index(n)}.test") for n in names}
        return replace(known, columns=known.columns | later)

    @property
    def grouped_by_user(self) -> bool:
        return True


def _read_context(path: Path, schema: Schema) -> pl.DataFrame:
    """Return the interaction of the file. Raises ValueError for other columns."""
    frame = read_parquet(path)
    if frame.columns != [*schema.context_columns()] or frame.height != 1:
        raise ValueError(f"{frame.height} rows of {', '.join(frame.columns)}")
    return frame


def _versions(
    folder: Path, arrays: _Arrays, newest: pl.DataFrame, schema: Schema, side: SideName, encode: bool
) -> Versions | None:
    """Return the versions of a side, None if it has none."""
    features = [(i, f.name) for i, f in enumerate(schema.side(side)) if not f.history]
    if not any(arrays.has(f"{side}.versions.{i}") for i, _ in features):
        return None
    read = partial(read_versions, newest=newest, schema=schema, side=side)
    table = read_checked(folder / layout.versions(side), read)
    columns = {name: arrays.column(f"{side}.versions.{i}") for i, name in features} if encode else {}
    if any(len(column) != table.height for column in columns.values()):
        raise RunError(f"{folder}: damaged (the versions' arrays are not of {table.height:,} rows)")
    return Versions(table, columns)


def save(dataset: Dataset, folder: Path) -> None:
    """Write a dataset into the folder of a run or a bundle."""
    # A prepared dataset of an earlier training would be read instead.
    if not isinstance(dataset, MemmapDataset):
        shutil.rmtree(folder / layout.PREPARED, ignore_errors=True)
        save_tables(dataset, folder)
        return
    dataset.encoders.save(folder)
    dataset.link(folder / layout.PREPARED)


def load(
    folder: Path, schema: Schema, split: SplitConfig, encode: tuple[SideName, ...] = SIDES, newest: bool = False
) -> Dataset:
    """Read the files of `save`; only the sides in `encode` get columns, and with `newest` versions may be missing.
    Raises RunError as `load_tables` does."""
    if (folder / layout.PREPARED).is_dir():
        return MemmapDataset.open(folder / layout.PREPARED, encode).with_schema(schema)
    return load_tables(folder, schema, split, encode, newest)


def _load(path: Path) -> npt.NDArray[Any]:
    try:
        # Copy-on-write: no code writes to it, and torch warns of read-only arrays.
        return read_array(path, "c" if path.stat().st_size > 128 else None)
    except OSError as e:
        if e.errno != errno.ENOMEM:
            raise
        # The kernel reserves memory for a writable map, and the array is larger than the memory.
        return read_array(path, "r")


# ---- tables of a run or bundle whose data are in memory: users, items, and the interactions as rows with their part


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
