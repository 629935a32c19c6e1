"""Split of bucketed interactions: the part of every row, and counts of the train part, by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    VALUE_PREFIX,
    WEIGHT,
    Columns,
    stored_columns,
)
from twotower.data.pairs import target_mask
from twotower.data.prepare.bucket_reader import BucketReader
from twotower.data.split import SplitConfig
from twotower.data.splits import DROPPED, TEST, TRAIN, Parts
from twotower.data.tables import averaged_columns
from twotower.errors import RunError
from twotower.features.feature import HistorySpec
from twotower.features.side import SIDES, SideName
from twotower.files.readers import read_checked
from twotower.files.resumable import make_once

PartsOf = Callable[[Columns, Ints, slice], Parts]
"""Function of a bucket's columns, of its users' numbers of interactions (U,), and of their rows, that returns the parts
(n,)."""


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
        """Return the rule of the split, of users with these ids. The rules `time`, `random` and `user_random`, and one
        of train, look at all buckets first."""
        if self.split.is_given:
            rule = self.split.rule_of_train
            return self._from_train(rule) if rule else lambda found, lengths, users: found[PART]
        if self.split.kind == "time":
            starts = splits.part_starts(self._times(), self.split)
            return lambda found, lengths, users: splits.time_parts(found[TIME], starts, self.split)
        if self.split.kind in SplitConfig.kinds_of_users:
            measured = splits.measured_users(ids, self.split)
            if self.split.kind == "user_random":
                return self._user_random(measured)
            return lambda found, lengths, users: splits.user_parts(lengths, _some(measured, users), self.split)
        by_row = self._by_row(splits.random_parts, np.int8)
        return lambda found, lengths, users: by_row[found[ROW]]

    def _from_train(self, rule: SplitConfig) -> PartsOf:
        """Return the rule of given parts whose validation part is taken from train by another rule."""
        draw = lambda n, split, scratch: splits.random_parts(n, rule, scratch)  # noqa: E731
        drawn = self._by_row(draw, np.int8) if not rule.needs_time else None
        start = splits.part_starts(self._times(of_train=True), rule)[1] if rule.kind == "time" else 0

        def parts_of(found: Columns, lengths: Ints, users: slice) -> Parts:
            is_drawn = None if drawn is None else drawn[found[ROW]] == TEST
            user, targets = found[USER] - users.start, target_mask(found[POSITIVE], found.get(WEIGHT))
            return splits.part_of_train(rule, start, user, found.get(TIME), targets, is_drawn, found[PART])

        return parts_of

    def _user_random(self, measured: Bools | None) -> PartsOf:
        """Return the rule `user_random`."""
        place = self._by_row(splits.random_order, np.int64)

        def parts_of(found: Columns, lengths: Ints, users: slice) -> Parts:
            order = np.lexsort((place[found[ROW]], found[USER]))
            parts = np.empty(len(order), np.int8)
            parts[order] = splits.user_parts(lengths, _some(measured, users), self.split)
            return parts

        return parts_of

    def sums(self) -> dict[str, dict[SideName, Doubles]]:
        """Return the sums and numbers (2, rows) of averaged columns over the train part, by column and side.

        They are added in the order of the users, so that rounding does not depend on the buckets."""
        facts, columns = self.reader.buckets.facts, averaged_columns(self.reader.schema)
        n = {"user": facts.users, "item": facts.items}
        sums: dict[str, dict[SideName, Doubles]] = {
            a: {side: np.zeros((2, n[side])) for side in SIDES} for a in columns
        }
        for bucket in facts.buckets if columns else ():
            found, train = self.reader.read(bucket, ITEM, *self.reader.values), self.parts(bucket) == TRAIN
            for a in columns:
                values = found[VALUE_PREFIX + a]
                known = train & np.isfinite(values)
                for side in SIDES:
                    rows = found[side][known]
                    np.add.at(sums[a][side][0], rows, values[known])
                    sums[a][side][1] += np.bincount(rows, minlength=n[side])
        return sums

    def positive_weights(self) -> Doubles:
        """Return (items,) the sums of the weights of the training positives, added in the order of the users."""
        facts = self.reader.buckets.facts
        sums = np.zeros(facts.items)
        for bucket in facts.buckets:
            found = self.reader.read(bucket, ITEM, POSITIVE, WEIGHT)
            keep = (self.parts(bucket) == TRAIN) & found[POSITIVE]
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
        parts = parts_of(found, lengths(user), slice(*bucket.users))
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

    def _times(self, of_train: bool = False) -> Ints:
        """Return the times of all interactions, or of those that are given as train, in any order."""
        facts, start = self.reader.buckets.facts, 0
        times = self._scratch(facts.rows, np.int64)
        for bucket in facts.buckets:
            found = self.reader.read(bucket, TIME, *([PART] if of_train else []))
            own = found[TIME][found[PART] == TRAIN] if of_train else found[TIME]
            times[start : start + len(own)] = own
            start += len(own)
        return times[:start]

    def _by_row(
        self, draw: Callable[[int, SplitConfig, splits.Scratch], npt.NDArray[Scalar]], dtype: type[Scalar]
    ) -> npt.NDArray[Scalar]:
        """Return by row of the log what is drawn for the rows that are kept, as `splits.split_interactions` draws it
        for all."""
        facts, start = self.reader.buckets.facts, 0
        kept, by_row = self._scratch(facts.read, np.bool_), self._scratch(facts.read, dtype)
        kept[:] = False
        for bucket in facts.buckets:
            kept[self.reader.read(bucket, ROW)[ROW]] = True
        if int(np.count_nonzero(kept)) != facts.rows:
            raise RunError(f"{self.reader.buckets.folder}: damaged, two interactions have one row of the log (rule 9)")
        drawn = draw(facts.rows, self.split, self._scratch)
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


def _some(measured: Bools | None, users: slice) -> Bools | None:
    """Return which users of a bucket are measured, None for all."""
    return None if measured is None else measured[users]
