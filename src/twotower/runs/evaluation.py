"""Evaluation of a run, whose rankings the processes of an engine share.

A shard is some blocks of the queries of a part, ranked by the model or a baseline; its result is their best item rows.
The calling process computes the metrics and intervals of all shards, as without an engine. It also ranks by transition
counts and own counts, and cold items among themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from twotower.arrays.pieces import pieces
from twotower.arrays.types import Ints, Shaped
from twotower.data.splits import TEST, VALIDATION
from twotower.engines import open_engine
from twotower.engines.engine import JobEngine
from twotower.errors import RunError
from twotower.evaluation.baselines import BASELINES, baseline_of
from twotower.evaluation.config import EvaluationConfig, Metrics
from twotower.evaluation.factors import Scorer
from twotower.evaluation.part_evaluation import MODEL, Ranked, evaluate_model, part_of_vectors
from twotower.evaluation.ranking import EvaluationQueries, evaluation_queries
from twotower.kinds import foreign_modules
from twotower.runs import Run
from twotower.runs.shared import RunCopy, check_share
from twotower.scorers import alone

SHARD_USERS = 4_096
"""Least number of queries of a shard but the last. A shard has whole blocks: the same blocks as in one process."""


@dataclass(frozen=True)
class QueryShard:
    """Queries `start` to `stop` of a part, ranked by MODEL or one of BASELINES."""

    by: str
    part: int
    start: int
    stop: int


BestItems = tuple[QueryShard, Shaped[Ints, "q K"]]


def evaluate(
    run: Run, *, engine: str = "local", threads: int = 0, share: Path | str = "", shard_users: int = SHARD_USERS
) -> Metrics:
    """Evaluate the vectors of a run on its own validation and test parts.

    `engine` ranks the users: "local" is this process, "ray" is `threads` processes of this machine, "ray://HOST:PORT"
    is the processes of a cluster, with `threads` each. Hosts have the run at the same path, or get it through `share`,
    a prefix in a bucket such as "s3://BUCKET/RUNS", where its files stay. Raises RunError if the run has no test part
    (a model of `DSSMTrainable` or main.py has none), ConfigError for an unusable engine, or a run without a folder for
    other processes, Unavailable if the engine is lost."""
    chosen = open_engine(engine, threads)
    check_share(share, chosen)
    if not len(run.dataset.test):
        raise RunError(f"{run.folder}: this run holds no test part; score it with DSSMTrainable or main.py")
    ranked = _rank(run, chosen, shard_users, share) if chosen.is_remote else {}
    # Training learns the rows of validation after it has measured them.
    learned = run.dataset.split.from_train and run.config.train.solved
    return evaluate_model(
        run.factors_during, run.dataset, run.config.evaluation, run.metrics if learned else None, ranked=ranked,
        monitor=run.config.train.monitor, alone=alone,
    )  # fmt: skip


def _rank(run: Run, engine: JobEngine, shard_users: int, share: Path | str = "") -> dict[int, Ranked]:
    """Return the rankings of both parts by the model, and of the test part by the baselines; none of an empty part."""
    config, dataset = run.config.evaluation, run.dataset
    parts = [part for part, rows in ((VALIDATION, dataset.validation), (TEST, dataset.test)) if len(rows)]
    found, shards = dict[int, Ranked](), list[QueryShard]()
    for part in parts:
        queries, scorers = evaluation_queries(dataset, part, config), (MODEL, *(BASELINES if part == TEST else ()))
        shape = len(queries.users), min(max(config.k), queries.n_items)
        found[part] = Ranked(queries, {by: np.empty(shape, np.int64) for by in scorers})
        step = queries.block * -(-shard_users // queries.block)
        rows = [*pieces(len(queries.users), step)]
        shards += [QueryShard(by, part, some.start, some.stop) for by in scorers for some in rows]

    def add(made: BestItems) -> None:
        shard, best = made
        found[shard.part].best[shard.by][shard.start : shard.stop] = best

    job = partial(_job, RunCopy.of(run, share), dataset.digest, config)
    engine.run(job, shards, add, foreign_modules(run.config, dataset.schema))
    return found


def _job(copy: RunCopy, data: str, config: EvaluationConfig) -> Callable[[QueryShard], BestItems]:
    """Load a run in another process, and return the function that ranks the queries of a shard. Raises RunError for
    another run, or one of other data than of the digest `data`."""
    run = copy.load()
    if run.dataset.digest != data:
        what = f"{run.folder}: holds other data than the run of the call"
        raise RunError(f"{what}; evaluate a run as its folder has it, or choose `engine='local'`")
    return _Rankings(run, config).best_items


class _Rankings:
    """Ranks the queries of a run in another process. Keeps queries and scorer for the next shard."""

    def __init__(self, run: Run, config: EvaluationConfig) -> None:
        self._run, self._config = run, config
        self._queries = dict[int, EvaluationQueries]()
        self._scorer: tuple[tuple[str, int], Scorer] | None = None

    def best_items(self, shard: QueryShard) -> BestItems:
        """Return the best items of the queries of a shard."""
        dataset = self._run.dataset
        if shard.part not in self._queries:
            self._queries = {shard.part: evaluation_queries(dataset, shard.part, self._config)}
        before = shard.part if self._run.moves else part_of_vectors(dataset, shard.part)
        name = (shard.by, before)
        if self._scorer is None or self._scorer[0] != name:
            self._scorer = None  # and its memory
            made = self._run.factors_during(before) if shard.by == MODEL else baseline_of(shard.by, dataset)
            self._scorer = name, made
        queries = self._queries[shard.part].take(slice(shard.start, shard.stop))
        return shard, queries.top_k(self._scorer[1], max(self._config.k))
