"""Buckets: interactions as Parquet files by ranges of users, the form in which any engine hands a log to `twotower
prepare`.

buckets.json                       facts; written last
users.parquet, items.parquet       row r of a table is user r, or item r; the id first, then the raw features
interactions/00000.parquet …       the interactions of consecutive user rows, sorted by user, time and row

A segment, such as a day, adds rows at the end of both tables, files to buckets, and buckets of its new users.
docs/prepared-format.md is the contract, `check.check_buckets` checks a folder against it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twotower import files
from twotower.data.interaction_columns import (
    BY_NAME,
    COLUMNS,
    CONTEXT_PREFIX,
    ITEM,
    PART,
    ROW,
    TIME,
    USER,
    VALUE_PREFIX,
)
from twotower.data.tables import averaged_columns
from twotower.errors import RunError
from twotower.features.schema import EventRule, Schema
from twotower.features.side import SideName
from twotower.files import layout
from twotower.files.readers import read_json
from twotower.section import first_problem

BUCKETS_FORMAT = 2
"""Format of a folder of buckets, in buckets.json."""
HASH = "md5-32"
"""Name of the hash that orders the users, in buckets.json."""


Row = Annotated[int, Field(ge=0, lt=2**63)]
Range = tuple[Row, Row]
"""First row, and the one after the last."""


class Segment(BaseModel):
    """An addition to a folder, such as the rows of a day; the first segment is what it was made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: Range
    """Rows of the users that it adds."""
    items: Range
    """Rows of the items that it adds."""
    read: Range
    """Rows of the log that it adds, with those that no bucket keeps."""
    sources: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()
    """SHA-256 of each file of the log that it was made of; empty where the writer names none."""
    times: str = Field("", pattern="^(number|date|zoned date|)$")
    """Form of the times in the log, as in `Times.kind`; empty where the writer names none."""


class BucketFile(BaseModel):
    """The interactions of a segment in a bucket."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^[^/\\._][^/\\]*\.parquet$")
    """Name of the file in the folder `interactions`."""
    segment: int = Field(ge=0)
    """Number of the segment, from 0."""
    rows: int = Field(ge=0)
    """Number of its records."""


class Bucket(BaseModel):
    """The interactions of consecutive users."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: Range
    """Rows of the users."""
    files: tuple[BucketFile, ...] = Field(min_length=1)
    """Files by segment, of which the first is the users' own."""

    @property
    def name(self) -> str:
        """Name of its first file, which no other bucket has."""
        return self.files[0].file

    @property
    def rows(self) -> int:
        """Number of the records of all files, of which some may repeat a pair of an earlier segment."""
        return sum(file.rows for file in self.files)


