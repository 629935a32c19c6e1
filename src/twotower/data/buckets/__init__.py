"""Buckets: interactions as Parquet files by ranges of users, the form in which any engine hands a log to `twotower
prepare`.

buckets.json                       facts; written last
users.parquet, items.parquet       row r of a table is user r, or item r; the id first, then the raw features
interactions/00000.parquet …       the interactions of consecutive user rows, sorted by user, time and row

docs/prepared-format.md is the contract, `check.check_buckets` checks a folder against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twotower import files
from twotower.data.interaction_columns import BY_NAME, COLUMNS, CONTEXT_PREFIX, PART, VALUE_PREFIX
from twotower.data.tables import averaged_columns
from twotower.errors import RunError
from twotower.features.schema import EventRule, Schema
from twotower.features.side import SideName
from twotower.files import layout
from twotower.files.readers import read_json
from twotower.section import first_problem

BUCKETS_FORMAT = 1
"""Format of a folder of buckets, in buckets.json."""
HASH = "md5-32"
"""Name of the hash that orders the users, in buckets.json."""


class Bucket(BaseModel):
    """One file of interactions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^[^/\\._][^/\\]*\.parquet$")
    """Name of the file in the folder `interactions`."""
    users: tuple[int, int]
    """First user row, and the one after the last."""
    rows: int = Field(ge=0)
    """Number of interactions."""


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
    users: int = Field(ge=1, lt=2**63)
    """Number of users."""
    items: int = Field(ge=1, lt=2**63)
    """Number of items."""
    read: int = Field(ge=0, lt=2**63)
    """Number of interactions of the log."""
    rows: int = Field(ge=0)
    """Number of interactions of all buckets."""
    positives: int = Field(ge=0)
    """Number of positive interactions."""
    first_time: int | None = None
    """Earliest time; null without times."""
    last_time: int | None = None
    """Latest time; null without times."""
    buckets: tuple[Bucket, ...]
    """The files, in the order of their users, whose ranges follow one another."""

    def difference(self, schema: Schema) -> str:
        """Return the first difference between the folder and what a schema needs as words, "" without one (rule 12)."""
        if self.duplicates not in ("error", schema.duplicates):
            return f"duplicates '{self.duplicates}', expected '{schema.duplicates}' as in the schema"
        other = self.log.difference(schema)
        return f"log.{other}" if other else ""

    @model_validator(mode="after")
    def _check(self) -> BucketFacts:
        ends = [0, *(b.users[1] for b in self.buckets)]
        if [b.users[0] for b in self.buckets] != ends[:-1] or sorted(ends) != ends or ends[-1] != self.users:
            raise ValueError(f"users of the buckets: expected ranges that follow one another from 0 to {self.users}")
        if (total := sum(b.rows for b in self.buckets)) != self.rows or self.rows > self.read:
            raise ValueError(f"rows: {self.rows:,} of {self.read:,} read, the buckets have {total:,}")
        return self


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

    def file(self, bucket: Bucket) -> Path:
        """Return the file of a bucket."""
        return self.folder / layout.BUCKET_FOLDER / bucket.file

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
    """Return the table of users in the order of their rows: by hash, equal hashes by id."""
    hashes = pl.Series("__hash", user_hashes(users[key]))
    return users.with_columns(hashes).sort("__hash", key).drop("__hash")


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
