"""Answers to all users of a table, in shards that a later call continues: the nightly job.

part-00000.parquet      answers to the users of a shard: user_id, rank, item_id, score, source
_recommendations.json   bundle, options, files of the table, counts, and the shards; written when all are complete
_work/                  state from which a later call continues (files/sharded_work.py)

pandas and pyarrow open the folder as one table: they leave out names that begin with an underscore.
"""

from __future__ import annotations

import logging
from collections import Counter, abc
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from twotower import files
from twotower.data.table_paths import absolute, table_source
from twotower.data.table_shards import TableShard, check_apart
from twotower.data.text_format import TextFormat
from twotower.engines import open_engine
from twotower.errors import ConfigError, RunError
from twotower.files.readers import write_parquet
from twotower.files.scratch import scratch_folder
from twotower.files.shard_folders import shard_folder
from twotower.files.sharded_work import JsonObject, MadeShard, ShardedWork
from twotower.files.urls import is_url
from twotower.kinds import foreign_modules
from twotower.machine import default_threads
from twotower.progress import JobProgress, Summary
from twotower.retrieval.batches import BatchRecommender, UnknownUsers
from twotower.retrieval.recommendation_files import (
    LIST_FILE,
    RECOMMENDATIONS_FORMAT,
    SHARD_USERS,
    WORK_FOLDER,
    shard_file,
)
from twotower.retrieval.request import Method
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_batch import UserBatch
from twotower.retrieval.user_table import UserTable
from twotower.store.store import Store
from twotower.version import __version__

log = logging.getLogger(__name__)

SHARD_MAX_ITEMS = 2**22
"""Greatest number of recommended items of a shard, which are in memory together; with many items a user, shards have fewer
users."""
ID_SLICE = 2**16
"""Ids that are counted at a time."""


