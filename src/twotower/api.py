"""Main functions of the package: read, prepare, train, evaluate, publish, recommend."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias, Unpack, overload
from uuid import UUID

import numpy as np
import polars as pl
import torch

from twotower import runs
from twotower.arrays.pieces import pieces
from twotower.arrays.types import UserRow
from twotower.config.experiment import Config
from twotower.config.scorers import with_scorers
from twotower.data import prepare
from twotower.data.buckets import Buckets
from twotower.data.buckets.check import check_buckets
from twotower.data.config import check_lone_options
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.ids import IdColumn, TextColumn
from twotower.data.memmap import MemmapDataset
from twotower.data.prepare.options import PrepareOptions
from twotower.data.reading.readers import TableLike, as_frame
from twotower.data.source import read
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import Tables, check, with_ids
from twotower.data.whole import check_whole, whole_of
from twotower.distributed import DistributedContext, choose_device
from twotower.embedding.bulk import embed
from twotower.errors import ConfigError, DataError, Interrupted, RunError, first_line
from twotower.escaping import python_literal
from twotower.evaluation.factors import Factors, Scorer
from twotower.evaluation.part_evaluation import evaluate_model
from twotower.features.schema import Schema
from twotower.files import layout
from twotower.files.urls import is_url
from twotower.index import build_index
from twotower.kinds import CODE_OF
from twotower.machine import peak_memory_mb
from twotower.progress import StatusLine, is_notebook
from twotower.publishing.backtest import Schedule, measure_folds
from twotower.publishing.bundle_evaluation import evaluate_bundle
from twotower.publishing.challenge import Beat
from twotower.publishing.publisher import publish
from twotower.reports import pages
from twotower.reports.backtest import Backtest
from twotower.reports.progress import Progress
from twotower.retrieval.batches import BLOCK_ITEMS, BLOCK_USERS, SOURCES, answer_frame
from twotower.retrieval.catalogue import Catalogue, Popularity
from twotower.retrieval.recommendation_job import recommend_users
from twotower.retrieval.request import Answer, checked_k
from twotower.retrieval.retriever import current_retriever
from twotower.runs import Run, load
from twotower.runs.evaluation import evaluate
from twotower.runs.folder import is_complete, locked, replace_run, writing_folder
from twotower.scorers import alone
from twotower.suggestion.roles import RoleColumns
from twotower.suggestion.suggest import suggest
from twotower.train.checkpoint import shared_checkpoint
from twotower.train.preconditions import check_times
from twotower.train.progress import Callback, EpochRecord
from twotower.train.recipe import Recipe
from twotower.train.refit import Refit
from twotower.train.trainer import Trainer

__all__ = [
    "Beat", "Schedule", "append_segment", "backtest", "check_buckets", "embed", "evaluate", "evaluate_bundle", "fit",
    "is_store", "load", "prepare_folder", "publish", "read", "recent_titles", "recommend", "recommend_users",
    "retriever", "suggest", "write_buckets",
]  # fmt: skip

ThreeTables: TypeAlias = "tuple[TableLike | None, TableLike | None, TableLike]"
"""Users, items and interactions."""
ONE_ID = (str, int, np.integer, UUID)
"""Types of one id."""

log = logging.getLogger(__name__)
retriever = current_retriever


def is_store(path: Path | str) -> bool:
    """Return True for a folder of published bundles, and for a URL, which no run has."""
    return is_url(path) or (Path(path) / layout.BUNDLES).is_dir()


def prepare_folder(
    config: Config, schema: Schema | None, out: Path | str, options: PrepareOptions | None = None
) -> Dataset:
    """Prepare the Parquet shards or the buckets of `config.data`, of any size, for training, in the folder `out`.

    After a kill the next call continues. Raises DataError, which leaves no files, ConfigError, RunError."""
    schema, config = with_scorers(schema or Schema(), config)
    check_times(schema, config.split, config)
    dataset = prepare.write_prepared(config.data, schema, config.split, Path(out), options)
    log.info(f"{dataset.describe()}: {out}")
    return dataset


def write_buckets(
    config: Config, schema: Schema | None, out: Path | str, options: PrepareOptions | None = None
) -> Buckets:
    """Write the Parquet shards of `config.data` as buckets (docs/prepared-format.md) in the folder `out`.

    Raises the errors of `prepare_folder`."""
    buckets = prepare.write_buckets(config.data, schema or Schema(), Path(out), options, config.split)
    log.info(f"{buckets.facts.rows:,} interactions in {len(buckets.facts.buckets):,} buckets: {out}")
    return buckets


def append_segment(
    config: Config, schema: Schema | None, new: Path | str, options: PrepareOptions | None = None
) -> Buckets:
    """Add the interactions `new`, a file, a folder or a pattern, to the folder `config.data.buckets`, as a segment.

    The users and items are those of `config.data`, as they are now. `prepare_folder` then reads the whole folder.
    Raises DataError, ConfigError, RunError; the folder is then unchanged."""
    return prepare.append_segment(config.data, schema or Schema(), config.split, new, options)


def fit(
    tables: TableLike | ThreeTables | Tables | Dataset,
    schema: Schema | None = None,
    config: Config | None = None,
    *,
    overrides: Iterable[str] = (),
    folder: str | Path | None = None,
    resume: bool = False,
    override: bool = False,
    overwrite: bool = False,
    callback: Callback | None = None,
    **columns: Unpack[RoleColumns],
) -> Run:
    """Train a two-tower model on a table of interactions, (users, items, interactions), or a prepared dataset, and
    evaluate it.

    A table is a polars or pandas frame, an object with an Arrow stream, or a path to CSV or Parquet; users and items
    may be None. Without a schema `suggest` makes schema and config: `tables` may then be all that `suggest` takes, such
    as a folder, `overrides` are settings such as "train.lr=0.01", and `columns` name columns by role, such as
    user="customer". A config without a schema is refused. Under torchrun all ranks train together; the main rank
    evaluates and writes.

    The run is written to `folder`, by one process or job at a time; a complete run stays until the new one is complete.
    `resume` continues from the newest undamaged checkpoint, or starts without one; `override` resumes although settings
    or data have changed; `overwrite` replaces a run in the folder. `callback` is called after each step and epoch; None
    shows the progress in a notebook. Messages go to the logger "twotower". Raises DataError, ConfigError, RunError or
    TrainingError."""
    context = DistributedContext.from_environment()
    shown = is_notebook() and callback is None
    callback = callback or (Progress(ends_process=False) if shown else Callback())
    folder = Path(folder) if folder is not None else None
    with ExitStack() as held:
        held.enter_context(StatusLine.on(sys.stdout if shown else None))
        callback.on_phase("reading", config or Config())
        if folder and context.is_main:
            held.enter_context(locked(folder))
        if folder and not (resume or overwrite) and (folder / layout.ENCODERS).exists():
            raise RunError(f"{folder}: holds a run already; pass `resume=True` to go on, or choose another `folder`")
        if ((overrides := [*overrides]) or columns) and (schema is not None or isinstance(tables, Dataset)):
            raise ConfigError(
                "`overrides` are settings for what is suggested without a schema, as names of columns are; change the "
                "config"
            )
        if isinstance(tables, Dataset):
            schema = schema or tables.schema
        else:
            tables = tables if isinstance(tables, Tables) else _three(tables)
            if schema is None:
                tables, schema, config = _suggested(tables, config, overrides, columns)
        schema, config = with_scorers(schema, config or Config())
        if not resume:
            check_lone_options(schema, config.split)
        whole = None
        if isinstance(tables, Dataset):
            tables.check(schema, config.split)
            dataset = tables.with_schema(schema)
            if config.train.refit:
                check_whole(dataset)
                whole = partial(whole_of, dataset)
        else:
            check_times(schema, config.split, config)
            if not isinstance(tables, Tables):
                tables = check(*tables, schema)
                for note in tables.notes:
                    log.info(note)
            dataset = build_dataset(tables, schema, config.split)
            if config.train.refit:
                whole = partial(build_dataset, tables, schema, dataset.split, whole=True)
        del tables
        log.info(dataset.describe())
        for line in dataset.describe_features():
            log.info(line)
        config = config.model_copy(update={"split": dataset.split})
        return _train(dataset, config, context, folder, callback, resume, override, whole)


def _three(tables: TableLike | tuple[TableLike | None, ...]) -> ThreeTables:
    """Return users, items and interactions. Raises DataError."""
    given = tables if isinstance(tables, tuple) else (None, None, tables)
    if len(given) != 3 or given[2] is None:
        found = ", ".join("None" if table is None else type(table).__name__ for table in given)
        raise DataError(f"tables: found ({found}), expected one table of interactions, or (users, items, interactions)")
    return given[0], given[1], given[2]


def _suggested(
    tables: ThreeTables | Tables, config: Config | None, overrides: list[str], columns: RoleColumns
) -> tuple[ThreeTables | Tables, Schema, Config]:
    """Return the tables with the schema and the config of `suggest`. Raises ConfigError for a config."""
    if config is not None or isinstance(tables, Tables):
        raise ConfigError(
            f"schema is missing: {'checked tables have' if config is None else 'a config goes with'} one; pass it too, "
            "or leave out both and change what is suggested: twotower.fit(clicks, overrides=['train.lr=0.01'])"
        )
    users, items, interactions = tables
    if isinstance(interactions, str | Path):
        found = suggest(interactions, users, items, overrides=overrides, **columns)
        read_tables, _ = read(found.config, found.schema)  # the config names the files and their form
        assert isinstance(read_tables, Tables)
        tables = read_tables
    else:
        interactions = as_frame(interactions, "interactions")  # most streams can be read once
        found = suggest(interactions, users, items, overrides=overrides, **columns)
        tables = found.tables.get("users", users), found.tables.get("items", items), interactions
    for line in found.reasons:
        log.info(line)
    return tables, found.schema, found.config


def _train(
    dataset: Dataset, config: Config, context: DistributedContext, folder: Path | None, callback: Callback,
    resume: bool, override: bool, whole: Callable[[], Dataset] | None,
) -> Run:  # fmt: skip
    device = choose_device(config.train.device, context.local_rank)
    with (
        context.process_group(device.type, config.train.timeout, always=config.train.embedding_placement == "torchrec"),
        ExitStack() as held,
    ):
        place, caller = writing_folder(folder) if folder else None, callback
        callback = _HistoryWriter(place, callback) if context.is_main else Callback()
        checkpoints = place / layout.CHECKPOINTS if place else None
        found = None
        if resume and folder and checkpoints:
            found = held.enter_context(shared_checkpoint(context, (checkpoints, folder / layout.CHECKPOINTS)))
        if resume and found is None:
            check_lone_options(dataset.schema, dataset.split)
        earlier = found.fingerprint.get("train.precision") if found else None
        trainer = Trainer(dataset, config, checkpoints, callback, context, device, earlier)
        assert isinstance(trainer.recipe, Config)  # the config, settled
        config = trainer.recipe
        trainer.checkpoints.fingerprint = runs.fingerprint(dataset, config)
        if folder and place:
            if found:
                trainer.resume(override, found)
                log.info(f"resuming after step {trainer.progress.step}")
            elif resume and is_complete(folder):
                raise RunError(f"{folder}: a complete run without a checkpoint to go on from; choose another `folder`")
            elif resume:
                log.info("no checkpoint to resume from; starting")
            here = (trainer.checkpoints.fingerprint, trainer.progress.step)
            differing = context.all_reduce_sum(float(here != context.broadcast(here)))[0]
            if differing:  # no rank writes before all have compared
                raise RunError(
                    f"{folder}: the ranks see other settings, data or versions of the libraries; all need the same ones"
                )
            if context.is_main:
                runs.start_run(place, dataset, config, found.path.parent if found else None, resume)
        resumed = found is not None
        del found
        held.close()  # the tensors are in the model
        with _resume_hint(place, folder, trainer):
            trained = trainer.run()
        refitted = None
        if whole:
            callback.on_phase("refit", config)
            refitted = _refit(trainer, whole, place, folder, caller, resume)
    if place and context.is_main and isinstance(dataset, MemmapDataset):  # its source may be removed or replaced
        dataset = replace(dataset, folder=place / layout.PREPARED)
    done = Run(folder, config, dataset, trained.model.eval(), trained.metrics, trained.history)
    if not context.is_main:
        return done
    best = None
    # Earlier epochs of a resumed run may have other settings of `evaluation`; fits to validation follow the last epoch.
    if not resumed and not config.fitted_last:
        best = next((e for e in trained.history if e["epoch"] == trained.metrics["train.best_epoch"]), None)
    best = {m: v for m, v in trained.metrics.items() if m.startswith("validation.")} or best
    factors_of: Callable[[int], Scorer] = lru_cache(1)(done.factors_during)  # the report shows those of the test part
    callback.on_phase("evaluation", config)
    with _resume_hint(place, folder, trainer), trainer.stoppable("in the evaluation"):
        metrics = evaluate_model(
            factors_of, dataset, config.evaluation, best, monitor=config.train.monitor, alone=alone
        )
        metrics |= trained.metrics
    metrics["train.peak_memory_mb"] = peak_memory_mb()
    done = replace(done, metrics=metrics)
    if refitted and refitted.folder:
        runs.save_run(refitted.folder, replace(refitted, metrics=metrics | refitted.metrics))
    if folder and place:
        done = replace(done, sha256=runs.save_run(place, done))
        replace_run(folder)
        if isinstance(dataset, MemmapDataset):
            done = replace(done, dataset=replace(dataset, folder=folder / layout.PREPARED))
            factors_of = done.factors_during  # of the files where they are now
        try:
            pages.write_report(folder / layout.REPORT, done, factors_of(TEST))
        except Exception as e:  # the run is complete without it
            log.warning(f"no report.html ({first_line(e)})")
    return done


def _refit(
    first: Trainer, whole: Callable[[], Dataset], place: Path | None, folder: Path | None, callback: Callback,
    resume: bool,
) -> Run:  # fmt: skip
    """Train again on all rows, with what an ended training has chosen. Return the run, whose metrics are not saved."""
    context, dataset = first.context, whole()
    log.info(f"refit: {first.best.epoch} epochs on all {len(dataset.pairs):,} rows")
    home = place / layout.REFIT if place else None
    callback = _HistoryWriter(home, callback) if context.is_main else Callback()
    again = Refit(first, dataset, home / layout.CHECKPOINTS if home else None, callback)
    assert isinstance(first.recipe, Config)
    if home and folder and place:
        again.checkpoints.fingerprint = runs.fingerprint(dataset, first.recipe) | {"refit": again.chosen}
        places = (home / layout.CHECKPOINTS, folder / layout.REFIT / layout.CHECKPOINTS)
        with shared_checkpoint(context, places if resume else ()) as found:
            if found and found.fingerprint != again.checkpoints.fingerprint:
                log.info("the refit starts anew: what it is to train has changed")
                found = None
            if found:
                again.resume(checkpoint=found)
                log.info(f"resuming the refit after step {again.progress.step}")
            if context.is_main:
                home.mkdir(exist_ok=True)
                runs.start_run(home, dataset, first.recipe, found.path.parent if found else None, resume)
    with _resume_hint(place, folder, again):
        trained = again.run()
    return Run(home, first.recipe, dataset, trained.model.eval(), trained.metrics, trained.history)


@contextmanager
def _resume_hint(place: Path | None, folder: Path | None, trainer: Trainer) -> Iterator[None]:
    """Add to the message of Interrupted the call that resumes the training that writes to `place`, for `folder`."""
    try:
        yield
    except Interrupted as e:
        if place and folder:
            how = f"config={python_literal(place / layout.CONFIG)}, folder={python_literal(folder)}, resume=True"
            if any(name.startswith(CODE_OF) for name in trainer.checkpoints.fingerprint):
                how += ", trust=True"
            e.args = (f"{e}; go on: `fit({how})`",)
        raise


class _HistoryWriter(Callback):
    """Callback that writes history.jsonl after each epoch, and passes all calls to the caller's callback."""

    def __init__(self, folder: Path | None, callback: Callback) -> None:
        self.folder, self.callback, self.ends_process = folder, callback, callback.ends_process

    def on_phase(self, name: str, recipe: Recipe, epochs: int = 0) -> None:
        self.callback.on_phase(name, recipe, epochs)

    def on_value(self) -> None:
        self.callback.on_value()

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        self.callback.on_step_end(done, total, loss)

    def on_epoch_end(self, history: list[EpochRecord]) -> None:
        if self.folder:
            runs.save_history(self.folder, history)
        self.callback.on_epoch_end(history)


