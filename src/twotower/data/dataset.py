"""The dataset that training, evaluation and serving share: interactions by row, their parts, and encoded columns."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.ragged import Column, Ragged, offsets_of
from twotower.arrays.sets import distinct_keys, pair_keys
from twotower.arrays.types import Bools, Codes, Ints, Numbers, WholeNumbers
from twotower.data import splits
from twotower.data.bucket_columns import arrays_of, bucket_columns, context_of
from twotower.data.context import context_frame
from twotower.data.fitted import Fitted, ReadAll
from twotower.data.interaction_columns import EVENT, PART, TIME, USER, Columns
from twotower.data.pairs import GroupedPairs, Pairs, counts
from twotower.data.parts import check_gap, dropped_line, given_parts, tell_of_repeats
from twotower.data.side import Side
from twotower.data.split import PART_NAMES, SplitConfig
from twotower.data.splits import DROPPED, TEST, TRAIN, VALIDATION, Parts, measured_users, split_interactions
from twotower.data.tables import Tables, nothing_to_learn
from twotower.data.versions import Versions
from twotower.errors import ConfigError
from twotower.escaping import representation
from twotower.features.encoder import Report
from twotower.features.encoders import Encoders
from twotower.features.feature import HistoryFacts, HistorySpec
from twotower.features.schema import Schema
from twotower.features.side import SIDES, SideName, other_side

log = logging.getLogger(__name__)


BY_USER = ("timeline", "positives_by_user", "seen_items", "positive_items", "interacted_items")
"""Arrays of interactions or items by user, which a dataset makes when they are read."""


@dataclass(frozen=True)
class Dataset:
    """Users, items and interactions, with encoded columns. Users and items are named by their internal rows 0..n-1."""

    schema: Schema
    encoders: Encoders
    users: Side
    items: Side
    pairs: Pairs
    parts: Parts
    times: Ints
    """Microseconds since 1970; with time_unit "order" numbers that grow with time; of a log without times the numbers
    of the rows."""
    split: SplitConfig = field(default_factory=SplitConfig)
    context_frame: pl.DataFrame = field(default_factory=pl.DataFrame, kw_only=True)
    """Columns of the interactions that features of the context read, as they are in the log; of prepared data one
    row, which has their types."""
    is_whole: bool = field(default=False, kw_only=True)
    """True if all interactions are of the train part, for a training whose settings are chosen."""

    def __repr__(self) -> str:
        return representation(type(self), self.describe())

    @property
    def time_ordered(self) -> bool:
        """True if histories of the test part hold the validation part too."""
        return self.split.histories_grow

    def with_schema(self, schema: Schema) -> Self:
        """Return the dataset with another schema of the same data; itself, with all that it keeps, if the schema is the
        same."""
        if schema == self.schema:
            return self
        return replace(self, schema=schema, encoders=self.encoders.with_schema(schema))

    def check(self, schema: Schema, split: SplitConfig) -> None:
        """Raise ConfigError if the dataset has another split, or a schema that makes other data."""
        if self.split.from_train and not split.from_train:  # the data settle it
            split = split.model_copy(update={"from_train": self.split.from_train})
        for what, before, after in (
            ("[schema]", self.schema.of_data(), schema.of_data()),
            ("[split]", self.split.model_dump(mode="json"), split.model_dump(mode="json")),
        ):
            if before != after:
                differs = ", ".join(sorted(k for k in before if before[k] != after.get(k)))
                raise self._made_otherwise(what, differs)

    def _made_otherwise(self, section: str, options: str) -> ConfigError:
        """Return the error of a dataset that another section of the config made."""
        return ConfigError(
            f"the dataset was made with another {section} ({options}); pass its schema, and its split in the "
            "config, or make it again from the tables"
        )

    def with_all_of_train(self) -> Dataset:
        """Return the dataset in memory whose train part has the validation part too, with the same encoders."""
        parts = np.where(self.parts == VALIDATION, np.int8(TRAIN), self.parts)
        frame = self.context_frame
        users, items = (self.side_before(side, TEST) for side in SIDES)
        return Dataset(self.schema, self.encoders, users, items, self.pairs, parts, self.times, self.split,
            context_frame=frame)  # fmt: skip

    def of_part(self, part: int) -> Bools | slice:
        """Return the mask (n,) of the interactions of TRAIN, VALIDATION or TEST, or their slice."""
        mask: Bools = self.parts == part
        return mask

    def part(self, part: int) -> Pairs:
        """Return the pairs of TRAIN, VALIDATION or TEST, in the table's order."""
        return self.pairs.take(self.of_part(part))

    def part_indices(self, part: int) -> Ints:
        """Return the indices of the interactions of a part, rising."""
        found = self.of_part(part)
        return np.arange(found.start, found.stop) if isinstance(found, slice) else np.flatnonzero(found)

    @cached_property
    def context(self) -> dict[str, Column]:
        """Encoded features of the context, by name: a row for each interaction."""
        values = context_frame(self.context_frame, self.schema, self.pairs.user, self.times)
        return self.encoders.transform("context", values)

    @cached_property
    def train(self) -> Pairs:
        return self.part(TRAIN)

    @cached_property
    def validation(self) -> Pairs:
        return self.part(VALIDATION)

    @cached_property
    def test(self) -> Pairs:
        return self.part(TEST)

    def grouped_before(self, part: int) -> list[GroupedPairs]:
        """Return the pairs of each part before `part`, by user."""
        return [self.grouped(earlier) for earlier in range(part)]

    def grouped(self, part: int) -> GroupedPairs:
        """Return the pairs of a part by user."""
        if part not in self._grouped:
            group = GroupedPairs.of_sorted if self.grouped_by_user else GroupedPairs.of
            self._grouped[part] = group(self.pairs_of(part), len(self.users))
        return self._grouped[part]

    @cached_property
    def _grouped(self) -> dict[int, GroupedPairs]:
        return {}

    def pairs_of(self, part: int) -> Pairs:
        """Return `train`, `validation` or `test`, which are kept, unlike the arrays of `part`."""
        pairs: Pairs = getattr(self, PART_NAMES[part])
        return pairs

    def side(self, side: SideName) -> Side:
        return self.users if side == "user" else self.items

    @property
    def has_versions(self) -> bool:
        """True if users or items have versions."""
        return self.users.versioned or self.items.versioned

    def input_rows(self, side: SideName, rows: WholeNumbers, interactions: Ints) -> WholeNumbers:
        """Return the rows (n,) of `side(side).by_version()` that hold for some rows (n,) at the times of interactions
        (n,), by index or its complement; the rows themselves without versions."""
        found = self.side(side)
        return found.at(rows, self.times[np.maximum(interactions, ~interactions)]) if found.versioned else rows

    def rows_after_training(self, side: SideName) -> Ints:
        """Return the row of `side(side).by_version()` of each row that holds at the latest training interaction."""
        found = self.side(side)
        return found.at(np.arange(len(found)), np.broadcast_to(self.times_of(TRAIN).max(), len(found)))

    def times_of(self, part: int) -> Ints:
        """Return the times of the pairs of a part, as `part` has them."""
        return self.times[self.of_part(part)]

    def side_before(self, side: SideName, part: int) -> Side:
        """Return one side with the sequences that are known before `part`.

        If `time_ordered`, the sequences hold all earlier parts; else they hold the train part."""
        known = self.side(side)
        if part != TEST or not self.time_ordered:
            return known
        histories = {h.name: self.history(h, self.parts != TEST) for h in self.schema.histories(side)}
        return replace(known, columns=known.columns | histories) if histories else known

    def history(self, history: HistorySpec, among: Bools) -> Ragged:
        """Return the history of each row of its side, oldest first, from the interactions in the mask `among` (n,)."""
        keep = self.sort_by_time(among & history.holds(self.pairs.positive))
        own, other, read = (
            self.pairs.arrays[history.side],
            self.pairs.arrays[other_side(history.side)],
            other_side(history.side),
        )

        def codes_of(at: Ints) -> Codes:
            codes = self.side(read).codes(history, self.encoders)
            return codes[self.input_rows(read, other[at], at)]  # the features of an interaction are those of its time

        found: Columns = {EVENT: self.pairs.event, TIME: self.times}
        return history_of(history, own[keep], keep, len(self.side(history.side)), codes_of, found)

    def sort_by_time(self, among: Bools) -> Ints:
        """Return the indices of the interactions in the mask `among` (n,), oldest first; ties keep the table's
        order."""
        keep = np.flatnonzero(among)
        return keep[np.argsort(self.times[keep], kind="stable")]

    # Views of the train part for training; a `MemmapDataset` has those of BY_USER on disk.

    @property
    def grouped_by_user(self) -> bool:
        """True if the training interactions are sorted by user and time."""
        return False

    @cached_property
    def train_indices(self) -> Ints:
        """Indices of the training interactions, rising."""
        return np.flatnonzero(self.parts == TRAIN)

    @cached_property
    def positive_indices(self) -> Ints:
        """Indices of the training targets, which are positives of a weight above 0, rising."""
        return np.flatnonzero((self.parts == TRAIN) & self.pairs.target)

    @property
    def negative_indices(self) -> Ints:
        """Indices of the training negatives of a weight above 0, rising."""
        return np.flatnonzero((self.parts == TRAIN) & ~self.pairs.positive & (self.pairs.weight > 0))

    @cached_property
    def timeline(self) -> Ragged:
        """Every user's training interactions by index, oldest first."""
        keep = self.sort_by_time(self.parts == TRAIN)
        return Ragged.from_pairs(self.pairs.user[keep], keep, len(self.users))

    @cached_property
    def positives_by_user(self) -> Ragged:
        """Every user's training targets by index, oldest first."""
        keep = self.sort_by_time((self.parts == TRAIN) & self.pairs.target)
        return Ragged.from_pairs(self.pairs.user[keep], keep, len(self.users))

    @cached_property
    def seen_items(self) -> Ragged:
        """The distinct items of each user's training interactions, rising, by user row."""
        return _items_of(self.train.user, self.train.item, len(self.users), len(self.items))

    @cached_property
    def positive_items(self) -> Ragged:
        """The distinct items of each user's training targets, rising, by user row."""
        train = self.train
        liked = train.target
        return _items_of(train.user[liked], train.item[liked], len(self.users), len(self.items))

    @cached_property
    def item_positive_counts(self) -> Numbers:
        """(items,) number of training positives of each item; with weights the sums of theirs."""
        return self.train.sums("item", len(self.items), self.train.positive)

    @cached_property
    def user_counts(self) -> Ints:
        """(users,) number of training interactions of each user."""
        return counts(self.train.user, len(self.users))

    @cached_property
    def item_counts(self) -> Ints:
        """(items,) number of training interactions of each item."""
        return counts(self.train.item, len(self.items))

    @cached_property
    def item_weights(self) -> Numbers:
        """(items,) sum of the weights of the training interactions of each item; without weights their number."""
        return self.train.sums("item", len(self.items))

    @cached_property
    def item_user_counts(self) -> Ints:
        """(items,) number of users with a training interaction with each item."""
        if self.schema.duplicates != "keep":  # no user has two with one item
            return self.item_counts
        return counts(self.seen_items.values, len(self.items))

    @property
    def digest(self) -> str:
        """Digest of the interactions, columns, encoders and schema, by which a resumed training knows its data again:
        16 hexadecimal digits."""
        digest, columns = hashlib.sha256(), list[Column | npt.NDArray[Any]]([*self.pairs.arrays.values(), self.parts])
        columns += [self.times] if self.schema.time else []
        for side in (self.users, self.items):
            columns += side.columns.values()
            if side.versions is not None:
                columns += [*side.versions.columns.values(), side.versions.owners, side.versions.since]
        for column in (*columns, *self.context.values()):
            for array in (column.values, column.offsets) if isinstance(column, Ragged) else (column,):
                digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(self.encoders.digest.encode())
        digest.update(self.schema.model_dump_json().encode())
        return digest.hexdigest()[:16]

    @cached_property
    def interacted_items(self) -> Ragged:
        """The item rows of all interactions of each user, in all parts, by user row; `source` holds the interactions'
        indices."""
        return Ragged.from_pairs(self.pairs.user, self.pairs.item, len(self.users), np.arange(len(self.pairs)))

    def titles(self) -> list[str]:
        """Return the title of each item row, as `title_column` does."""
        return self.title_column().to_list()

    def title_column(self) -> pl.Series:
        """Return the title of each item row, or its id where the title is missing."""
        titles, ids = self.items.frame[self.schema.title or self.schema.item_id], self.items.ids
        if not titles.dtype.is_integer() and titles.dtype != pl.String:
            titles = pl.Series([None if t is None else str(t) for t in titles], dtype=pl.String)
        titles = titles.cast(pl.String)
        return titles.zip_with(titles.is_not_null(), ids.cast(pl.String)) if titles.null_count() else titles

    def describe(self) -> str:
        """Return one line with the numbers of users, items and interactions, and the sizes of the parts."""
        n = counts(self.parts, len(PART_NAMES))
        sizes = ", ".join(f"{count:,} {name}" for name, count in zip(PART_NAMES, n, strict=True))
        return f"{len(self.users):,} users, {len(self.items):,} items, {len(self.parts):,} interactions ({sizes})"

    def reports(self, side: SideName) -> dict[str, Report]:
        """Return the reports of the features of a side whose encoders make one, over the rows with training
        interactions, by feature name."""
        trained = np.flatnonzero(self.user_counts if side == "user" else self.item_counts)
        return self.encoders.reports(side, self.side(side).frame, trained)

    def describe_features(self) -> list[str]:
        """Return a line for each report of a feature."""
        kinds = {(f.side, f.name): f.kind for f in self.schema.features}
        return [
            f"{side} {kinds[side, name]} '{name}': {report}"
            for side in SIDES
            for name, report in self.reports(side).items()
        ]