class RecommendationWork(ShardedWork):
    """The work of one process in a folder of recommendations."""

    version, noun, work_folder, list_file = RECOMMENDATIONS_FORMAT, "recommendations", WORK_FOLDER, LIST_FILE
    shard_files = r"part-\d+\.parquet"


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
    """Write the `k` best items for each user of the table `users` into the folder `out`, on a disk or at a URL of an object store, from
    the current bundle of a store, and return the number of users with an answer.

    `users` is a text (.csv, .tsv, .txt) or Parquet file, a folder of them, or a pattern such as "users/*.parquet", of any size; its columns and the
    options are those of `recommend_batch`. A shard of up to `shard_rows` users of a file (fewer with a large `k`) is one Parquet
    file; _recommendations.json, written last, has the counts. A later call continues with the shards that are missing or damaged.
    The bundle is kept from `gc` meanwhile. `engine` is "local" (this process, with `threads`), "ray" (`threads` processes of this
    machine) or "ray://HOST:PORT" (those of a cluster, with `threads` each); `threads` is 0 for OMP_NUM_THREADS, else all cores.
    `separator` is the character between the values of text files, "" the one of their ending; `columns` are the names of their
    columns, if their first lines do not name them; `decimal` is the mark of their numbers, "." or ",".

    Raises DataError if the table does not fit, changes meanwhile or, with `unknown` "error", has unknown users; RunError if `out`
    lies in the folder `users` or holds other files, a file of the table, or, without `overwrite`, recommendations of another bundle,
    table or options, or is written by another call; ConfigError for an unusable argument; Unavailable.
    """
    if shard_rows < 1:
        raise ConfigError(f"`shard_rows` is {shard_rows}, expected at least 1")
    if threads < 0:
        raise ConfigError(f"`threads` is {threads}, expected at least 0")
    chosen = open_engine(engine, threads)
    table_at, place, form = (
        table_source(users),
        table_source(out),
        TextFormat.of_table(separator, columns, decimal=decimal),
    )
    check_apart(table_at, place / shard_file(0), "users")
    if chosen.is_remote:
        table_at, place = absolute(table_at), absolute(place)
        store = store if is_url(store) else Path(store).absolute()
    at = shard_folder(place)
    bundle = Store(store).current()
    with bundle.lease():
        retriever = Retriever(bundle, threads or default_threads())
        asked = partial(
            BatchRecommender, k=k, method=method, unknown=unknown, ban=tuple(ban), where=dict(where or {}), keep_seen=keep_seen
        )  # fmt: skip
        recommender = asked(retriever)
        table = UserTable(table_at, retriever, method, answers_unknown=method == 2 or unknown == "popular", form=form)
        log.info(f"bundle {bundle.id}: {table.rows:,} users, read by {', '.join(table.columns)}")
        if table.odd_id is not None:
            theirs = retriever.dataset.users.ids.dtype
            log.info(
                f"the id '{table.odd_id}' is no {theirs}, as those of the bundle are; the answers have {table.id_type}"
            )
        shard_rows = min(shard_rows, max(1, SHARD_MAX_ITEMS // recommender.k))
        shards = table.shards(shard_rows)
        plan: JsonObject = {
            "bundle": bundle.id, "k": recommender.k, "method": int(method), "unknown": unknown, "keep_seen": recommender.keep_seen,
            "where": {name: str(value) for name, value in sorted((where or {}).items())},
            "ban": sorted({str(item) for item in ban}), "columns": table.columns, "shard_rows": shard_rows,
            "table": [file.state() for file in table.files], "separator, decimal, columns": form.given,
        }  # fmt: skip
        with (
            RecommendationWork.begin(at, plan, overwrite) as work,
            work.scratch("text") as scratch,
        ):
            call = _Call(work, table, scratch)
            shared = scratch if isinstance(place, Path) else None
            here = _AnswersMaker(recommender, table, work, scratch)
            job = (
                partial(_load, store, bundle.id, asked, table, work, shared) if chosen.is_remote else lambda: here.make
            )
            chosen.run(job, shards, call.add, foreign_modules(retriever.schema))
            return call.finish(len(shards), retriever)


def _load(
    store: Path | str,
    bundle: str,
    asked: abc.Callable[[Retriever], BatchRecommender],
    table: UserTable,
    work: RecommendationWork,
    shared: Path | None,
) -> abc.Callable[[TableShard], MadeShard]:
    """Load a bundle in another process, and return the function that makes a shard. `shared` is a folder of all hosts, None without one.
    Raises RunError if the folder is another one."""
    work.check_seen()
    recommender = asked(Retriever(Store(store).open(bundle), default_threads()))
    held = ExitStack()
    scratch = held.enter_context(work.scratch("text") if shared is None else scratch_folder(shared, "text"))
    return _AnswersMaker(recommender, table, work, scratch, held).make


@dataclass(frozen=True)
class _AnswersMaker:
    """Makes shards in a process; text files are copied as Parquet into `scratch`, which is removed with `held`."""

    recommender: BatchRecommender
    table: UserTable
    work: RecommendationWork
    scratch: Path
    held: ExitStack | None = None

    def make(self, shard: TableShard) -> MadeShard:
        """Return a shard, which is made unless it is there and intact."""
        return self.work.make(shard.number, partial(self._write, shard))

    def _write(self, shard: TableShard, folder: Path) -> JsonObject:
        answers = list(self.recommender.answers(self.table.read(shard, self.scratch)))
        files.point(f"shard:{shard.number}")
        frame = pl.concat([answer.frame for answer in answers])
        frame = frame.with_columns(pl.col("user_id").cast(self.table.id_type))
        try:
            write_parquet(frame, path := folder / shard_file(shard.number))
        except OSError as e:
            raise RunError(f"{path}: cannot be written ({e}); free some space, then call again to go on") from e
        sources = sum((answer.sources for answer in answers), Counter[str]())
        return {
            "users": shard.rows, "rows": frame.height, "sources": dict(sorted(sources.items())),
            "unknown": sum(answer.unknown for answer in answers), "empty": sum(answer.empty for answer in answers),
        }  # fmt: skip


class _Call:
    """Collects the shards of a call, and writes the list of them."""

    def __init__(self, work: RecommendationWork, table: UserTable, scratch: Path) -> None:
        self._work, self._table, self._scratch = work, table, scratch
        self._progress = JobProgress(log, "users answered", table.rows)
        self._records: dict[int, JsonObject] = {}

    def add(self, made: MadeShard) -> None:
        """Count a finished shard."""
        made.log_damage()
        self._records[made.number] = made.record
        count = self._progress.advance if made.is_new else self._progress.skip
        count(made.record["users"])

    def finish(self, shards: int, retriever: Retriever) -> int:
        """Write the list of all shards, and log its counts; return the number of users with an answer."""
        work = self._work
        records = [self._records[number] for number in range(shards)]
        facts, told = work.read_list() or {}, work.plan | self._counts(records)
        if type(facts.get("repeated")) is not int or any(facts.get(key) != value for key, value in told.items()):
            repeated = self._count_repeated(retriever)
            self._table.check_unchanged()
            work.write_list(facts := told | {"twotower": __version__, "repeated": repeated})
        summary = Summary("users", facts["users"])
        summary.drop("unknown to the bundle", facts["unknown_left_out"])
        log.info(str(summary))
        notes = [f"{n:,} by {source}" for source, n in facts["sources"].items()]
        for n, words in ((facts["without_items"], "without an item left"), (facts["repeated"], "repeat an id")):
            notes += [f"{n:,} {words}"] if n else []
        log.info(f"answers: {', '.join(notes) or 'none'}")
        log.info(f"{facts['rows']:,} recommendations in {len(records):,} shards: {work.at}")
        return summary.kept

    def _counts(self, records: list[JsonObject]) -> JsonObject:
        """Return what the list says about the shards of some records, but the number of repeated ids."""
        sources = sum((Counter[str](r["sources"]) for r in records), Counter[str]())
        return {
            "users": self._table.rows, "rows": sum(r["rows"] for r in records),
            "sources": dict(sorted(sources.items())), "unknown_left_out": sum(r["unknown"] for r in records),
            "without_items": sum(r["empty"] for r in records),
            "shards": [{"file": r["files"][0][0], "users": r["users"], "rows": r["rows"]} for r in records],
        }  # fmt: skip

    def _count_repeated(self, retriever: Retriever) -> int:
        """Return the number of rows whose user, one of the bundle, stands in an earlier row."""
        seen, known = np.zeros(len(retriever.user_ids), np.bool_), 0
        for ids in self._table.id_slices(self._scratch, ID_SLICE):
            rows = UserBatch.read(retriever, ids.to_frame(), 1).rows
            rows = rows[rows >= 0]
            seen[rows] = True
            known += len(rows)
        return known - int(seen.sum())
