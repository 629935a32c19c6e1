"""Arrays of a prepared dataset, written from buckets.

A bucket is a dataset in memory of consecutive users. It is made once all buckets are split and the encoders are fitted,
its arrays are written as pieces, and the pieces of all buckets are joined, in the order of their users. Memory holds
one bucket for each thread, the tables of users and items, and a few numbers per user and item.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower import files
from twotower.arrays import npy_writer
from twotower.arrays.ragged import Column, Ragged, rows_of
from twotower.arrays.types import Bools, Ints
from twotower.data import splits
from twotower.data.bucket_columns import arrays_of, context_of
from twotower.data.buckets import Bucket
from twotower.data.dataset import BY_USER, Dataset
from twotower.data.fitted import Fitted
from twotower.data.interaction_columns import CONTEXT_PREFIX, POSITIVE, ROW, TIME, USER, WEIGHT, stored_columns
from twotower.data.memmap import MEMMAP_FORMAT
from twotower.data.pairs import Pairs
from twotower.data.parts import dropped_line, tell_of_repeats_at_most
from twotower.data.prepare.bucket_reader import BucketReader, SplitBuckets, given_facts
from twotower.data.prepare.options import SIDE_BLOCK_ROWS
from twotower.data.side import Side
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import check_side, kept_of_repeated, nothing_to_learn, side_columns
from twotower.data.versions import stored_versions
from twotower.errors import RunError
from twotower.features.encoders import Encoders
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import file_digest, read_checked, read_parquet, write_parquet
from twotower.files.resumable import make_once
from twotower.version import __version__

log = logging.getLogger(__name__)

MAX_SHORT_ROWS = 2**31
"""Number of interactions from which on their indices have 64 bits."""

Each = Callable[[str, Callable[[Bucket], bool]], None]
"""Calls a task for each bucket, several at a time; a task returns False if an earlier call has done it."""


class _BucketDataset(Dataset):
    """The interactions of consecutive users, sorted by user and time; their users are rows 0, 1, …"""

    def sort_by_time(self, among: Bools) -> Ints:
        """Return the indices of the interactions in a mask, which are in order."""
        return np.flatnonzero(among)


class PreparedArrays:
    """Writer of a prepared dataset from buckets."""

    def __init__(
        self,
        reader: BucketReader,
        split: SplitConfig,
        made: Path,
        work: Path,
        side_block_rows: int = SIDE_BLOCK_ROWS,
        max_short_rows: int = MAX_SHORT_ROWS,
    ) -> None:
        """`made` becomes the dataset, `work` holds what is known of each bucket."""
        split = splits.with_source(split, given_facts(reader)) if split.is_given else split
        self.reader, self.buckets, self.schema, self.split = reader, reader.buckets, reader.schema, split
        self.facts = reader.buckets.facts
        self.made, self.arrays = made, made / layout.ARRAYS
        self.pieces, self.written = work / "pieces of arrays", work / "written"
        self.side_block_rows = side_block_rows
        self.index = np.dtype("<i4" if self.facts.rows < max_short_rows else "<i8")
        self.stored = {"part": "|i1"} | stored_columns(reader.schema)
        self.splits = SplitBuckets(self.reader, split, work / "splits")
        for folder in (self.arrays, self.pieces, self.written, self.splits.folder):
            folder.mkdir(exist_ok=True)

    def write(self, each: Each, threads: int) -> None:
        """Write all files of the dataset. Raises DataError if it is of no use, RunError for a damaged bucket,
        OSError."""
        frames: dict[SideName, pl.DataFrame] = {
            side: read_checked(self.buckets.table(side), partial(self._read_table, side=side)) for side in SIDES
        }
        if (n := (frames["user"].height, frames["item"].height)) != (self.facts.users, self.facts.items):
            raise RunError(
                f"{self.buckets.folder}: damaged ({n[0]:,} users and {n[1]:,} items, not those of buckets.json)"
            )
        if self.splits.missing():
            rule = self.splits.rule(frames["user"][self.schema.user_id])
            each("interactions split", lambda bucket: self.splits.make(bucket, rule))
            del rule
        found = [self.splits.counts(b) for b in self.facts.buckets]
        sizes = np.stack([f["sizes"] for f in found])
        splits.check_parts(sizes.sum(0), self.split)
        if dropped := sum(int(f["dropped"]) for f in found):
            log.info(dropped_line(dropped))
        if repeated := self.facts.rows - dropped - int(sizes.sum()):
            which = f"repeated a pair of an earlier segment, {kept_of_repeated(self.schema)}"
            log.info(f"interactions: {repeated:,} rows {which}")
            tell_of_repeats_at_most(repeated, self.schema, self.split)
        if not any(f["targets"] for f in found):
            raise nothing_to_learn(self.schema)
        counts: dict[SideName, Ints] = {"user": np.concatenate([f["user"] for f in found])}
        counts["item"] = np.zeros(self.facts.items, np.int64)
        for f in found:
            counts["item"][f["rows"]] += f["item"]
        del found
        example = self.splits.example()
        fitted = Fitted.on(
            self.splits.read_all, self.schema, frames, self.reader.versions(frames), counts, self.splits.contexts(),
            example,
        )  # fmt: skip
        self._write_buckets(each, sizes, fitted)
        encoders, columns = fitted.encoders, dict[str, files.JsonData]()
        for side in SIDES:
            columns[side] = self._encode(encoders, side, fitted.frames[side], side, refuse=True)
            write_parquet(fitted.frames[side], self.made / layout.table(side))
        for side, every in fitted.versions.items():
            self._encode(encoders, side, every.frame, f"{side}.versions", refuse=False)
            write_parquet(stored_versions(every, side, self.schema), self.made / layout.versions(side))
        encoders.save(self.made)
        if self.schema.context_columns():
            write_parquet(example, self.made / layout.CONTEXT)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._join, sorted(self.pieces.iterdir())))
        self._write_sums(int(sizes[:, TRAIN].sum()))
        facts: dict[str, files.JsonData] = {
            "format": MEMMAP_FORMAT, "twotower": __version__, "rows": int(sizes.sum()), "users": self.facts.users,
            "items": self.facts.items, "ends": np.cumsum(sizes.sum(0))[:2].tolist(), "columns": columns,
            "schema": self.schema.model_dump(mode="json"), "split": self.split.model_dump(mode="json"),
        }  # fmt: skip
        files.write_json(self.made / layout.PREPARED_FACTS, facts | {"digest": self._digest(threads)})

    def _read_table(self, path: Path, side: SideName) -> pl.DataFrame:
        frame, _ = check_side(read_parquet(path), side, self.schema, [])
        frame = frame.select(side_columns(side, self.schema))
        self.reader.check_unchanged(path)
        return frame

    def _write_buckets(self, each: Each, sizes: Ints, fitted: Fitted) -> None:
        """Write the pieces of all buckets, of which each has `sizes` (buckets, 3) interactions of the parts."""
        starts = np.cumsum(sizes, 0) - sizes + np.r_[0, np.cumsum(sizes.sum(0))[:-1]]
        numbers = {b.name: n for n, b in enumerate(self.facts.buckets)}
        items = Side(fitted.frames["item"], {}, self.schema.item_id, fitted.versions.get("item"))

        def write(bucket: Bucket) -> bool:
            def into(path: Path) -> None:
                n = numbers[bucket.name]
                self._write_bucket(bucket.users[0], n, self._dataset(bucket, fitted, items), starts[n])
                path.touch()

            return make_once(self.written / bucket.name, into)

        each("interactions written", write)

    def _dataset(self, bucket: Bucket, fitted: Fitted, items: Side) -> Dataset:
        """Return the dataset of a bucket, whose sides have no encoded columns."""
        order = TIME if self.schema.time else ROW
        names = [order if name == TIME else name for name in self.stored if name != "part"]
        frame, parts = self.splits.kept(bucket, *names, *(CONTEXT_PREFIX + n for n in self.schema.context_columns()))
        found = arrays_of(frame, self.schema)
        found[USER] = found[USER] - bucket.users[0]
        users = Side(fitted.frames["user"][slice(*bucket.users)], {}, self.schema.user_id)
        raw = context_of(frame, self.schema)
        return _BucketDataset(self.schema, fitted.encoders, users, items, Pairs.of(found), parts,
            found[order], self.split, context_frame=raw)  # fmt: skip

    def _write_bucket(self, first_user: int, number: int, dataset: Dataset, starts: Ints) -> None:
        """Write the pieces of a bucket, whose interactions of each part begin at the rows `starts` (3,)."""
        plain = dataset.pairs.arrays | {USER: dataset.pairs.user + first_user, "part": dataset.parts}
        plain[TIME] = dataset.times
        columns: dict[str, Column] = {name: plain[name].astype(dtype) for name, dtype in self.stored.items()}
        columns |= {f"context.{i}": dataset.context[f.name] for i, f in enumerate(self.schema.side("context"))}
        index = np.empty(len(dataset.parts), self.index)
        for part, start in enumerate(starts.tolist()):
            own = dataset.part_indices(part)
            index[own] = np.arange(start, start + len(own))
            for name, column in columns.items():
                self._put(name, f"{part}-{number:07d}", rows_of(column, own))
        rows = {name: getattr(dataset, name) for name in BY_USER}
        for i, f in enumerate(self.schema.side("user")):
            if f.history:
                rows[f"user.{i}"] = dataset.history(f.history, dataset.parts == TRAIN)
            if f.history and dataset.time_ordered:
                rows[f"user.{i}.test"] = dataset.history(f.history, dataset.parts != TEST)
        for name, of_user in rows.items():
            of_interactions = name in ("timeline", "positives_by_user")
            values = index[of_user.values] if of_interactions else of_user.values.astype(np.int32, copy=False)
            source = None if of_user.source is None else index[of_user.source]
            self._put(name, f"{number:07d}", Ragged(values, of_user.offsets, source))

    def _put(self, name: str, piece: str, column: Column) -> None:
        """Write a piece of an array, or of all arrays of a ragged one, with lengths in place of offsets."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        if not isinstance(column, Ragged):
            arrays[name] = column
        else:
            arrays |= {f"{name}.values": column.values, f"{name}.offsets": column.lengths}
            arrays |= {} if column.source is None else {f"{name}.source": column.source}
        for array, values in arrays.items():
            (self.pieces / array).mkdir(exist_ok=True)
            npy_writer.write_blocks(self.pieces / array / f"{piece}.npy", [values])

    def _join(self, pieces: Path) -> None:
        """Write the array of the pieces in a folder, in the order of their names, and remove them."""
        found = map(npy_writer.read_piece, sorted(pieces.iterdir()))
        blocks = _ends(found) if pieces.name.endswith(".offsets") else found
        make_once(self.arrays / f"{pieces.name}.npy", lambda to: npy_writer.write_blocks(to, blocks))
        shutil.rmtree(pieces)

    def _write_sums(self, n_train: int) -> None:
        """Write the number of training positives of each item, or the sum of their weights."""
        names = [name for name in (POSITIVE, WEIGHT, "item") if name in self.stored]
        train = {name: np.load(self.arrays / f"{name}.npy", mmap_mode="r")[:n_train] for name in names}
        pairs = Pairs(train["item"], **train)
        np.save(self.arrays / "item_positive_counts.npy", pairs.sums("item", self.facts.items, pairs.positive))

    def _encode(self, encoders: Encoders, side: SideName, frame: pl.DataFrame, prefix: str, refuse: bool) -> list[str]:
        """Write pieces of the encoded columns of a side's table, as arrays of names with a prefix, and return the names
        of all its features, in order."""
        features = list(self.schema.side(side))
        for i, f in enumerate(features):
            for start in range(0, 0 if f.history else frame.height, self.side_block_rows):
                block = encoders.encode(f, frame[f.source].slice(start, self.side_block_rows), refuse)
                self._put(f"{prefix}.{i}", f"{start:012d}", block)
        return [f.name for f in features]

    def _digest(self, threads: int) -> str:
        """Return the digest of the names and contents of all files but the facts."""
        paths = sorted(p for p in self.made.rglob("*") if p.is_file() and p.name != layout.PREPARED_FACTS)

        def digest(path: Path) -> str:
            return f"{path.relative_to(self.made).as_posix()} {file_digest(path)}\n"

        with ThreadPoolExecutor(threads) as pool:
            return hashlib.sha256("".join(pool.map(digest, paths)).encode()).hexdigest()[:16]


def _ends(lengths: Iterator[Ints]) -> Iterator[Ints]:
    """Yield blocks of the offsets of rows of some lengths."""
    yield (end := np.zeros(1, np.int64))
    for block in lengths:
        ends = end[-1] + np.cumsum(block, dtype=np.int64)
        end = ends if len(ends) else end
        yield ends