def build_dataset(
    tables: Tables, schema: Schema, config: SplitConfig, whole: bool = False, encoders: Encoders | None = None
) -> Dataset:
    """Replace ids by rows, split, compute training statistics, fit the encoders on the train part, and encode.

    `whole` makes all interactions the train part; the dataset keeps the split of the config. `encoders` are those of an
    earlier dataset, which are not fitted again. Raises DataError for tables that no model can be trained on.
    """
    check_gap(schema, config)
    frames: dict[SideName, pl.DataFrame] = {"user": tables.users, "item": tables.items}
    given = None if whole else given_parts(tables.interactions, config)
    row = pl.int_range(tables.interactions.height, eager=True)
    bucket = bucket_columns(tables.interactions, row, frames, schema, given)
    columns = arrays_of(bucket, schema)
    if given is not None:
        config = splits.with_source(config, splits.given_facts(columns.get(TIME), columns[PART]))
    if whole:
        parts = np.zeros(bucket.height, np.int8)
    else:
        parts = split_interactions(columns, config, measured_users(tables.users[schema.user_id], config))
        tell_of_repeats(tables.left_out, tables.interactions, parts, schema, config)
    if n := int(np.count_nonzero(parts == DROPPED)):
        bucket, parts = bucket.filter(parts != DROPPED), parts[parts != DROPPED]
        log.info(dropped_line(n))
    columns = {name: column.copy() for name, column in arrays_of(bucket, schema).items()}  # polars lends its memory
    train, raw, times = parts == TRAIN, context_of(bucket, schema), columns.get(TIME)
    counts = {s: np.bincount(columns[s][train], minlength=frame.height) for s, frame in frames.items()}
    contexts = [context_frame(raw, schema, columns[USER], times).filter(train)] if schema.side("context") else []
    read_all: ReadAll = lambda *names: [(columns, parts)]  # noqa: E731
    fitted = Fitted.on(read_all, schema, frames, tables.versions, counts, contexts, raw)
    users, items = (fitted.frames[side] for side in SIDES)
    pairs = Pairs.of(columns)
    found = (encoders or fitted.encoders, users, items, pairs, parts, times, config)
    dataset = assemble_dataset(*found, versions=fitted.versions, context=raw)
    return replace(dataset, is_whole=True) if whole else dataset