def backtest(
    tables: Tables, schema: Schema, config: Config, out: str | Path, schedule: Schedule = Schedule(), *,
    latest: bool = False, callback: Callback | None = None,
) -> Backtest:  # fmt: skip
    """Train on the past of each cut of a log, publish the run into a store of its own, and ask the retriever for each
    user of the period after the cut; beside it baselines of the same past rank the same items.

    Users and items are those with a row before the cut; rows of other items are counted and not measured. `latest` is
    that of `publish`. A second call with the same arguments goes on after a kill. The folder `out` receives the values
    of users and a page. Raises the errors of `fit` and `publish`, DataError for a fold without rows, RunError for a
    folder of something else."""

    def train(past: Tables, folder: Path) -> Run:
        return fit(past, schema, config, folder=folder, resume=True, callback=callback)

    return measure_folds(tables, schema, config, Path(out), schedule, latest, train)


def log_of(run: Run) -> Tables | bool:
    """Return the tables of the log of a run as they are now; True if its config names none, or a prepared dataset.

    Raises the errors of `read`."""
    data = run.config.data
    if data.prepared or not (data.interactions or data.parts or data.dataset):
        return True
    tables, _ = read(run.config, run.dataset.schema)
    return tables if isinstance(tables, Tables) else True


def recent_titles(trained: Run, user_id: str | int, n: int = 5) -> list[str]:
    """Return the titles of the user's last `n` positives in the train part, latest first."""
    dataset = trained.dataset
    of_user = dataset.pairs.user == _user_row(dataset, user_id)
    keep = dataset.sort_by_time((dataset.parts == TRAIN) & dataset.pairs.target & of_user)
    titles = dataset.titles()
    return [titles[i] for i in dataset.pairs.item[keep[::-1][:n]]]


