"""Preparation of sharded Parquet as a `MemmapDataset`, in memory that does not grow with the number of interactions.

The interactions are read in pieces, their ids replaced by rows, and written to buckets by ranges of users. A bucket fits in
memory, where it is deduplicated, split, sorted and written. Memory holds the tables of users and items (the columns that the
schema names), a few numbers per user and per item, one piece and one bucket.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower import files
from twotower.arrays.npy_writer import ArrayWriter
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Ints
from twotower.data import splits
from twotower.data.config import DataConfig
from twotower.data.memmap import MEMMAP_FORMAT, MemmapDataset
from twotower.data.readers import Reading, read_file, table_errors, table_files
from twotower.data.split import SplitConfig
from twotower.data.splits import PART_NAMES, TEST, TRAIN, VALIDATION
from twotower.data.tables import (
    POSITIVE,
    averaged_columns,
    check_side,
    labelled,
    need,
    side_columns,
    sums_by_row,
    with_ids,
    with_statistics,
)
from twotower.data.times import TIME, Times
from twotower.errors import ConfigError, DataError
from twotower.features.encoders import Encoders
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName
from twotower.files import layout, locks
from twotower.files.readers import file_digest
from twotower.version import __version__

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
"""Lock of the working folder, held until the dataset is complete."""
MAX_INTERACTIONS = 2**31 - 1
"""Largest number of interactions of a prepared dataset, whose rows have 32-bit indices."""


@dataclass(frozen=True)
class PrepareSizes:
    """Numbers of rows that `write_prepared` holds in memory at a time."""

    block_rows: int = 2**21
    """Interactions of a piece."""
    bucket_rows: int = 2**23
    """Approximate number of interactions of a bucket of users."""
    side_block_rows: int = 2**18
    """Users or items encoded at once."""


def write_prepared(
    data: DataConfig, schema: Schema, split: SplitConfig, out: Path, sizes: PrepareSizes | None = None
) -> MemmapDataset:
    """Prepare the tables that `data` names (files, folders of shards or patterns) in the new folder `out`.

    The dataset equals that of `dataset.build_dataset`, apart from the order of the interactions. Raises DataError or
    ConfigError for unusable tables or settings; `out` is then unchanged.
    """
    out = out.resolve()  # a symbolic link is kept
    _check(data, schema, split, out)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # of a process that was killed
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    with files.new_folder(out) as folder:
        (folder / layout.ARRAYS).mkdir()
        (folder / "work").mkdir()
        with locks.lock(folder / "work" / LOCK_FILE):
            _Preparation(data, schema, split, folder, sizes or PrepareSizes()).run()
        for path in (folder / "work").iterdir():
            path.unlink()
        (folder / "work").rmdir()
        for path in (folder / layout.ARRAYS).iterdir():
            files.sync(path)
    return MemmapDataset.open(out)


def _abandoned(folder: Path) -> bool:
    """Return True if no process, on this host or another, holds the lock of the folder."""
    try:
        return not locks.is_locked(folder / "work" / LOCK_FILE)
    except OSError:
        return True


def _check(data: DataConfig, schema: Schema, split: SplitConfig, out: Path) -> None:
    if not split.follows_time:
        raise ConfigError(f"split.kind = '{split.kind}' draws from all rows at once; to prepare, set 'last' or 'time'")
    if not schema.time:
        raise DataError(f"split.kind = '{split.kind}' needs a time; name its column in schema.time")
    if not data.interactions:
        raise ConfigError("data.interactions is missing; name Parquet files, a folder of them or a pattern")
    for history in schema.histories("item"):
        raise ConfigError(f"feature '{history.name}': sequences of items' users cannot be prepared; drop it")
    if out.exists():
        names = {p.name for p in out.iterdir()} if out.is_dir() else {out.name}
        ours = (
            {layout.PREPARED_FACTS, layout.ENCODERS, layout.VOCABULARIES, layout.ARRAYS, *map(layout.table, SIDES)}
            if layout.PREPARED_FACTS in names
            else set()
        )
        if strange := sorted(names - ours):
            raise ConfigError(
                f"{out}: not empty and not a prepared dataset alone (it holds {strange[0]}); choose another folder"
            )


class _Preparation:
    def __init__(self, data: DataConfig, schema: Schema, split: SplitConfig, folder: Path, sizes: PrepareSizes) -> None:
        self.data, self.schema, self.split, self.folder, self.sizes = data, schema, split, folder, sizes
        self.files = table_files(data.interactions, (".parquet", ".pq"))
        self.averaged = averaged_columns(schema)
        self.sums = {a: f"of.{a}" for a in self.averaged}  # field names in a record
        keys = [schema.user_id, schema.item_id, schema.time, *([schema.label] if schema.label else [])]
        self.columns = list(dict.fromkeys([*keys, *(a for a in self.averaged if a != POSITIVE)]))

    def run(self) -> None:
        frames = self._read_sides()
        n_users, n_items = frames["user"].height, frames["item"].height
        buckets, rows = self._write_buckets(frames)
        kept = sum(self._sort_bucket(b) for b in buckets)
        if rows > kept:
            log.info(f"interactions: {rows - kept:,} rows repeated a pair of user and item; the last of each was kept")
        part_starts = self._part_starts(buckets, kept) if self.split.has_boundaries else None
        sizes = np.zeros(3, np.int64)
        counts: dict[SideName, Ints] = {"user": np.zeros(n_users, np.int64), "item": np.zeros(n_items, np.int64)}
        sums = {(s, a): np.zeros((2, len(counts[s]))) for s in SIDES for a in self.averaged}
        for b in buckets:
            frame = pl.scan_ipc(b, glob=False).collect()
            parts = self._bucket_parts(frame, part_starts)
            np.save(b.with_suffix(".npy"), parts)
            sizes += np.bincount(parts, minlength=3)
            train = frame.filter(parts == TRAIN)
            for side in SIDES:
                side_rows = train[side].to_numpy()
                counts[side] += np.bincount(side_rows, minlength=len(counts[side]))
                for a in self.averaged:
                    sums[side, a] += sums_by_row(train[self.sums[a]].to_numpy(), side_rows, len(counts[side]))
        for part, name in enumerate(PART_NAMES):
            if not sizes[part]:
                raise DataError(
                    f"split.kind = '{self.split.kind}' leaves no {name} rows out of {kept} interactions; "
                    "give more data or other shares"
                )
        for side in SIDES:
            of_side = {a: sums[side, a] for a in self.averaged}
            frames[side] = with_statistics(frames[side], self.schema, side, counts[side], of_side)
        encoders = Encoders.fit(self.schema, frames, counts)
        self._write_interactions(buckets, sizes, encoders, frames)
        columns: dict[str, files.JsonData] = {side: self._encode(encoders, side, frames[side]) for side in SIDES}
        for side in SIDES:
            frames[side].write_parquet(self.folder / layout.table(side))
        encoders.save(self.folder)
        facts: dict[str, files.JsonData] = {
            "format": MEMMAP_FORMAT, "twotower": __version__, "rows": kept, "users": n_users, "items": n_items,
            "ends": [int(sizes[0]), int(sizes[0] + sizes[1])], "columns": columns,
            "schema": self.schema.model_dump(mode="json"), "split": self.split.model_dump(mode="json"),
        }  # fmt: skip
        files.write_json(self.folder / layout.PREPARED_FACTS, facts | {"digest": self._digest()})

    # ---- reading

    def _pieces(self, columns: list[str] | None = None) -> Iterator[pl.DataFrame]:
        """Yield the interactions, `sizes.block_rows` at a time: the given columns, or all that are used."""
        empty = True
        for path in self.files:
            with table_errors(path):
                table = pl.scan_parquet(path, glob=False)
                need(pl.DataFrame(schema=table.collect_schema()), self.columns, "interactions")
            for start in range(0, _row_count(path), self.sizes.block_rows):
                empty = False
                with table_errors(path):
                    piece = table.select(columns or self.columns).slice(start, self.sizes.block_rows).collect()
                yield piece
        if empty:
            raise DataError("interactions: the table has no rows, expected at least one; fill it")

    def _read_sides(self) -> dict[SideName, pl.DataFrame]:
        """Return the tables of both sides, with the columns that the schema names; for a side without a table, the ids of
        the interactions."""
        schema, notes = self.schema, list[str]()
        frames: dict[SideName, pl.DataFrame] = {}
        for side, given in zip(SIDES, (self.data.users, self.data.items), strict=True):
            key = schema.id_column(side)
            if given:
                frame = read_file(given, Reading.of(schema, side), side_columns(side, schema))
                frames[side] = check_side(frame, side, schema, notes)
            else:
                found = None
                for piece in self._pieces([key]):
                    ids = with_ids(piece, key, "interactions").unique()
                    found = ids if found is None else _union_of_ids(found, ids, key)
                assert found is not None
                frames[side] = check_side(found.sort(key), side, schema, notes)
        for note in notes:
            log.info(note)
        if schema.title:
            need(frames["item"], [schema.title], "items")
        return frames

    def _write_buckets(self, frames: dict[SideName, pl.DataFrame]) -> tuple[list[Path], int]:
        """Write the interactions, with rows for ids, to buckets of users; return the buckets' files and the number of
        interactions."""
        schema, rows = self.schema, 0
        ids = {side: _with_row_index(frames[side], schema.id_column(side)) for side in SIDES}
        total = sum(map(_row_count, self.files))
        if total > MAX_INTERACTIONS:
            raise DataError(
                f"interactions: {total:,} rows, at most {MAX_INTERACTIONS:,} can be prepared in one folder; choose a shorter time range"
            )
        count = max(1, -(-total // self.sizes.bucket_rows))
        dtype, positives = self._dtype(), 0
        last = self._last_users(frames["user"], ids["user"], total, count)
        paths = [self.folder / "work" / f"{b:05d}.bin" for b in range(count)]
        times = self._times()
        with ExitStack() as opened:
            buckets: list[BinaryIO] = [opened.enter_context(p.open("wb")) for p in paths]
            for piece in self._pieces():
                piece = times.add(labelled(piece, schema, some=False))
                _check_order(piece, schema)
                record = np.empty(piece.height, dtype)
                for side in SIDES:
                    record[side] = _rows_of_ids(piece, frames[side], ids[side], schema.id_column(side), side)
                record["positive"], record["time"] = piece[POSITIVE].to_numpy(), piece[TIME].to_numpy()
                record["row"] = np.arange(rows, rows + piece.height)
                for a in self.averaged:
                    record[self.sums[a]] = _as_floats(piece[a])
                positives += int(record["positive"].sum())
                rows += piece.height
                bucket = np.searchsorted(last, record["user"])
                order = np.argsort(bucket, kind="stable")
                ends = np.cumsum(np.bincount(bucket, minlength=count))
                record = record[order]
                for file, start, end in zip(buckets, [0, *ends[:-1]], ends, strict=True):
                    file.write(record[start:end].data)
                log.info(f"{rows:,} of {total:,} interactions read") if rows < total else None
        if not positives:
            raise DataError(f"interactions: no row has '{schema.label}' above {schema.positive_above:g}; "
                            "set schema.positive_above")  # fmt: skip
        return [p for p in paths if p.stat().st_size], rows

    def _times(self) -> Times:
        """Return a reader of the times that has checked the whole column."""
        times = Times(self.schema)
        for piece in self._pieces([self.schema.time]):
            times.look(piece[self.schema.time])
        times.settle()
        return times

    def _last_users(self, frame: pl.DataFrame, ids: pl.DataFrame, total: int, count: int) -> npt.NDArray[np.int32]:
        """Return the last user row of each bucket but the last, so that buckets have about equal numbers of interactions."""
        if count == 1:
            return np.zeros(0, np.int32)
        key, per_user = self.schema.user_id, np.zeros(frame.height, np.int64)
        for piece in self._pieces([key]):
            per_user += np.bincount(_rows_of_ids(piece, frame, ids, key, "user"), minlength=frame.height)
        return np.searchsorted(np.cumsum(per_user), np.arange(1, count) * total // count).astype(np.int32)

    def _dtype(self) -> Any:
        plain = [("user", "<i4"), ("item", "<i4"), ("positive", "?"), ("time", "<i8"), ("row", "<i8")]
        return np.dtype([*plain, *((name, "<f8") for name in self.sums.values())])

    # ---- a bucket at a time

    def _sort_bucket(self, path: Path) -> int:
        """Sort a bucket by user, time and place in the table, keep each pair once, and return the number of rows kept."""
        record = np.fromfile(path, self._dtype())
        frame = pl.DataFrame({name: record[name] for name in record.dtype.names or ()})
        del record
        frame = frame.sort("user", "time", "row")
        once = frame.unique(["user", "item"], keep="last", maintain_order=True)
        if self.schema.duplicates == "error" and once.height < frame.height:
            raise DataError(
                f"interactions: {frame.height - once.height} rows repeat a pair of user and item; "
                "drop them or set schema.duplicates = 'last'"
            )
        once.drop("row").write_ipc(path, compression="uncompressed")
        return once.height

    def _bucket_parts(self, frame: pl.DataFrame, part_starts: tuple[int, int] | None) -> npt.NDArray[np.int8]:
        """Return the part (n,) of every row of a sorted bucket."""
        times = frame["time"].to_numpy()
        if part_starts is None:
            user = frame["user"].to_numpy()
            return splits.split_last(user - user[0], times)
        parts = np.zeros(len(times), np.int8)
        parts[times >= part_starts[0]] = VALIDATION
        parts[times >= part_starts[1]] = TEST
        return parts

    def _part_starts(self, buckets: list[Path], n: int) -> tuple[int, int]:
        """Return the times at which validation and test begin, equal to those of `splits.split_interactions`."""

        def times() -> Iterator[Ints]:
            for b in buckets:
                yield pl.scan_ipc(b, glob=False).select("time").collect()["time"].to_numpy()

        test = _kth_smallest(times, int(np.ceil((n - 1) * (1 - self.split.test))))
        rest = sum(int((t < test).sum()) for t in times())
        if not rest:
            return test, test
        below = _kth_smallest(
            lambda: (t[t < test] for t in times()), int(np.ceil((rest - 1) * (1 - self.split.validation)))
        )
        return below, test

    def _write_interactions(
        self, buckets: list[Path], sizes: Ints, encoders: Encoders, frames: dict[SideName, pl.DataFrame]
    ) -> None:
        """Write the arrays of the interactions and of each user, in the order of users."""
        arrays, n, n_users = self.folder / layout.ARRAYS, int(sizes.sum()), frames["user"].height
        whole = {
            name: np.lib.format.open_memmap(arrays / f"{name}.npy", "w+", kind, (n,))
            for name, kind in (("user", "<i4"), ("item", "<i4"), ("positive", "?"), ("part", "|i1"), ("time", "<i8"))
        }
        for name in whole:  # reserved now: on a full disk a write to a mapped page would kill the process
            with (arrays / f"{name}.npy").open("r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, file.seek(0, 2))
        cursor = np.r_[0, np.cumsum(sizes)[:2]]
        histories = [(i, f.history) for i, f in enumerate(self.schema.side("user")) if f.history]
        codes = {i: encoders.history_codes(h, frames["item"][self.schema.item_id]) for i, h in histories}
        positives_per_item = np.zeros(frames["item"].height, np.int64)
        with ArrayWriter(arrays, n_users) as arrays_out:
            for b in buckets:
                frame, parts = pl.scan_ipc(b, glob=False).collect(), np.load(b.with_suffix(".npy"))
                user, item = frame["user"].to_numpy(), frame["item"].to_numpy()
                positive = frame["positive"].to_numpy()
                indices = np.empty(len(user), np.int32)
                for part in (TRAIN, VALIDATION, TEST):
                    keep = parts == part
                    place = slice(cursor[part], cursor[part] + int(keep.sum()))
                    indices[keep] = np.arange(place.start, place.stop)
                    for name in ("user", "item", "positive", "time"):
                        whole[name][place] = frame[name].to_numpy()[keep]
                    whole["part"][place] = part
                    cursor[part] = place.stop
                train = parts == TRAIN
                liked = train & positive
                positives_per_item += np.bincount(item[liked], minlength=len(positives_per_item))
                arrays_out.append("train", indices[train])
                arrays_out.append("positives", indices[liked])
                arrays_out.count("train", user[train])
                arrays_out.count("positives", user[liked])
                for name, keep in (("seen_items", train), ("positive_items", liked)):
                    arrays_out.append(name, item[keep][np.lexsort((item[keep], user[keep]))])
                arrays_out.ragged("interacted_items", user, item, indices)
                for i, h in histories:
                    among = h.holds(positive)
                    for name, keep in ((f"user.{i}", among & train), (f"user.{i}.test", among & (parts != TEST))):
                        arrays_out.ragged(name, user[keep], codes[i][item[keep]], indices[keep], h.max_length)
                b.unlink()
        if not positives_per_item.any():
            raise DataError("no positive interaction in the train part; there is nothing to learn from")
        np.save(arrays / "item_positive_counts.npy", positives_per_item)
        for array in whole.values():
            array.flush()

    # ---- a side

    def _encode(self, encoders: Encoders, side: SideName, frame: pl.DataFrame) -> list[str]:
        """Write the encoded columns of a side, and return the names of all its features, in order."""
        features = list(self.schema.side(side))
        with ArrayWriter(self.folder / layout.ARRAYS, frame.height) as arrays_out:
            for start in range(0, frame.height, self.sizes.side_block_rows):
                some = frame.slice(start, self.sizes.side_block_rows)
                rows = np.arange(start, start + some.height)
                for i, f in enumerate(features):
                    if f.history:
                        continue
                    column: Column = encoders.encode(f, some[f.source])
                    if isinstance(column, Ragged):
                        arrays_out.ragged(f"{side}.{i}", np.repeat(rows, column.lengths), column.values)
                    else:
                        arrays_out.append(f"{side}.{i}", column)
        return [f.name for f in features]

    def _digest(self) -> str:
        found = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.parent.name != "work":
                found.update(f"{path.relative_to(self.folder)} {file_digest(path)}\n".encode())
        return found.hexdigest()[:16]


def _kth_smallest(times: Callable[[], Iterator[Ints]], k: int) -> int:
    """Return the k-th smallest (from 0) of a stream of whole numbers, by repeated counts in ever narrower bins."""
    low = min(int(t.min()) for t in times() if len(t))
    high = max(int(t.max()) for t in times() if len(t)) + 1
    while high - low > 1:
        width = -(-(high - low) // 65_536)
        counts = np.zeros(65_536, np.int64)
        for t in times():
            inside = t[(t >= low) & (t < high)]
            counts += np.bincount((inside - low) // width, minlength=65_536)
        ends = np.cumsum(counts)
        bin_ = int(np.searchsorted(ends, k, side="right"))
        k -= int(ends[bin_ - 1]) if bin_ else 0
        low, high = low + bin_ * width, min(high, low + (bin_ + 1) * width)
    return low


def _row_count(path: Path) -> int:
    """Return the number of rows in the metadata of a Parquet file."""
    with table_errors(path):
        return int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())


def _as_floats(column: pl.Series) -> npt.NDArray[np.float64]:
    """Return a column as float64. Raises DataError if it is not numeric."""
    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        raise DataError(
            f"interactions: column '{column.name}' holds {column.dtype}, expected numbers to average; cast it"
        )
    return column.cast(pl.Float64).to_numpy()


def _union_of_ids(found: pl.DataFrame, ids: pl.DataFrame, key: str) -> pl.DataFrame:
    """Return the distinct ids of both tables. Raises DataError if they are of two types."""
    if {found[key].dtype, ids[key].dtype} == {pl.Int64, pl.UInt64} and not (
        (found[key] < 0).any() or (ids[key] < 0).any()
    ):
        found, ids = (t.with_columns(pl.col(key).cast(pl.UInt64)) for t in (found, ids))
    if found[key].dtype != ids[key].dtype:
        raise DataError(
            f"interactions: column '{key}' is {found[key].dtype} in some files and {ids[key].dtype} in others; "
            "give all files the same type"
        )
    return pl.concat([found, ids]).unique()


def _check_order(piece: pl.DataFrame, schema: Schema) -> None:
    """Raise DataError for time_unit "order" with fractions, whose ranks would differ between pieces."""
    given = piece[schema.time]
    if schema.time_unit == "order" and given.dtype.is_numeric() and not (piece[TIME] == given).all():
        raise DataError(
            f"interactions: time '{schema.time}' holds fractions or numbers beyond 64 bits; to prepare, give whole numbers"
        )


def _with_row_index(frame: pl.DataFrame, key: str) -> pl.DataFrame:
    return frame.select(key).with_row_index("__row")


def _rows_of_ids(piece: pl.DataFrame, frame: pl.DataFrame, rows: pl.DataFrame, key: str, side: SideName) -> Ints:
    """Return the row (n,) of every id of a piece. Raises DataError if the side lacks one."""
    ids = with_ids(piece.select(key), key, "interactions")
    if {ids[key].dtype, frame[key].dtype} == {pl.Int64, pl.UInt64}:  # only one of them has ids from 2**63 on
        ids = ids.with_columns(pl.col(key).cast(frame[key].dtype, strict=False))
    if ids[key].dtype != frame[key].dtype:
        raise DataError(
            f"column '{key}': {side}s has {frame[key].dtype} and interactions {ids[key].dtype}; give both the same type"
        )
    found = ids.join(rows, on=key, how="left", maintain_order="left")["__row"]
    if n := found.null_count():
        first = ids[key].filter(found.is_null())[0]
        raise DataError(
            f"interactions: {n} rows have ids of '{key}' that are not in {side}s (the first: {first}); "
            f"add them to {side}s or drop their rows"
        )
    return found.to_numpy().astype(np.int64)
