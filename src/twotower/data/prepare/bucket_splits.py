"""Split of bucketed interactions: the part of every row, and counts of the train part, by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.pieces import Scalar, temporary_array
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import Bools, Doubles, Ints
from twotower.data import splits
from twotower.data.buckets import Bucket
from twotower.data.interaction_columns import (
    ITEM,
    PART,
    POSITIVE,
    ROW,
    TIME,
    USER,
    WEIGHT,
    Columns,
    stored_columns,
)
from twotower.data.pairs import target_mask
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.split import SplitConfig
from twotower.data.splits import DROPPED, TEST, TRAIN, Parts, PartsOf
from twotower.errors import RunError
from twotower.features.feature import HistorySpec
from twotower.files.readers import read_checked
from twotower.files.resumable import make_once


@dataclass(frozen=True)
class BucketSplits:
    """Splits the interactions of buckets, and keeps the result of each bucket in two files."""

    reader: BucketReader
    split: SplitConfig
    folder: Path

    @property
    def histories(self) -> dict[str, HistorySpec]:
        """Sequences of the users, by the name of their array."""
        return {f"user.{i}": f.history for i, f in enumerate(self.reader.schema.side("user")) if f.history}

    @property
    def repeats(self) -> bool:
        """True if a user may have several interactions with an item."""
        return self.reader.schema.duplicates == "keep"

    def history_masks(self, parts: Parts, positive: Bools) -> Iterable[tuple[str, Bools, HistorySpec]]:
        """Yield the name of each array of histories, the mask (n,) of its interactions, and the history."""
        for name, history in self.histories.items():
            among = history.holds(positive)
            yield name, among & (parts == TRAIN), history
            if self.split.histories_grow:
                yield f"{name}.test", among & (parts != TEST) & (parts != DROPPED), history

    def missing(self) -> bool:
        """Return True if a bucket is not split."""
        return not all(self._counts_file(b).exists() for b in self.reader.buckets.facts.buckets)

    def make(self, bucket: Bucket, parts_of: PartsOf) -> bool:
        """Split a bucket; return False if it is split already."""

        def into(path: Path) -> None:
            parts, counts = self._counted(bucket, parts_of)
            parts.tofile(self._parts_file(bucket))
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **counts)

        return make_once(self._counts_file(bucket), into)

    def parts(self, bucket: Bucket) -> Parts:
        """Return the parts (n,) of a bucket."""
        return np.fromfile(self._parts_file(bucket), np.int8)

    def counts(self, bucket: Bucket) -> Columns:
        """Return the counts of a bucket: the `sizes` (3,) of the parts; the length of each ragged array by user
        (`seen_items` and `positive_items` only if pairs may repeat); and the items
        of the train part, all and positive ones, with their counts. Not for several threads at once."""

        def read(path: Path) -> Columns:
            with np.load(path) as found:
                return dict(found)

        return read_checked(self._counts_file(bucket), read)

    def rule(self, ids: pl.Series) -> PartsOf:
        """Return the rule of the split, of users with these ids."""
        return splits.rule_of(self.split, splits.measured_users(ids, self.split), self)

    def read_all(self, *names: str) -> Iterator[tuple[Columns, Parts]]:
        """Yield users, items and named columns of each bucket, with its parts."""
        for bucket in self.reader.buckets.facts.buckets:
            yield self.reader.read(bucket, ITEM, *names), self.parts(bucket)

    def positive_weights(self) -> Doubles:
        """Return (items,) the sums of the weights of the training positives, added in the order of the users."""
        sums = np.zeros(self.reader.buckets.facts.items)
        for found, parts in self.read_all(POSITIVE, WEIGHT):
            keep = (parts == TRAIN) & found[POSITIVE]
            np.add.at(sums, found[ITEM][keep], found[WEIGHT][keep])
        return sums

    def _counts_file(self, bucket: Bucket) -> Path:
        return self.folder / f"{bucket.file}.npz"

    def _parts_file(self, bucket: Bucket) -> Path:
        return self.folder / f"{bucket.file}.parts"

    def _counted(self, bucket: Bucket, parts_of: PartsOf) -> tuple[Parts, Columns]:
        stored = stored_columns(self.reader.schema)
        found = self.reader.read(bucket, ROW, *stored, *([PART] if self.split.is_given else []))
        user, item, positive = found[USER] - bucket.users[0], found[ITEM], found[POSITIVE]
        lengths = partial(np.bincount, minlength=bucket.users[1] - bucket.users[0])
        parts = parts_of(found, slice(*bucket.users))
        train, kept = parts == TRAIN, parts != DROPPED
        liked = train & target_mask(positive, found.get(WEIGHT))
        counts: Columns = {
            "sizes": splits.part_sizes(parts), "interacted_items": lengths(user[kept]), "train": lengths(user[train]),
            "positives": lengths(user[liked]),
        }  # fmt: skip
        if self.repeats:
            for name, keep in (("seen_items", train), ("positive_items", liked)):
                keys = pair_keys(user[keep], item[keep], self.reader.buckets.facts.items)
                counts[name] = lengths(distinct_keys(keys) // self.reader.buckets.facts.items)
        for name, keep, history in self.history_masks(parts, positive):
            n = lengths(user[keep])
            counts[name] = np.minimum(n, history.max_length) if history.max_length else n
        for name, keep in (("item", train), ("positive_item", liked)):
            n = np.bincount(item[keep])
            counts[name] = np.flatnonzero(n)
            counts[f"{name}.counts"] = n[counts[name]]
        return parts, counts

    def times(self, of_train: bool = False) -> Ints:
        """Return the times of all interactions, or of those that are given as train, in any order."""
        facts, start = self.reader.buckets.facts, 0
        times = self._scratch(facts.rows, np.int64)
        for bucket in facts.buckets:
            found = self.reader.read(bucket, TIME, *([PART] if of_train else []))
            own = found[TIME][found[PART] == TRAIN] if of_train else found[TIME]
            times[start : start + len(own)] = own
            start += len(own)
        return times[:start]

    def by_row(self, draw: Callable[[int, splits.Scratch], npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
        """Return by row of the log what is drawn for the rows that are kept."""
        facts, start = self.reader.buckets.facts, 0
        kept = self._scratch(facts.read, np.bool_)
        kept[:] = False
        for bucket in facts.buckets:
            kept[self.reader.read(bucket, ROW)[ROW]] = True
        if int(np.count_nonzero(kept)) != facts.rows:
            raise RunError(f"{self.reader.buckets.folder}: damaged, two interactions have one row of the log (rule 9)")
        drawn = draw(facts.rows, self._scratch)
        by_row: npt.NDArray[Scalar] = self._scratch(facts.read, drawn.dtype.type)
        for first in range(0, facts.read, splits.BLOCK_ROWS):
            rows = first + np.flatnonzero(kept[first : first + splits.BLOCK_ROWS])
            by_row[rows] = drawn[start : start + len(rows)]
            start += len(rows)
        return by_row

    def _scratch(self, n: int, dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        return temporary_array(n, dtype, folder=self.folder)


def given_facts(reader: BucketReader) -> Ints:
    """Return the facts of the given parts of all buckets, as `splits.given_facts`."""
    names = (PART, *([TIME] if reader.schema.time else []))
    found = (reader.read(bucket, *names) for bucket in reader.buckets.facts.buckets)
    facts: Ints = np.stack([splits.given_facts(f.get(TIME), f[PART]) for f in found]).max(0)
    return facts