def assemble_dataset(
    encoders: Encoders,
    users: pl.DataFrame,
    items: pl.DataFrame,
    pairs: Pairs,
    parts: Parts,
    times: Ints | None,
    split: SplitConfig = SplitConfig(),
    encode: tuple[SideName, ...] = SIDES,
    versions: Mapping[SideName, Versions] | None = None,
    context: pl.DataFrame | None = None,
) -> Dataset:
    """Return the dataset of tables whose interactions are rows already, with fitted encoders; only the sides in
    `encode` get columns. `versions` are those of the sides that have some, without columns. `context` has the columns
    of the interactions that features of the context read. Without `times` the order is that of the rows."""
    schema = encoders.schema
    train = parts == TRAIN
    if not pairs.target[train].any():
        raise nothing_to_learn(schema)
    tables: dict[SideName, pl.DataFrame] = {"user": users, "item": items}
    sides = {s: _encoded_side(encoders, s, t, s in encode, (versions or {}).get(s)) for s, t in tables.items()}
    columns = pl.DataFrame() if context is None else context
    times = np.arange(len(parts)) if times is None else times
    dataset = Dataset(schema, encoders, sides["user"], sides["item"], pairs, parts, times, split, context_frame=columns)
    for history in schema.histories(*encode):
        dataset.side(history.side).columns[history.name] = dataset.history(history, train)
    return dataset