class LogColumns(BaseModel):
    """Meaning of the columns `positive` and `time`: the settings of the schema that the folder was written for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    """Column of the log that tells positive interactions; empty: all are positive."""
    positive_above: float
    """Label above which an interaction is positive."""
    weight: str = ""
    """Column of the weights; empty: none."""
    weight_scale: str = "linear"
    """Reading of the weights; those of the buckets are on it."""
    event: str = ""
    """Column of the event types; empty: none."""
    events: dict[str, EventRule] = {}
    """Meaning of each event type."""
    time: str
    """Column of the times; empty: none."""
    time_unit: str
    """Unit of the times in the log, or "order"."""
    time_format: str
    """Format of times that are texts; empty: found in the texts."""

    @classmethod
    def of(cls, schema: Schema) -> LogColumns:
        """Return the settings of a schema."""
        return cls(**{name: getattr(schema, name) for name in cls.model_fields})

    def difference(self, schema: Schema) -> str:
        """Return the first setting that a schema has otherwise, as words; "" without one."""
        return next(
            (
                f"{name} {value!r}, expected {expected!r} as in the schema"
                for (name, value), (_, expected) in zip(self, LogColumns.of(schema), strict=True)
                if value != expected
            ),
            "",
        )


class BucketFacts(BaseModel):
    """Content of buckets.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = BUCKETS_FORMAT
    maker: str = Field(min_length=1)
    """Name and version of the program that wrote the folder."""
    hash: str = Field(HASH, pattern=f"^{HASH}$")
    duplicates: str = Field(pattern="^(last|keep|error)$")
    """Treatment of repeated pairs of user and item. last: the latest of each pair is kept. keep: all are kept. error:
    none is repeated."""
    log: LogColumns
    """Settings that the folder was written for."""
    segments: tuple[Segment, ...] = Field(min_length=1)
    """The additions in order, whose ranges follow one another."""
    rows: int = Field(ge=0)
    """Number of records of all files."""
    positives: int = Field(ge=0)
    """Number of positive ones."""
    first_time: int | None = None
    """Earliest time; null without times."""
    last_time: int | None = None
    """Latest time; null without times."""
    buckets: tuple[Bucket, ...]
    """The buckets, in the order of their users, whose ranges follow one another."""

    @property
    def users(self) -> int:
        """Number of users."""
        return self.segments[-1].users[1]

    @property
    def items(self) -> int:
        """Number of items."""
        return self.segments[-1].items[1]

    @property
    def read(self) -> int:
        """Number of interactions of the log."""
        return self.segments[-1].read[1]

    @property
    def files(self) -> tuple[BucketFile, ...]:
        """The files of all buckets."""
        return tuple(file for bucket in self.buckets for file in bucket.files)

    def difference(self, schema: Schema) -> str:
        """Return the first difference between the folder and what a schema needs as words, "" without one (rule 12)."""
        if self.duplicates not in ("error", schema.duplicates):
            return f"duplicates '{self.duplicates}', expected '{schema.duplicates}' as in the schema"
        other = self.log.difference(schema)
        return f"log.{other}" if other else ""

    @model_validator(mode="after")
    def _check(self) -> BucketFacts:
        for name in ("users", "items", "read"):
            _check_ranges(f"{name} of the segments", (getattr(s, name) for s in self.segments), getattr(self, name))
        _check_ranges("users of the buckets", (b.users for b in self.buckets), self.users)
        if not (self.users and self.items):
            raise ValueError(f"segments: {self.users} users and {self.items} items, expected at least 1 of both")
        for bucket in self.buckets:
            self._check_segments(bucket)
        (name, n), *_ = Counter(file.file for file in self.files).most_common(1)
        if n > 1:
            raise ValueError(f"files of the buckets: {name} is named twice, expected each once")
        if (total := sum(file.rows for file in self.files)) != self.rows or self.rows > self.read:
            raise ValueError(f"rows: {self.rows:,} of {self.read:,} read, the buckets have {total:,}")
        return self

    def _check_segments(self, bucket: Bucket) -> None:
        """Raise ValueError if the files of a bucket are not in the order of their segments, or the first is not of the
        segment that adds the users."""
        found = [file.segment for file in bucket.files]
        if sorted({*found}) != found or found[-1] >= len(self.segments):
            what = f"expected rising ones below {len(self.segments)}"
            raise ValueError(f"bucket {bucket.name}: files of the segments {found}, {what}")
        first, end = self.segments[found[0]].users
        if not first <= bucket.users[0] <= bucket.users[1] <= end:
            what = f"expected some of {first} to {end}, which segment {found[0]} of its first file adds"
            raise ValueError(f"bucket {bucket.name}: users {bucket.users[0]} to {bucket.users[1]}, {what}")


def _check_ranges(what: str, ranges: Iterable[Range], end: int) -> None:
    """Raise ValueError if some ranges do not follow one another from 0 to an end."""
    rows = [0, *(row for found in ranges for row in found), end]
    if rows[::2] != rows[1::2] or sorted(rows) != rows:
        raise ValueError(f"{what}: expected ranges that follow one another from 0 to {end}")