@overload
def recommend(  # type: ignore[overload-overlap]
    trained: Run, user_id: str | int, k: int = 10, factors: Factors | None = None
) -> Answer: ...
@overload
def recommend(
    trained: Run, user_id: Iterable[str | int], k: int = 10, factors: Factors | None = None
) -> pl.DataFrame: ...
def recommend(
    trained: Run, user_id: str | int | Iterable[str | int], k: int = 10, factors: Factors | None = None
) -> Answer | pl.DataFrame:
    """Return the best `k` items for a user of the run, or for each of several users, by exact search.

    Items that the user knows are left out, unless `evaluation.repeats` keeps them. One id gives an `Answer`. A list, an
    array or a series of ids gives a frame with a row for each user and item, in the order of the ids: `user_id`, `rank`
    from 1, `item_id`, `title`, `score` and `source`. An unknown user gets the most popular items, with the source
    "popular" and scores of 0, as from a store. `factors` is `trained.factors()`, for several calls; None computes it.

    The answer equals method 1 (precomputed user vectors) of a bundle of this run; `bundle_id` is empty. Raises
    DataError for a value that is no id, ConfigError for a model that reads the context."""
    started, k, dataset = time.perf_counter(), checked_k(k), trained.dataset
    if dataset.schema.side("context"):
        raise ConfigError(
            "the model reads the context, which an id alone does not give; publish the run, and give a retriever of "
            "the store a request with a context"
        )
    ids = _ids_of(user_id)
    users = IdColumn(dataset.users.ids, UserRow).find(
        with_ids(ids.to_frame(), "user_id", "users")["user_id"].cast(pl.String)
    )
    rows = np.full((len(ids), min(k, len(dataset.items))), -1, np.int64)
    scores = np.zeros(rows.shape, np.float32)
    unknown = users < 0
    if unknown.any():
        popularity = Popularity(dataset.item_positive_counts, trained.latest_popularity())
        rows[unknown] = popularity.top(k, users[:0], None)[0]
    factors = factors or trained.factors()
    index = build_index("exact", factors.items.cpu().numpy(), np.arange(len(dataset.items)), trained.model.metric)
    catalogue = Catalogue(index, TextColumn(dataset.items.ids), TextColumn(dataset.title_column()))
    keeps, none = trained.config.evaluation.repeats != "exclude", users[:0]
    for part in pieces(len(ids), max(1, min(BLOCK_USERS, BLOCK_ITEMS // k))):
        known = part.start + np.flatnonzero(~unknown[part])
        some = users[known]
        seen = [none if keeps else dataset.interacted_items.row(row).astype(np.int64) for row in some.tolist()]
        sparse = factors.sparse
        own = None if sparse is None else [sparse.of_user(row) for row in some.tolist()]
        vectors = factors.users[torch.from_numpy(some)].cpu().numpy()
        rows[known], scores[known] = catalogue.rank_many(vectors, rows.shape[1], seen, own=own)
    sources = SOURCES.gather(np.where(unknown, 2, 0))
    if isinstance(user_id, ONE_ID):
        return catalogue.answer((rows[0], scores[0]), k, started, source=sources[0])
    items = (dataset.items.ids.rename("item_id"), dataset.title_column().rename("title"))
    return answer_frame(ids, rows, scores, (rows >= 0).sum(axis=1), sources, items)


def _ids_of(given: str | int | Iterable[str | int]) -> pl.Series:
    """Return one id, or several, as a column. Raises DataError."""
    if isinstance(given, ONE_ID) and not isinstance(given, bool):
        given = [given]
    if isinstance(given, int | bytes) or not isinstance(given, Iterable):
        raise DataError(f"user_id is {given!r:.80}, expected an id (text or a whole number), or a list of ids")
    ids = given if isinstance(given, pl.Series | np.ndarray) else list(given)
    return as_frame({"user_id": ids}, "users")["user_id"]


def _user_row(dataset: Dataset, user_id: str | int) -> int:
    rows = (dataset.users.ids.cast(pl.String) == str(user_id)).arg_true()
    if not len(rows):
        raise DataError(f"user '{user_id}' is not among the {len(dataset.users):,} users of this run")
    return int(rows[0])