def _encoded_side(
    encoders: Encoders, side: SideName, frame: pl.DataFrame, encode: bool, versions: Versions | None
) -> Side:
    """Return a side with its columns, and with those of its versions; without columns unless `encode`."""
    if versions is not None and encode:
        versions = replace(versions, columns=encoders.transform(side, versions.frame, refuse=False))
    columns = encoders.transform(side, frame, refuse=versions is None) if encode else {}
    return Side(frame, columns, encoders.schema.id_column(side), versions)


def _items_of(user: Codes, item: Codes, n_users: int, n_items: int) -> Ragged:
    """Return the distinct items of each user, rising."""
    users, items = np.divmod(distinct_keys(pair_keys(user, item, n_items)), n_items)
    return Ragged(items.astype(np.int32), offsets_of(np.bincount(users, minlength=n_users)))


def history_of(
    history: HistorySpec, own: Codes, places: Ints, n: int, codes_of: Callable[[Ints], Codes], found: Columns
) -> Ragged:
    """Return the history of each of n rows, oldest first, with the places of its interactions.

    The interactions stand at `places` (k,) of the columns `found`, in the order of time, and are of the rows `own`
    (k,). `codes_of` returns the codes of what interactions at some places are with."""
    rows = Ragged.from_pairs(own, own, n, places).keep_last(history.max_length)
    assert rows.source is not None
    if history.codes is None:
        return replace(rows, values=codes_of(rows.source))
    first = np.zeros(len(rows.source), bool)
    first[rows.offsets[:-1][rows.lengths > 0]] = True
    types, times = (found[name][rows.source] for name in (EVENT, TIME))
    return replace(rows, values=history.codes(HistoryFacts(first, types, times)))
