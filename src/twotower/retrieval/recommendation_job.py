"""Answers to all users of a table, in shards that a later call continues (data/sharded_result.py): the nightly job.

The columns are user_id, rank, item_id, score, source. `_recommendations.json` has the bundle, options, files of the table, counts, and
the shards. pandas and pyarrow open the folder as one table: they leave out names that begin with an underscore.
"""

from __future__ import annotations

import logging
from collections import Counter, abc
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from twotower.data.sharded_result import MadeShard, ShardedResult, shard_name
from twotower.data.table_paths import absolute, result_place, table_source
from twotower.data.table_shards import TableShard, check_apart
from twotower.data.text_format import TextFormat
from twotower.engines import open_engine
from twotower.errors import ConfigError
from twotower.files import places
from twotower.files.places import JsonObject
from twotower.files.urls import is_url
from twotower.kinds import foreign_modules
from twotower.machine import default_threads
from twotower.progress import JobProgress, Summary
from twotower.retrieval.batches import BatchRecommender, UnknownUsers
from twotower.retrieval.recommendation_files import LIST_FILE, RECOMMENDATIONS_FORMAT, SHARD_USERS
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
    table_at, place = table_source(users), result_place(out)
    form = TextFormat.of_table(separator, columns, decimal=decimal)
    check_apart(table_at, place / shard_name(0), "users")
    if chosen.is_remote:
        table_at, place = absolute(table_at), absolute(place)
        store = store if is_url(store) else Path(store).absolute()
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
            "format": RECOMMENDATIONS_FORMAT, "bundle": bundle.id, "k": recommender.k, "method": int(method), "unknown": unknown,
            "keep_seen": recommender.keep_seen, "where": {name: str(value) for name, value in sorted((where or {}).items())},
            "ban": sorted({str(item) for item in ban}), "columns": table.columns, "shard_rows": shard_rows,
            "separator, decimal, columns": form.given, **table.states(),
        }  # fmt: skip
        result = ShardedResult(place, "recommendations", LIST_FILE, plan)
        call = _Call(result, table)
        with result.writing(overwrite):
            load = partial(_load, store, bundle.id, asked) if chosen.is_remote else lambda: recommender
            chosen.run(partial(_job, load, result, table), shards, call.add, foreign_modules(retriever.schema))
            return call.finish(retriever)


def _load(store: Path | str, bundle: str, asked: abc.Callable[[Retriever], BatchRecommender]) -> BatchRecommender:
    """Load a bundle in another process."""
    return asked(Retriever(Store(store).open(bundle), default_threads()))


def _job(
    load: abc.Callable[[], BatchRecommender], result: ShardedResult, table: UserTable
) -> abc.Callable[[TableShard], MadeShard]:
    """Return the function that makes a shard in this process. Raises RunError if it sees another folder than the call."""
    result.look()
    recommender = load()

    def make(shard: TableShard) -> MadeShard:
        def rows() -> tuple[pl.DataFrame, JsonObject]:
            answers = list(recommender.answers(table.read(shard)))
            frame = pl.concat([answer.frame for answer in answers])
            sources = sum((answer.sources for answer in answers), Counter[str]())
            return frame.with_columns(pl.col("user_id").cast(table.id_type)), {
                "users": shard.rows, "rows": frame.height, "sources": dict(sorted(sources.items())),
                "unknown": sum(answer.unknown for answer in answers), "empty": sum(answer.empty for answer in answers),
            }  # fmt: skip

        return result.make(shard.number, rows)

    return make


class _Call:
    """Collects the shards of a call, and writes the list of them."""

    def __init__(self, result: ShardedResult, table: UserTable) -> None:
        self._result, self._table, self._made = result, table, list[MadeShard]()
        self._progress = JobProgress(log, "users answered", table.rows)

    def add(self, made: MadeShard) -> None:
        """Count a finished shard."""
        self._made.append(made)
        count = self._progress.advance if made.is_new else self._progress.skip
        count(made.facts["users"])

    def finish(self, retriever: Retriever) -> int:
        """Write the list of all shards, and log its counts; return the number of users with an answer."""
        before, facts = places.read_json(self._result.place / LIST_FILE) or {}, self._counts()
        is_counted = (
            all(before.get(key) == value for key, value in facts.items()) and type(before.get("repeated")) is int
        )
        facts["repeated"] = before["repeated"] if is_counted else self._count_repeated(retriever)
        self._table.check_unchanged()
        self._result.finish(self._made, {"twotower": __version__} | facts)
        summary = Summary("users", facts["users"])
        summary.drop("unknown to the bundle", facts["unknown_left_out"])
        log.info(str(summary))
        notes = [f"{n:,} by {source}" for source, n in facts["sources"].items()]
        for n, words in ((facts["without_items"], "without an item left"), (facts["repeated"], "repeat an id")):
            notes += [f"{n:,} {words}"] if n else []
        log.info(f"answers: {', '.join(notes) or 'none'}")
        log.info(f"{facts['rows']:,} recommendations in {len(self._made):,} shards: {self._result.place}")
        return summary.kept

    def _counts(self) -> JsonObject:
        """Return what the list says about the shards, but the number of repeated ids."""
        self._made.sort()
        all_facts = [made.facts for made in self._made]
        sources = sum((Counter[str](facts["sources"]) for facts in all_facts), Counter[str]())
        return {
            "users": self._table.rows, "rows": sum(facts["rows"] for facts in all_facts),
            "sources": dict(sorted(sources.items())), "unknown_left_out": sum(facts["unknown"] for facts in all_facts),
            "without_items": sum(facts["empty"] for facts in all_facts),
            "shards": [{"file": m.file, "users": m.facts["users"], "rows": m.facts["rows"]} for m in self._made],
        }  # fmt: skip

    def _count_repeated(self, retriever: Retriever) -> int:
        """Return the number of rows whose user, one of the bundle, stands in an earlier row."""
        seen, known = np.zeros(len(retriever.user_ids), np.bool_), 0
        for ids in self._table.id_slices(ID_SLICE):
            rows = UserBatch.read(retriever, ids.to_frame(), 1).rows
            rows = rows[rows >= 0]
            seen[rows] = True
            known += len(rows)
        return known - int(seen.sum())