@dataclass(frozen=True)
class Buckets:
    """A folder of buckets."""

    folder: Path
    facts: BucketFacts

    @classmethod
    def open(cls, folder: Path | str) -> Buckets:
        """Read the facts of a folder. Raises RunError if they are missing, damaged, or of another format."""
        folder = Path(folder)
        path = folder / layout.BUCKET_FACTS
        found = read_json(path)
        form = found.get("format") if isinstance(found, dict) else None
        if form != BUCKETS_FORMAT:
            raise RunError(f"{path}: format {form!r}, this version reads {BUCKETS_FORMAT}; write the buckets again")
        try:
            return cls(folder, BucketFacts.model_validate(found))
        except ValidationError as e:
            raise RunError(f"{path}: does not follow docs/prepared-format.md ({first_problem(e)})") from None

    def table(self, side: SideName) -> Path:
        """Return the file of the users or items."""
        return self.folder / layout.table(side)

    def versions(self, side: SideName) -> Path:
        """Return the file of the versions of the users or items, which exists if they have some."""
        return self.folder / layout.versions(side)

    def file(self, file: BucketFile) -> Path:
        """Return the path of a file of a bucket."""
        return self.folder / layout.BUCKET_FOLDER / file.file

    def save(self) -> None:
        """Write buckets.json."""
        files.write_json(self.folder / layout.BUCKET_FACTS, self.facts.model_dump(mode="json"))


def user_hashes(ids: pl.Series) -> npt.NDArray[np.uint32]:
    """Return the hashes (n,) of ids: the first 32 bits, in big-endian order, of the MD5 of an id's UTF-8 text.

    MD5 (RFC 1321) is in every engine. The hash spreads users over buckets; it protects nothing."""
    digests = b"".join(
        hashlib.md5(text.encode(), usedforsecurity=False).digest()[:4] for text in ids.cast(pl.String).to_list()
    )
    return np.frombuffer(digests, ">u4").astype(np.uint32)


def in_user_order(users: pl.DataFrame, key: str) -> pl.DataFrame:
    """Return the users of a segment in the order of their rows: by hash, equal hashes by id."""
    hashes = pl.Series("__hash", user_hashes(users[key]))
    return users.with_columns(hashes).sort("__hash", key).drop("__hash")


def in_bucket_order(found: pl.DataFrame, is_timed: bool, keeps_repeats: bool) -> pl.DataFrame:
    """Return interactions in the order of a bucket; without `keeps_repeats`, the latest of each pair of user and
    item."""
    found = found.sort(USER, *([TIME] if is_timed else []), ROW)
    return found if keeps_repeats else found.unique([USER, ITEM], keep="last", maintain_order=True)


def missing_column(columns: Collection[str], schema: Schema, given_parts: bool = False) -> str:
    """Return the first column that a schema, or a split with given parts, needs and a bucket lacks as words, "" without
    one (rule 12)."""
    needed = [c.name for c in COLUMNS if c.needed(schema)] + [VALUE_PREFIX + a for a in averaged_columns(schema)]
    needed += [CONTEXT_PREFIX + name for name in schema.context_columns()]
    absent = [name for name in (*needed, *([PART] if given_parts else [])) if name not in columns]
    by = "split" if absent == [PART] else "schema"
    return f"no column '{absent[0]}', which the {by} needs (found: {', '.join(columns)})" if absent else ""


def column_problem(schema: Mapping[str, pl.DataType]) -> str:
    """Return the first problem of a bucket's columns as words, "" without one."""
    required = [column.name for column in COLUMNS if not column.optional]
    for name in required:
        if name not in schema:
            return f"no column '{name}' (found: {', '.join(schema)})"
    for name in [*required, *(name for name in schema if name not in required)]:
        if name.startswith(CONTEXT_PREFIX):
            continue
        if name not in BY_NAME and not name.startswith(VALUE_PREFIX):
            return f"unknown column '{name}' (allowed: {', '.join(BY_NAME)}, value.NAME, context.NAME)"
        expected = BY_NAME[name].types if name in BY_NAME else (pl.Float64,)
        if schema[name] not in expected:
            return f"column '{name}' holds {schema[name]}, expected {' or '.join(t.__name__ for t in expected)}"
    return ""
