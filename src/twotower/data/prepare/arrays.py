"""Arrays of a prepared dataset, written from buckets.

Each bucket has its own range in every array, so buckets are written side by side, and a later call writes those that
are missing. Memory holds one bucket for each thread, the tables of users and items, and a few numbers per user and
item.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower import files
from twotower.arrays import npy_writer
from twotower.arrays.ragged import Ragged, offsets_of
from twotower.arrays.sets import distinct_keys
from twotower.arrays.types import Codes, Ints, Numbers, Shaped
from twotower.data import splits
from twotower.data.buckets import Bucket
from twotower.data.dataset import history_of
from twotower.data.fitted import Fitted
from twotower.data.interaction_columns import ITEM, POSITIVE, USER, WEIGHT, Columns, stored_columns
from twotower.data.memmap import MEMMAP_FORMAT
from twotower.data.pairs import target_mask
from twotower.data.parts import dropped_line
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.prepare.bucket_splits import BucketSplits, given_facts
from twotower.data.prepare.context import PreparedContext
from twotower.data.prepare.options import SIDE_BLOCK_ROWS
from twotower.data.split import SplitConfig
from twotower.data.splits import DROPPED, TRAIN
from twotower.data.tables import check_side, nothing_to_learn, side_columns
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

ITEMS_OF = {"train": "seen_items", "positives": "positive_items"}
"""Array of the distinct items of each user, by the array of the interactions that they are of."""

Each = Callable[[str, Callable[[Bucket], bool]], None]
"""Calls a task for each bucket, several at a time; a task returns False if an earlier call has done it."""


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
        self.made, self.arrays, self.written = made, made / layout.ARRAYS, work / "written"
        self.side_block_rows = side_block_rows
        self.index = np.dtype("<i4" if self.facts.rows < max_short_rows else "<i8")
        self.stored = stored_columns(reader.schema)
        self.splits = BucketSplits(self.reader, split, work / "splits")
        for folder in (self.arrays, self.written, self.splits.folder):
            folder.mkdir(exist_ok=True)
        self.context = PreparedContext(reader, self.splits, self.arrays, work / "context")

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
        self.rows = int(sizes.sum())
        if dropped := self.facts.rows - self.rows:
            log.info(dropped_line(dropped))
        positives: Shaped[Numbers, "items"] = _by_item(found, "positive_item", self.facts.items)
        if not positives.any():
            raise nothing_to_learn(self.schema)
        counts: dict[SideName, Ints] = {
            "user": np.concatenate([f["train"] for f in found]), "item": _by_item(found, "item", self.facts.items)
        }  # fmt: skip
        fitted = Fitted.on(
            self.splits.read_all, self.schema, frames, self.reader.versions(frames), counts, self.context.fit_columns(),
            self.context.example(),
        )  # fmt: skip
        encoders = fitted.encoders
        if self.schema.weighted:
            positives = self.splits.positive_weights()
        np.save(self.arrays / "item_positive_counts.npy", positives)
        read = {n: h for n, h in self.splits.histories.items() if h.codes is None}
        codes = {n: encoders.history_codes(h, fitted.item_table) for n, h in read.items()}
        self.context.create(encoders, self.rows)
        self._write_buckets(each, found, sizes, codes, fitted)
        self.context.finish(self.made)
        columns: dict[str, files.JsonData] = {
            side: self._encode(encoders, side, fitted.frames[side], side) for side in SIDES
        }
        for side in SIDES:
            write_parquet(fitted.frames[side], self.made / layout.table(side))
        for side, every in fitted.versions.items():
            self._encode(encoders, side, every.frame, f"{side}.versions", refuse=False)
            write_parquet(stored_versions(every, side, self.schema), self.made / layout.versions(side))
        encoders.save(self.made)
        facts: dict[str, files.JsonData] = {
            "format": MEMMAP_FORMAT, "twotower": __version__, "rows": self.rows, "users": self.facts.users,
            "items": self.facts.items, "ends": np.cumsum(sizes.sum(0))[:2].tolist(), "columns": columns,
            "schema": self.schema.model_dump(mode="json"), "split": self.split.model_dump(mode="json"),
        }  # fmt: skip
        files.write_json(self.made / layout.PREPARED_FACTS, facts | {"digest": self._digest(threads)})

    def _read_table(self, path: Path, side: SideName) -> pl.DataFrame:
        frame, _ = check_side(read_parquet(path), side, self.schema, [])
        frame = frame.select(side_columns(side, self.schema))
        self.reader.check_unchanged(path)
        return frame

    def _write_buckets(
        self, each: Each, found: list[Columns], sizes: Ints, codes: dict[str, Codes], fitted: Fitted
    ) -> None:
        """Write the interactions, and the arrays by user."""
        for name, dtype in ({"part": "|i1"} | self.stored).items():
            npy_writer.create(self.arrays / f"{name}.npy", dtype, self.rows)
        firsts, starts = [b.users[0] for b in self.facts.buckets], dict[str, Ints]()

        def create(name: str, lengths: str, **arrays: str) -> None:
            """Create arrays of rows of the `lengths` by user, and their offsets."""
            offsets = offsets_of(np.concatenate([f[lengths] for f in found]))
            starts[name] = offsets[firsts]
            if name == lengths:
                np.save(self.arrays / f"{name}.offsets.npy", offsets)
            for array, dtype in arrays.items():
                npy_writer.create(self.arrays / f"{array}.npy", dtype, int(offsets[-1]))

        for name, of_items in ITEMS_OF.items():
            create(name, name, **{name: self.index.str})
            create(of_items, of_items if self.splits.repeats else name, **{of_items: "<i4"})
        for name in ("interacted_items", *(n for n in found[0] if n.startswith("user."))):
            create(name, name, **{f"{name}.source": self.index.str, f"{name}.values": "<i4"})
        cursors = np.cumsum(sizes, 0) - sizes + np.r_[0, np.cumsum(sizes.sum(0))[:-1]]
        numbers = {b.file: n for n, b in enumerate(self.facts.buckets)}

        def write(bucket: Bucket) -> bool:
            def into(path: Path) -> None:
                n = numbers[bucket.file]
                places = {name: int(s[n]) for name, s in starts.items()}
                self._write_bucket(bucket, cursors[n], places, codes, fitted)
                path.touch()

            return make_once(self.written / bucket.file, into)

        each("interactions written", write)

    def _write_bucket(
        self, bucket: Bucket, cursor: Ints, starts: dict[str, int], codes: dict[str, Codes], fitted: Fitted
    ) -> None:
        """Write the interactions of a bucket: those of each part from the row `cursor` (3,) on, its ragged arrays from
        `starts` on. Histories hold the `codes` of the rows of items that the interactions see."""
        given = self.reader.read(bucket, *self.stored)
        found = {name: given[name].astype(dtype, copy=False) for name, dtype in self.stored.items()}
        parts, item, positive = self.splits.parts(bucket), found[ITEM], found[POSITIVE]
        targets = target_mask(positive, found.get(WEIGHT))
        indices = np.empty(len(parts), self.index)
        for part, start in enumerate(cursor.tolist()):
            keep = np.flatnonzero(parts == part)
            indices[keep] = np.arange(start, start + len(keep))
            for name, values in found.items():
                self._put(name, start, values[keep])
            self._put("part", start, np.full(len(keep), part, np.int8))
        self.context.write(bucket, parts, cursor)
        user = found[USER] - bucket.users[0]
        keys = user.astype(np.int64) * self.facts.items + item
        train = parts == TRAIN
        for (name, of_items), keep in zip(ITEMS_OF.items(), (train, train & targets), strict=True):
            self._put(name, starts[name], indices[keep])
            self._put(of_items, starts[of_items], (distinct_keys(keys[keep]) % self.facts.items).astype(np.int32))
        seen = fitted.item_rows(found)
        kept = parts != DROPPED
        self._put("interacted_items.values", starts["interacted_items"], item[kept])
        self._put("interacted_items.source", starts["interacted_items"], indices[kept])
        for name, among, history in self.splits.history_masks(parts, positive):
            codes_of = lambda at, name=name.removesuffix(".test"): codes[name][seen[at]]  # noqa: E731
            n_users = bucket.users[1] - bucket.users[0]
            rows = history_of(history, user[among], np.flatnonzero(among), n_users, codes_of, found)
            assert rows.source is not None
            self._put(f"{name}.values", starts[name], rows.values)
            self._put(f"{name}.source", starts[name], indices[rows.source])

    def _put(self, name: str, start: int, values: npt.NDArray[Any]) -> None:
        npy_writer.write_rows(self.arrays / f"{name}.npy", start, values)

    def _encode(
        self, encoders: Encoders, side: SideName, frame: pl.DataFrame, prefix: str, refuse: bool = True
    ) -> list[str]:
        """Write the encoded columns of a side's table as arrays of names with a prefix, and return the names of all its
        features, in order."""
        features = list(self.schema.side(side))
        for i, f in enumerate(features):
            if f.history:
                continue
            lengths = list[Ints]()

            def values(
                start: int, source: pl.Series = frame[f.source], lengths: list[Ints] = lengths
            ) -> npt.NDArray[Any]:
                block = encoders.encode(f, source.slice(start, self.side_block_rows), refuse)  # noqa: B023 - called before the next f
                if not isinstance(block, Ragged):
                    return block
                lengths.append(block.lengths)
                return block.values

            path = self.arrays / f"{prefix}.{i}.npy"
            npy_writer.write_blocks(path, map(values, range(0, frame.height, self.side_block_rows)))
            if lengths:
                path.replace(self.arrays / f"{prefix}.{i}.values.npy")
                np.save(self.arrays / f"{prefix}.{i}.offsets.npy", offsets_of(np.concatenate(lengths)))
        return [f.name for f in features]

    def _digest(self, threads: int) -> str:
        """Return the digest of the names and contents of all files but the facts."""
        paths = sorted(p for p in self.made.rglob("*") if p.is_file() and p.name != layout.PREPARED_FACTS)

        def digest(path: Path) -> str:
            return f"{path.relative_to(self.made).as_posix()} {file_digest(path)}\n"

        with ThreadPoolExecutor(threads) as pool:
            return hashlib.sha256("".join(pool.map(digest, paths)).encode()).hexdigest()[:16]


def _by_item(found: list[Columns], name: str, n: int) -> Ints:
    """Return (n,) the counts of all buckets by item."""
    total = np.zeros(n, np.int64)
    for f in found:
        total[f[name]] += f[f"{name}.counts"]
    return total
