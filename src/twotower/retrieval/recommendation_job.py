"""The nightly job: answers to all users of a table, in shards that a later call continues (files/sharded_result.py).

The columns are user_id, rank, item_id, score, source. `_recommendations.json` has the bundle, options, files of the
table, counts, and shards. pandas and pyarrow open the folder as a table: they ignore names that begin with an
underscore.
"""

from __future__ import annotations

import logging
from collections import Counter, abc
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from twotower.data.reading.column_types import common_types, with_types
from twotower.data.reading.readers import table_errors
from twotower.data.reading.sharded_job import Rows, ShardedJob
from twotower.data.reading.table_shards import ShardedTable, TableShard
from twotower.data.reading.text_files import Reading
from twotower.data.reading.text_format import TextFormat
from twotower.errors import DataError
from twotower.files import places
from twotower.files.places import JsonObject
from twotower.files.sharded_result import MadeShard, ShardedResult
from twotower.files.urls import Url, is_url
from twotower.kinds import foreign_modules
from twotower.machine import default_threads
from twotower.progress import Summary
from twotower.retrieval import SHARD_USERS
from twotower.retrieval.batches import BatchRecommender, UnknownUsers, UserBatch, read_columns
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.store.store import Store

log = logging.getLogger(__name__)

RECOMMENDATIONS_FORMAT = 2
LIST_FILE = "_recommendations.json"
SHARD_MAX_ITEMS = 2**22
"""Largest number of recommended items of a shard, which are in memory together: with a large `k`, shards have fewer
users."""
ID_SLICE = 2**16
"""Ids counted at a time."""


