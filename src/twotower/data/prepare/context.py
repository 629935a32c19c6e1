"""Context of prepared interactions: encoders fitted on buckets, and an array of each encoded feature, a row for each
interaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from twotower.arrays import npy_writer
from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Bools, Ints
from twotower.data.buckets import Bucket
from twotower.data.context import context_frame
from twotower.data.interaction_columns import TIME, USER
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.prepare.bucket_splits import BucketSplits
from twotower.data.split import PART_NAMES
from twotower.data.splits import DROPPED, TRAIN, Parts
from twotower.features.encoders import Encoders
from twotower.files import layout
from twotower.files.readers import write_parquet

FIT_ROWS = 2**20
"""Greatest number of training interactions, evenly spaced, from which an encoder of numbers or vectors learns."""


class PreparedContext:
    """Writer of the arrays `context.N`, N the number of a feature of the context; without such features it does
    nothing.

    An array of many codes a row is written when the lengths of all rows are known: the codes of a bucket's part lie in
    a file until then."""

    def __init__(
        self, reader: BucketReader, splits: BucketSplits, arrays: Path, work: Path, fit_rows: int = FIT_ROWS
    ) -> None:
        """`arrays` is the folder of the arrays, `work` one for temporary files."""
        self.reader, self.splits, self.arrays, self.work, self.fit_rows = reader, splits, arrays, work, fit_rows
        self.schema, self.features = reader.schema, reader.schema.side("context")
        self._encoders: Encoders | None = None
        if self.features:
            work.mkdir(exist_ok=True)

    def fit_columns(self) -> dict[str, tuple[pl.Series, Ints]]:
        """Return values of each feature by name, with the numbers of training interactions that have each: all distinct
        ones where values are counted, else those of up to `fit_rows` interactions."""
        found: dict[str, list[pl.DataFrame]] = {f.name: [] for f in self.features}
        n_train, seen = sum(int(np.count_nonzero(self.splits.parts(b) == TRAIN)) for b in self._buckets), 0
        step = max(1, -(-n_train // self.fit_rows))
        for bucket in self._buckets:
            frame = self._frame(bucket, self.splits.parts(bucket) == TRAIN)
            first, seen = -seen % step, seen + frame.height
            for f in self.features:
                one = pl.DataFrame({"value": frame[f.source]}).with_columns(n=pl.lit(1, pl.Int64))
                found[f.name] = (
                    _merged([*found[f.name], one]) if f.counts_values else [*found[f.name], one[first::step]]
                )
        columns = dict[str, tuple[pl.Series, Ints]]()
        for f in self.features:
            frame = pl.concat(found[f.name])
            columns[f.name] = (frame["value"].alias(f.source), frame["n"].to_numpy().astype(np.int64))
        return columns

    def example(self) -> pl.DataFrame:
        """Return the columns of the log that the features read, of one interaction."""
        bucket = next((b for b in self._buckets if b.rows), None)
        return pl.DataFrame() if bucket is None else self.reader.context(bucket)[:1]

    def create(self, encoders: Encoders, rows: int) -> None:
        """Create the arrays of `rows` interactions, unless they are there."""
        self._encoders = encoders
        frame = context_frame(self.example(), self.schema, np.zeros(1, np.int32), np.zeros(1, np.int64))
        for i, feature in enumerate(self.features):
            column = encoders.by_side["context"][feature.name].transform(frame[feature.source])
            if not isinstance(column, Ragged):
                npy_writer.create(self.arrays / f"context.{i}.npy", np.dtype((column.dtype, column.shape[1:])), rows)

    def write(self, bucket: Bucket, parts: Parts, cursor: Ints) -> None:
        """Write the rows of a bucket: those of each part from the row `cursor` (3,) on."""
        if not self.features:
            return
        assert self._encoders is not None
        kept = parts != DROPPED
        columns, parts = self._encoders.transform("context", self._frame(bucket, kept)), parts[kept]
        for part, start in enumerate(cursor.tolist()):
            rows = np.flatnonzero(parts == part)
            for i, feature in enumerate(self.features):
                self._put(i, f"{bucket.file}.{part}.{i}", start, columns[feature.name], rows)

    def finish(self, made: Path) -> None:
        """Write the arrays of many codes a row, and an interaction with the types of the columns of the log."""
        if not self.features:
            return
        if self.schema.context_columns():
            write_parquet(self.example(), made / layout.CONTEXT)
        for i in range(len(self.features)):
            if not (self.arrays / f"context.{i}.npy").exists():
                names = [f"{bucket.file}.{part}.{i}" for part in range(len(PART_NAMES)) for bucket in self._buckets]
                npy_writer.write_blocks(self.arrays / f"context.{i}.offsets.npy", self._ends(names))
                values = (np.load(self.work / f"{name}.values.npy") for name in names)
                npy_writer.write_blocks(self.arrays / f"context.{i}.values.npy", values)

    def _ends(self, names: Sequence[str]) -> Iterator[Ints]:
        """Yield blocks of the offsets of an array of many codes a row."""
        yield (total := np.zeros(1, np.int64))
        for name in names:
            ends = total[-1] + np.cumsum(np.load(self.work / f"{name}.lengths.npy"), dtype=np.int64)
            total = ends if len(ends) else total
            yield ends

    @property
    def _buckets(self) -> tuple[Bucket, ...]:
        return self.reader.buckets.facts.buckets if self.features else ()

    def _frame(self, bucket: Bucket, keep: Bools) -> pl.DataFrame:
        """Return the values of all features of some interactions of a bucket, none of them dropped, by source."""
        kept = self.splits.parts(bucket) != DROPPED
        found = self.reader.read(bucket, *([TIME] if self.schema.time else []))
        times = found[TIME].astype(np.int64)[kept] if TIME in found else None
        frame = self.reader.context(bucket).filter(kept)
        return context_frame(frame, self.schema, found[USER][kept], times).filter(keep[kept])

    def _put(self, i: int, name: str, start: int, column: Column, rows: Ints) -> None:
        if not isinstance(column, Ragged):
            npy_writer.write_rows(self.arrays / f"context.{i}.npy", start, column[rows])
            return
        taken = column.take(rows)
        np.save(self.work / f"{name}.lengths.npy", taken.lengths)
        np.save(self.work / f"{name}.values.npy", taken.values.astype(np.int32))


def _merged(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Return columns of values and counts as fewer rows, in which equal values are one, when there are many new
    ones."""
    if len(frames) > 1 and sum(f.height for f in frames[1:]) < frames[0].height:
        return frames
    return [pl.concat(frames).group_by("value", maintain_order=True).agg(pl.col("n").sum())]
