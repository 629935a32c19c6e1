"""Answers to all users of a table, in shards that a later call continues: the nightly job.

part-00000.parquet      answers to the users of a shard: user_id, rank, item_id, score, source
_recommendations.json   bundle, options, files of the table, counts, and the shards; written when all are complete
_work/                  state from which a later call continues (files/sharded_work.py)

pandas and pyarrow open the folder as one table: they leave out names that begin with an underscore.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections import Counter, abc
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl

from twotower import files
from twotower.data.table_paths import table_source
from twotower.data.table_shards import TableShard, check_apart
from twotower.data.text_format import TextFormat
from twotower.errors import ConfigError, RunError, first_line
from twotower.files.readers import read_json
from twotower.files.sharded_work import JsonObject, ShardedWork, ShardFormat
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

    format: ClassVar[ShardFormat] = ShardFormat(
        RECOMMENDATIONS_FORMAT,
        "recommendations",
        WORK_FOLDER,
        LIST_FILE,
        re.compile(r"part-\d+\.parquet"),
        {
            "bundle": "of another bundle",
            "k": "of another length (`k`)",
            "method": "by another `method`",
            "unknown": "with another choice of `unknown`",
            "keep_seen": "with another choice of `keep_seen`",
            "where": "with other conditions (`where`)",
            "ban": "without other items (`ban`)",
            "columns": "of other columns of the table",
            "shard_rows": "in shards of another size (`shard_rows`)",
            "form": "of text read with another `separator` or other `columns`",
        },
    )


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
    threads: int = 0,
    separator: str = "",
    columns: abc.Sequence[str] = (),
) -> int:
    """Write the `k` best items for each user of the table `users` into the folder `out`, from the current bundle of a store, and
    return the number of users with an answer.

    `users` is a text (.csv, .tsv, .txt) or Parquet file, a folder of them, or a pattern such as "users/*.parquet", of any size; its columns and the
    options are those of `recommend_batch`. A shard of up to `shard_rows` users of a file (fewer with a large `k`) is one Parquet
    file; _recommendations.json, written last, has the counts. A later call continues with the shards that are missing or damaged;
    several calls at once share them. The bundle is kept from `gc` meanwhile. `threads` is 0 for OMP_NUM_THREADS, else all cores.
    `separator` is the character between the values of text files, "" the one of their ending; `columns` are the names of their
    columns, if their first lines do not name them.

    Raises DataError if the table does not fit, changes meanwhile or, with `unknown` "error", has unknown users; RunError if `out`
    lies in the folder `users` or holds other files, a file of the table, or, without `overwrite`, recommendations of another bundle,
    table or options; ConfigError for an unusable argument; Unavailable.
    """
    if shard_rows < 1:
        raise ConfigError(f"`shard_rows` is {shard_rows}, expected at least 1")
    if threads < 0:
        raise ConfigError(f"`threads` is {threads}, expected at least 0")
    table_at, out, form = table_source(users), Path(out), TextFormat.of_table(separator, columns)
    check_apart(table_at, out / shard_file(0), "users")
    bundle = Store(store).current()
    with bundle.lease():
        retriever = Retriever(bundle, threads or default_threads())
        asked = BatchRecommender(retriever, k, method, unknown=unknown, ban=ban, where=where, keep_seen=keep_seen)
        table = UserTable(table_at, retriever, method, answers_unknown=method == 2 or unknown == "popular", form=form)
        log.info(f"bundle {bundle.id}: {table.rows:,} users, read by {', '.join(table.columns)}")
        if table.odd_id is not None:
            theirs = retriever.dataset.users.ids.dtype
            log.info(
                f"the id '{table.odd_id}' is no {theirs}, as those of the bundle are; the answers have {table.id_type}"
            )
        shard_rows = min(shard_rows, max(1, SHARD_MAX_ITEMS // asked.k))
        shards = table.shards(shard_rows)
        plan: JsonObject = {
            "bundle": bundle.id, "k": asked.k, "method": int(method), "unknown": unknown, "keep_seen": asked.keep_seen,
            "where": {name: str(value) for name, value in sorted((where or {}).items())},
            "ban": sorted({str(item) for item in ban}), "columns": table.columns, "shard_rows": shard_rows,
            "table": table.states, "form": form.given,
        }  # fmt: skip
        with (
            RecommendationWork.begin(out, plan, len(shards), overwrite) as work,
            tempfile.TemporaryDirectory(dir=work.folder, prefix="shard-text-") as scratch,
        ):
            job = _Job(work, table, asked, retriever, Path(scratch))
            job.make(shards)
            return job.finish()


class _Job:
    """Makes the shards of one folder."""

    def __init__(
        self, work: RecommendationWork, table: UserTable, asked: BatchRecommender, retriever: Retriever, scratch: Path
    ) -> None:
        self._work, self._table, self._asked, self._retriever, self._scratch = work, table, asked, retriever, scratch
        self._progress = JobProgress(log, "users answered", table.rows)

    def make(self, shards: list[TableShard]) -> None:
        """Make the shards that are missing or damaged, and then those that other processes have left."""
        for shard in shards:
            if not self._make_shard(shard, verify=True) and self._work.record(shard.number):
                self._progress.skip(shard.rows or 0)
        while any(self._make_shard(s, verify=False) for s in reversed(shards) if not self._work.record(s.number)):
            pass

    def _make_shard(self, shard: TableShard, verify: bool) -> bool:
        """Make a shard, unless it is finished or another process makes it; return True if it was made."""
        with self._work.unfinished(shard.number, verify) as folder:
            if folder is None:
                return False
            answers = list(self._asked.answers(self._table.read(shard, self._scratch)))
            files.point(f"shard:{shard.number}")
            frame = pl.concat([answer.frame for answer in answers])
            frame = frame.with_columns(pl.col("user_id").cast(self._table.id_type))
            name = shard_file(shard.number)
            _write(frame, folder / name)
            sources = sum((answer.sources for answer in answers), Counter[str]())
            facts: JsonObject = {
                "users": shard.rows, "rows": frame.height, "sources": dict(sorted(sources.items())),
                "unknown": sum(answer.unknown for answer in answers), "empty": sum(answer.empty for answer in answers),
            }  # fmt: skip
            self._work.publish_files(shard.number, folder, {name: name}, facts)
        self._progress.advance(shard.rows or 0)
        return True

    def finish(self) -> int:
        """Write the list of shards if all are finished, and log its counts; return the number of users with an answer."""
        work, path = self._work, self._work.out / LIST_FILE
        with work.locked():
            records = work.records()
            if len(records) < work.shards:
                log.info(f"{work.shards - len(records):,} shards are made by other calls: {work.out}")
                return sum(Counter(r["sources"]).total() for r in records)
            if not path.exists():
                counts = self._counts(records)
                self._table.check_unchanged()
                work.write_list(work.plan | {"twotower": __version__} | counts)
            facts: JsonObject = read_json(path)
        summary = Summary("users", facts["users"])
        summary.drop("unknown to the bundle", facts["unknown_left_out"])
        log.info(str(summary))
        notes = [f"{n:,} by {source}" for source, n in facts["sources"].items()]
        for n, words in ((facts["without_items"], "without an item left"), (facts["repeated"], "repeat an id")):
            notes += [f"{n:,} {words}"] if n else []
        log.info(f"answers: {', '.join(notes) or 'none'}")
        log.info(f"{facts['rows']:,} recommendations in {len(records):,} shards: {work.out}")
        return summary.kept

    def _counts(self, records: list[JsonObject]) -> JsonObject:
        """Return what the list says about the shards of some records."""
        sources = sum((Counter[str](r["sources"]) for r in records), Counter[str]())
        return {
            "users": self._table.rows, "rows": sum(r["rows"] for r in records),
            "sources": dict(sorted(sources.items())), "unknown_left_out": sum(r["unknown"] for r in records),
            "without_items": sum(r["empty"] for r in records), "repeated": self._count_repeated(),
            "shards": [{"file": r["files"][0][0], "users": r["users"], "rows": r["rows"]} for r in records],
        }  # fmt: skip

    def _count_repeated(self) -> int:
        """Return the number of rows whose user, one of the bundle, stands in an earlier row."""
        seen, known = np.zeros(len(self._retriever.user_ids), np.bool_), 0
        for ids in self._table.id_slices(self._scratch, ID_SLICE):
            rows = UserBatch.read(self._retriever, ids.to_frame(), 1).rows
            rows = rows[rows >= 0]
            seen[rows] = True
            known += len(rows)
        return known - int(seen.sum())


def _write(frame: pl.DataFrame, path: Path) -> None:
    try:
        frame.write_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as e:
        raise RunError(f"{path}: cannot be written ({first_line(e)}); free some space, then call again to go on") from e