def recommend_users(
    store: Path | str,
    users: Path | str,
    out: Path | str,
    k: int = 100,
    *,
    method: Method = 1,
    unknown: UnknownUsers = "popular",
    ban: abc.Sequence[str] = (),
    where: Mapping[str, str] | None = None,
    keep_seen: bool | None = None,
    shard_rows: int = SHARD_USERS,
    overwrite: bool = False,
    engine: str = "local",
    threads: int = 0,
    separator: str = "",
    columns: abc.Sequence[str] = (),
    decimal: str = ".",
) -> int:
    """Write the `k` best items for each user of the table `users` into the folder `out`, by the current bundle of a
    store.

    Returns the number of users with an answer. `users` is a text (.csv, .tsv, .txt) or Parquet file, a folder of files,
    or a pattern such as "users/*.parquet", of any size. Its columns and the options are the same as in
    `recommend_batch`. `out` is a path or a URL of an object store. A shard of up to `shard_rows` users of a file (fewer
    with a large `k`) is a Parquet file; _recommendations.json, written last, has the counts. A later call makes missing
    or damaged shards. `gc` does not remove the bundle meanwhile.

    `engine` is "local" (this process with `threads`), "ray" (`threads` processes of this machine) or "ray://HOST:PORT"
    (processes of a cluster with `threads` each). `threads` 0: OMP_NUM_THREADS, else all cores. For text files,
    `separator` is the character between values ("": by the file's ending), `columns` are the names of their columns if
    their first lines have none, and `decimal` is the decimal mark, "." or ",".

    Raises DataError if the table does not fit, changes meanwhile or, with `unknown` "error", has unknown users;
    RunError if `out` is in the folder `users`, contains other files, a file of the table, or, without `overwrite`,
    recommendations of another bundle, table or options, or if another call writes it; ConfigError for an unusable
    argument; Unavailable.
    """
    job = ShardedJob(users, out, "users", engine, threads, shard_rows)
    form = TextFormat.of_table(separator, columns, decimal=decimal)
    if job.engine.is_remote:
        store = store if is_url(store) else Path(store).absolute()
    bundle = Store(store).current()
    with bundle.lease():
        retriever = Retriever(bundle, threads or default_threads())
        options = partial(
            BatchRecommender, k=k, method=method, unknown=unknown, ban=tuple(ban), where=dict(where or {}),
            keep_seen=keep_seen,
        )  # fmt: skip
        recommender = options(retriever)
        table = UserTable(job.source, retriever, method, answers_unknown=method == 2 or unknown == "popular", form=form)
        log.info(f"bundle {bundle.id}: {table.rows:,} users, read by {', '.join(table.columns)}")
        if table.odd_id is not None:
            theirs = retriever.dataset.users.ids.dtype
            log.info(
                f"the id '{table.odd_id}' is no {theirs}, as those of the bundle are; the answers have {table.id_type}"
            )
        job.shard_rows = min(shard_rows, max(1, SHARD_MAX_ITEMS // recommender.k))
        plan: JsonObject = {
            "format": RECOMMENDATIONS_FORMAT, "bundle": bundle.id, "k": recommender.k, "method": int(method),
            "unknown": unknown, "keep_seen": recommender.keep_seen,
            "where": {name: str(value) for name, value in sorted((where or {}).items())},
            "ban": sorted({str(item) for item in ban}), "columns": table.columns, "shard_rows": job.shard_rows,
            "separator, decimal, columns": form.given, **table.states(),
        }  # fmt: skip
        result = ShardedResult(job.place, "recommendations", LIST_FILE, plan)
        load = partial(_load, store, bundle.id, options) if job.engine.is_remote else lambda: recommender
        counted = JsonObject()

        def about(made: list[MadeShard]) -> JsonObject:
            counted.update(_counts(made, table.rows))
            before = places.read_json(job.place / LIST_FILE) or {}
            is_counted = all(before.get(key) == value for key, value in counted.items())
            is_counted = is_counted and type(before.get("repeated")) is int
            counted["repeated"] = before["repeated"] if is_counted else _count_repeated(table, retriever)
            return counted

        job.run(
            result, table, load, partial(_answered, table), about, "answered", overwrite,
            foreign_modules(retriever.schema),
        )  # fmt: skip
    return _summary(counted, job.place)


def _load(store: Path | str, bundle: str, make: abc.Callable[[Retriever], BatchRecommender]) -> BatchRecommender:
    """Load a bundle in another process."""
    return make(Retriever(Store(store).open(bundle), default_threads()))


def _answered(table: UserTable, recommender: BatchRecommender, shard: TableShard) -> Rows:
    """Return the answers to the users of a shard."""
    answers = list(recommender.answers(table.read(shard)))
    frame = pl.concat([answer.frame for answer in answers])
    sources = sum((answer.sources for answer in answers), Counter[str]())
    return frame.with_columns(pl.col("user_id").cast(table.id_type)), {
        "users": shard.rows, "rows": frame.height, "sources": dict(sorted(sources.items())),
        "unknown": sum(answer.unknown for answer in answers), "empty": sum(answer.empty for answer in answers),
    }  # fmt: skip


def _counts(made: list[MadeShard], users: int) -> JsonObject:
    """Return the content of the list about the shards, without the number of repeated ids."""
    facts = [shard.facts for shard in made]
    sources = sum((Counter[str](each["sources"]) for each in facts), Counter[str]())
    return {
        "users": users, "rows": sum(each["rows"] for each in facts), "sources": dict(sorted(sources.items())),
        "unknown_left_out": sum(each["unknown"] for each in facts),
        "without_items": sum(each["empty"] for each in facts),
        "shards": [{"file": m.file, "users": m.facts["users"], "rows": m.facts["rows"]} for m in made],
    }  # fmt: skip


def _count_repeated(table: UserTable, retriever: Retriever) -> int:
    """Return the number of rows whose user is in the bundle and in an earlier row."""
    seen, known = np.zeros(len(retriever.user_ids), np.bool_), 0
    for ids in table.id_slices(ID_SLICE):
        rows = UserBatch.read(retriever, ids.to_frame(), 1).rows
        rows = rows[rows >= 0]
        seen[rows] = True
        known += len(rows)
    return known - int(seen.sum())


def _summary(counted: JsonObject, place: Path | Url) -> int:
    """Log the counts of a call, and return the number of users with an answer."""
    summary = Summary("users", counted["users"])
    summary.drop("unknown to the bundle", counted["unknown_left_out"])
    log.info(str(summary))
    notes = [f"{n:,} by {source}" for source, n in counted["sources"].items()]
    for n, words in ((counted["without_items"], "without an item left"), (counted["repeated"], "repeat an id")):
        notes += [f"{n:,} {words}"] if n else []
    log.info(f"answers: {', '.join(notes) or 'none'}")
    log.info(f"{counted['rows']:,} recommendations in {len(counted['shards']):,} shards: {place}")
    return summary.kept


class UserTable(ShardedTable):
    """The columns of a table of users that a method reads."""

    def __init__(
        self, source: Path | Url, retriever: Retriever, method: Method = 1, answers_unknown: bool = True,
        form: TextFormat | None = None,
    ) -> None:  # fmt: skip
        """Compare the columns of all files, count their rows, and look for ids of a CSV that the bundle cannot have.

        `answers_unknown`: users with such ids get an answer. Raises DataError."""
        users, form = retriever.dataset.users, form or TextFormat()
        super().__init__(source, Reading.of(retriever.schema, "user").of_table(form), form, users.frame.schema)
        paths, schemas = [file.path for file in self.files], self.schemas
        columns = read_columns(retriever, schemas[0].names(), method)
        for path, schema in zip(paths[1:], schemas[1:], strict=True):
            for name in columns:
                if name not in schema:
                    raise DataError(
                        f"{path}: no column '{name}', which {paths[0].name} has; give all files the same columns"
                    )
            if more := [name for name in read_columns(retriever, schema.names(), method) if name not in columns]:
                raise DataError(
                    f"{path}: column '{more[0]}' is not in {paths[0].name}; give all files the same columns"
                )
        self.select(columns, "users")
        self._types = common_types(paths, [pl.Schema({name: schema[name] for name in columns}) for schema in schemas])
        is_typed = not all(path.is_text for path in paths)
        self.odd_id = None if is_typed else self._odd_id(users.ids.dtype)
        """First id of a CSV whose spelling is not that of a whole number, if the bundle's ids are whole numbers, or
        None."""
        id_type = self._types[self.columns[0]] if is_typed else users.ids.dtype
        self.id_type = pl.String() if self.odd_id is not None and answers_unknown else id_type
        """Type of the ids of answers. For a CSV: the bundle's, or text if an answered id has another spelling."""

    def read(self, shard: TableShard) -> pl.DataFrame:
        """Return the rows of a shard, for a CSV with ids as text. Raises DataError as `slices` does."""
        (frame,) = self.slices(shard, shard.rows)
        return frame if shard.file.path.is_text else with_types(shard.file.path, frame, self._types)

    def id_slices(self, rows: int) -> Iterator[pl.Series]:
        """Yield the ids of all users, at most `rows` at a time."""
        key = self.columns[0]
        for shard in self.shards(rows):
            (frame,) = self.slices(shard, rows, [key])
            yield with_types(shard.file.path, frame, {key: self._types[key]}).to_series()

    def _odd_id(self, id_type: pl.DataType) -> str | None:
        """Return the first id of a CSV whose spelling is not the text of a value of the type, or None."""
        for file in self.files:
            with table_errors(file.path):
                ids = self._scan(file).select(pl.col(self.columns[0]).alias("id"))
                is_odd = pl.col("id").cast(id_type, strict=False).cast(pl.String).ne_missing(pl.col("id"))
                odd = ids.filter(is_odd & pl.col("id").is_not_null()).head(1).collect(engine="streaming")
            if len(odd):
                return str(odd.item())
        return None
