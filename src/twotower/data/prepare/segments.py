"""A later segment of a folder of buckets, such as the rows of a day: users and items keep their rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from twotower import files
from twotower.data.buckets import Bucket, BucketFacts, BucketFile, Buckets, Range, in_user_order
from twotower.data.buckets.check import repeated_pairs
from twotower.data.interaction_columns import CONTEXT_PREFIX, ITEM, USER, WEIGHT
from twotower.data.prepare.bucketing import (
    SortedBucket,
    Sorting,
    file_sums,
    given_table,
    log_summary,
    look,
    segment_of,
    user_ranges,
)
from twotower.data.prepare.log_pieces import Log, Sides, counts_of_users, write_pieces
from twotower.data.prepare.options import PrepareOptions
from twotower.data.reading.readers import need
from twotower.data.tables import CheckedLog, no_known_rows, side_columns, with_present_ids
from twotower.errors import DataError
from twotower.features.side import SIDES, SideName
from twotower.features.values import with_texts
from twotower.files import layout
from twotower.files.readers import read_checked, read_parquet, write_parquet
from twotower.progress import JobProgress
from twotower.version import __version__

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentWriter:
    """Writes a log as the next segment of a folder of buckets."""

    source: Log
    before: Buckets
    """The folder without the segment."""

    def check(self) -> None:
        """Raise DataError if a file of the log is in the folder already."""
        known = {digest: n for n, s in enumerate(self.before.facts.segments) for digest in s.sources}
        for file in self.source.files:
            if (number := known.get(file.digest())) is not None:
                raise DataError(
                    f"{file.path}: is in {self.before.folder} already, in segment {number}; leave it out, and name the "
                    "new files alone"
                )

    def write(self, made: Path, work: Path, options: PrepareOptions) -> Buckets:
        """Write the folder with the segment into `made`, where former files are hard links; `work` is for temporary
        files.

        Raises DataError for a log that does not fit the folder, ConfigError for too little memory, OSError."""
        schema, facts = self.source.schema, self.before.facts
        source, number = self.source.copied(work / "text"), len(facts.segments)
        pieces, scratch, interactions = work / "pieces", work / "scratch", made / layout.BUCKET_FOLDER
        for path in (pieces, scratch):
            path.mkdir(exist_ok=True)
        files.remove(interactions)
        interactions.mkdir()
        for file in facts.files:
            files.link(self.before.file(file), interactions / file.file)
        checked = self._looked_at(source)
        sides = self._sides(source, checked)
        for side, frame in sides.items():
            write_parquet(frame, made / layout.table(side))
        for note in checked.notes:
            log.info(note)
        progress = JobProgress(log, "interactions read", source.rows)
        paths = write_pieces(source, checked, sides, pieces, options.threads, progress)
        counts = counts_of_users(paths, sides["user"].height)
        if not counts.any():
            raise no_known_rows()
        ranges = [bucket.users for bucket in facts.buckets]
        ranges += [
            (facts.users + first, facts.users + end)
            for first, end in user_ranges(counts[facts.users :], options.bucket_rows)
        ]
        sizes = [int(counts[first:end].sum()) for first, end in ranges]
        options.check_memory(max(sizes), "the largest bucket of the new rows")
        written = dict[Range, BucketFile]()

        def add(found: SortedBucket) -> None:
            written[found.bucket.users] = found.bucket.files[0]

        is_timed, keeps_repeats = bool(schema.time), facts.duplicates == "keep"
        sorting = Sorting(tuple(paths), is_timed, keeps_repeats, scratch, interactions, number, self._types(paths[0]))
        shards = [(n, users) for n, users in enumerate(ranges) if sizes[n] or n >= len(facts.buckets)]
        options.job_engine().run(sorting, shards, add)
        kept = sum(file.rows for file in written.values())
        log_summary(source, checked, sum(sizes), kept, facts.duplicates)
        new = [interactions / file.file for file in written.values() if file.rows]
        positives, first, last, late = file_sums(new, is_timed, facts.last_time)
        segment = segment_of(source, sides, checked, facts.segments[-1])
        buckets = tuple(
            Bucket(users=b.users, files=(*b.files, *([written[b.users]] if b.users in written else [])))
            for b in facts.buckets
        )
        buckets += tuple(Bucket(users=users, files=(written[users],)) for users in ranges[len(buckets) :])
        self._check_pairs(written, interactions)
        ends = [time for time in (facts.first_time, facts.last_time, first, last) if time is not None]
        found = BucketFacts(
            maker=f"twotower {__version__}", duplicates=facts.duplicates, log=facts.log,
            segments=(*facts.segments, segment), rows=facts.rows + kept, positives=facts.positives + positives,
            buckets=buckets, first_time=min(ends, default=None), last_time=max(ends, default=None),
        )  # fmt: skip
        log.info(
            f"segment {number}: {kept:,} interactions, {late:,} of them older than the newest before; "
            f"{_added(segment.users):,} new users, {_added(segment.items):,} new items"
        )
        made_buckets = Buckets(made, found)
        made_buckets.save()
        return made_buckets

    def _looked_at(self, source: Log) -> CheckedLog:
        """Return the log as it was looked at. Raises DataError for times of another form than those of the folder."""
        # A side without a table has the ids of the folder and of the log.
        every = {f"unknown_{side}s": "add" for side in SIDES if not getattr(source.data, f"{side}s")}
        checked = CheckedLog(source.schema.model_copy(update=every))
        look(source, checked)
        before = next((s.times for s in self.before.facts.segments if s.times), "")
        if checked.times and before and (found := checked.times.kind) != before:
            zones = "dates of one zone, with or without its name" if "date" in before else "numbers"
            raise DataError(
                f"interactions: time '{source.schema.time}' holds a {found}, and {self.before.folder} was made of "
                f"times that are a {before}; give {zones}, as in the files before"
            )
        return checked

    @cached_property
    def _known(self) -> Sides:
        """The tables of the folder."""
        return {side: read_checked(self.before.table(side), read_parquet) for side in SIDES}

    def _sides(self, source: Log, checked: CheckedLog) -> Sides:
        """Return the tables with the rows of the folder first, in their order, with the features of the tables that
        are given. Raises DataError for other types than before."""
        schema, given = source.schema, dict[SideName, tuple[pl.DataFrame, bool] | None]()
        for side in SIDES:
            known, table = self._known[side], given_table(source, side, checked.notes)
            if table is not None:
                frame = self._of_types(table[0], known, side, table[1])
                rest = known.join(frame, on=known.columns[0], how="anti", maintain_order="left")
                given[side] = pl.concat([rest, frame], how="diagonal"), table[1]
            else:
                given[side] = known, source.is_text
        found, _ = checked.sides(given)
        for side, frame in found.items():
            known, key = self._known[side], schema.id_column(side)
            if frame[key].dtype != known[key].dtype:
                raise self._other_type(f"{side}s", key, frame[key].dtype, known[key].dtype)
            new = frame.join(known, on=key, how="anti", maintain_order="left")
            new = in_user_order(new, key) if side == "user" else new
            old = known.select(key).join(frame, on=key, how="left", maintain_order="left")
            found[side] = pl.concat([old, new]).select(side_columns(side, schema))
        return found

    def _of_types(self, frame: pl.DataFrame, known: pl.DataFrame, side: SideName, is_text: bool) -> pl.DataFrame:
        """Return the table of a side with the types that its columns have in the folder. Raises DataError."""
        schema, what = self.source.schema, f"{side}s"
        names = side_columns(side, schema)
        need(frame, names, what)
        frame = with_present_ids(with_texts(frame), [names[0]], what, schema, []).select(names)
        shared = [name for name in names if name in known.columns]
        for name in shared:
            own, wanted = frame[name].dtype, known[name].dtype
            is_spelled = is_text and own.is_integer() and wanted == pl.String
            if own != wanted and not (_fits(own, wanted) or is_spelled or frame[name].is_null().all()):
                raise self._other_type(what, name, own, wanted)
        return frame.cast({name: known[name].dtype for name in shared})

    def _other_type(self, table: str, name: str, found: pl.DataType, wanted: pl.DataType) -> DataError:
        return DataError(
            f"{table}: column '{name}' holds {found}, and {wanted} in {self.before.folder}; give it the same type, or "
            "write all buckets again"
        )

    def _types(self, piece: Path) -> dict[str, pl.DataType]:
        """Return the types of the columns that have another type in the new rows than in the folder's files, where
        both hold the same values. Raises DataError for other columns or types."""
        found = pl.scan_parquet(piece, glob=False).collect_schema()
        wanted = pl.scan_parquet(self.before.file(self.before.facts.files[0]), glob=False).collect_schema()
        if odd := sorted({*found} ^ {*wanted}):
            where = "the new rows" if odd[0] in wanted else f"the files of {self.before.folder}"
            raise DataError(
                f"interactions: column '{odd[0]}' is missing in {where}; give the same columns, with the schema and "
                "the split of the folder, or write all buckets again"
            )
        for name, own in found.items():
            if own != wanted[name] and not (name in (USER, ITEM, WEIGHT) or _fits(own, wanted[name])):
                raise self._other_type("interactions", name.removeprefix(CONTEXT_PREFIX), own, wanted[name])
        return {name: wanted[name] for name, own in found.items() if own != wanted[name]}

    def _check_pairs(self, written: dict[Range, BucketFile], folder: Path) -> None:
        """Raise DataError if a pair of an earlier segment comes again, where none may."""
        for bucket in self.before.facts.buckets if self.before.facts.duplicates == "error" else ():
            if (file := written.get(bucket.users)) is None:
                continue
            paths = [folder / f.file for f in (*bucket.files, file)]
            pairs = [pl.scan_parquet(path, glob=False).select(USER, ITEM).collect() for path in paths]
            for _, what in repeated_pairs(pairs):
                raise DataError(
                    f"interactions: {what.split(',')[0]} of an earlier segment; drop the row, or write all buckets "
                    "again with schema.duplicates = 'last' or 'keep'"
                )


def _fits(own: pl.DataType, wanted: pl.DataType) -> bool:
    """Return True if each value of a type is one of another type, too: missing ones, and whole numbers as fractions."""
    return own == pl.Null or (own.is_integer() and wanted == pl.Float64)


def _added(rows: Range) -> int:
    return rows[1] - rows[0]
