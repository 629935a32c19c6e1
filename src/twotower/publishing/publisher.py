"""Publishing of a run as a bundle.

config.toml  encoders.json  vocabularies.arrow  users|items|interactions.parquet, or prepared/      as in the run
model.safetensors  model.json  metrics.json
user_tower.onnx  item_tower.onnx      compared with torch before the bundle is published; weights in model.safetensors
user_vectors.npy  index/              the index is tuned and checked with two halves of a sample of users
history_term.npy  popularity.npy      of a model with such terms
README.md                             the model card
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from twotower import files, runs
from twotower.arrays.ragged import rows_of
from twotower.arrays.types import Floats, Ints
from twotower.data import memmap
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.memmap import MemmapDataset
from twotower.data.side import Side
from twotower.data.split import PART_NAMES
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import Tables
from twotower.data.whole import check_whole, tables_of
from twotower.errors import RunError
from twotower.escaping import python_literal
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.config import WIDTH
from twotower.evaluation.moments import ContextFactors
from twotower.evaluation.part_evaluation import evaluate_model
from twotower.features.encoders import Encoders
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_json, read_text
from twotower.index import Index, Similarity, measure_recall, tune_index
from twotower.index.protocol import IndexConfig, Publication
from twotower.onnx.builder import StoredWeights
from twotower.onnx.export import PARITY_ROWS, export_tower
from twotower.publishing.challenge import CURRENT, Beat, challenge
from twotower.reports.metric_tables import RANKED, cell, metric_rows
from twotower.reports.verdict import verdict
from twotower.retrieval.batches import embed_users
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.runs.folder import reading_folder, run_stamp
from twotower.scorers import alone
from twotower.scorers.scorer import terms_of
from twotower.store.bundle import Bundle
from twotower.store.manifest import (
    BundleFacts,
    ChallengeFacts,
    Counts,
    HistoryTermFacts,
    IndexFacts,
    KnownRows,
    RecallCheck,
)
from twotower.store.remote_collections import RemoteCollections
from twotower.store.store import Store
from twotower.train.factors import factors_during, items_at_end
from twotower.version import __version__

log = logging.getLogger(__name__)

PACKAGES = ("torch", "numpy", "polars", "onnx", "onnxruntime", "faiss-cpu")
"""Distributions with versions in the manifest."""

COPIED_FILES = (layout.CONFIG, layout.ENCODERS, layout.VOCABULARIES)
FILES_OF_THE_END = (layout.WEIGHTS, layout.MODEL, layout.METRICS)
"""Files that a run has when its training has ended."""


def publish(
    run: Run, store: Path | str, config: IndexConfig | None = None, *, force: bool = False, reason: str = "",
    latest: bool | Tables = False, beat: Beat | None = None,
) -> Bundle:  # fmt: skip
    """Publish a run as the current bundle of a store, which is created if it does not exist.

    The index is tuned to `config.min_recall` with one half of a sample of users and checked with the other half. A
    lower recall is refused, unless `force`, which the history records. A remote index is a new collection; the alias
    moves to it once the bundle is current. A training that has not ended is evaluated at its best epoch, which the
    model card and the history say; it is refused if a part of the model is fitted after the last epoch, unless `force`.

    With `train.refit` the model of all rows is published. `latest` makes vectors, histories and seen items of users
    from all interactions of the run, or of the tables of its log as it is now. `beat` compares the model, before its
    refit, with a published bundle on the rows that neither has learned; a worse one is refused, unless `force`. Raises
    RunError, with the store unchanged; for `latest` and `beat` also DataError and ConfigError."""
    if run.folder is None:
        raise RunError("the run has no folder, which publishing needs; train it with one")
    if run.unfinished:
        if (run.config.fitted_last or run.config.narrow.width) and not force:
            again = f"`fit(config, folder={python_literal(run.folder)}, resume=True)`"
            raise RunError(
                f"{run.folder}: the training has not ended ({run.unfinished}); let it end, go on: {again}, or publish "
                "it as it is with `force=True`"
            )
        reason = "; ".join(filter(None, (reason, run.unfinished)))
        monitor = run.config.train.monitor
        measured = evaluate_model(run.factors_during, run.dataset, run.config.evaluation, monitor=monitor, alone=alone)
        run = replace(run, metrics=measured | run.metrics)
    if run.config.evaluation.repeats == "only":
        log.warning(
            "evaluation.repeats = 'only' measures rankings of the items that a user has taken before, and the service "
            "ranks all items: give the user's own items in allow of a request, or set evaluation.repeats = 'allow'"
        )
    config, first, run = config or run.config.index, run, runs.published(run)
    learned = known_rows(run.dataset, (TRAIN, VALIDATION))
    if latest is not False:
        run = replace(run, dataset=latest_of(run.dataset, None if latest is True else latest))
    opened = Store.create(store)
    collections = RemoteCollections(opened)

    def write(folder: Path) -> BundleFacts:
        found = beat and _challenge(first, opened, config, beat)
        return _write(run, config, folder, collections, learned).model_copy(update={"challenge": found})

    try:
        bundle = opened.publish(write, _probe, reason=reason, force=force)
    except BaseException:
        collections.drop_registered()
        raise
    if line := collections.update_alias():
        log.info(line)
    log.info(f"published: {bundle.id}, {bundle.size / 1e6:,.1f} MB; now the current bundle of {store}")
    return bundle


def _challenge(run: Run, store: Store, config: IndexConfig, beat: Beat) -> ChallengeFacts | None:
    """Compare a run, before its refit, with a bundle of a store; None if no bundle is current."""
    if beat.bundle == CURRENT and not store.place.current():
        log.info("no bundle is current, so there is none to beat")
        return None
    bundle = store.current() if beat.bundle == CURRENT else store.open(beat.bundle)
    with bundle.lease(), TemporaryDirectory(prefix="twotower-challenge-", ignore_cleanup_errors=True) as temporary:
        once = run.config.model_copy(update={"train": run.config.train.model_copy(update={"refit": False})})
        scratch = Store.create(Path(temporary) / "store")
        collections = RemoteCollections(scratch)
        try:
            made = scratch.publish(
                lambda folder: _write(replace(run, config=once), config, folder, collections), force=True
            )
            found = challenge(Retriever(bundle), Retriever(made), run.config.evaluation, beat.metric)
        finally:
            collections.drop_registered()
    found = found.model_copy(update={"strict": beat.strict})
    log.info(str(found))
    return found


def known_rows(dataset: Dataset, parts: Sequence[int]) -> KnownRows:
    """Return the number of interactions of some parts, and the newest of their times."""
    rows = sum(len(dataset.part_indices(part)) for part in parts)
    times = [int(found.max()) for part in parts if len(found := dataset.times_of(part))] if dataset.schema.time else []
    return KnownRows(rows=rows, until=max(times, default=None))


def latest_of(dataset: Dataset, tables: Tables | None) -> Dataset:
    """Return the dataset in memory of all rows of another, or of tables, with its encoders, as known before a test."""
    if tables is None:
        check_whole(dataset, "latest")
        tables = tables_of(dataset)
    return build_dataset(tables, dataset.schema, dataset.split, whole=True, encoders=dataset.encoders)


def _write(
    run: Run, config: IndexConfig, folder: Path, collections: RemoteCollections | None = None,
    learned: KnownRows | None = None,
) -> BundleFacts:  # fmt: skip
    """Write the files of a bundle into a folder, and return the facts of its manifest. `learned` are the rows of the
    model, by default those of the run's training and validation."""
    assert run.folder is not None
    if collections is not None and (left := collections.drop_unreferenced()):
        log.info(f"dropped collections that no bundle names: {', '.join(left)}")
    before, source = run_stamp(run.folder), reading_folder(run.folder)
    made = isinstance(run.dataset, MemmapDataset) or run.dataset.is_whole
    tables: tuple[str, ...] = () if made else layout.TABLES
    read = any(h.feature for h in run.dataset.schema.histories("user"))
    if tables and read and run.dataset.items.versioned:  # stored histories hold features of earlier versions
        tables = (*tables, layout.versions("item"))
    for name in (*COPIED_FILES, *(() if run.unfinished else FILES_OF_THE_END), *tables):
        shutil.copyfile(source / name, folder / name)
    if run.unfinished:
        runs.save_model(folder, run)
        files.write_json(folder / layout.METRICS, run.metrics)
    if isinstance(run.dataset, MemmapDataset):
        run.dataset.link(folder / layout.PREPARED)
    if run.dataset.is_whole:
        memmap.save(run.dataset, folder)
    model = runs.weights_digest(folder)
    if run_stamp(run.folder) != before:
        raise RunError(f"{run.folder}: another run has replaced it; load the run again, then publish it")
    _check_unchanged(run, folder, model)
    if unread := _unread_rows(run):
        log.info(unread)
    items, (queries, query_users), users = _vectors(run, config.queries)
    for vectors in (queries, users):
        if vectors is not None:
            _check_users(vectors)
    register = None if collections is None else collections.register
    index = build_item_index(items, run.model.metric, config, Publication(model, register))
    recall_check = tune_and_check(index, queries, config, _left_out(run, query_users))
    index.save(folder / layout.INDEX)
    if users is not None:
        np.save(folder / layout.USER_VECTORS, users)
    parity: dict[SideName, float] = {}
    weights = StoredWeights(run.model, folder / layout.WEIGHTS)
    for side in SIDES:
        fields = run.dataset.encoders.fields(side)
        rows = run.dataset.side_before(side, TEST)
        if side == "user" and run.dataset.schema.side("context"):
            rows = _in_contexts(run.dataset, rows)
        parity[side] = export_tower(run.model, side, fields, folder / layout.tower(side), rows, model, weights)
        log.info(f"{side}_tower.onnx: largest difference from torch {parity[side]:.1e}")
    (folder / layout.MODEL_CARD).write_text(_model_card(run, index, recall_check), encoding="utf-8")
    return BundleFacts(
        model=model,
        dims=items.shape[1],
        metric=run.model.metric,
        counts=Counts(users=len(run.dataset.users), items=len(items)),
        schema=run.dataset.schema,
        split=run.config.split,
        similarity=run.config.model.similarity,
        bias=run.model.bias_columns,
        keep_seen=run.config.evaluation.repeats != "exclude",
        history_term=_write_terms(run, folder),
        moves=run.moves,
        learned=learned or known_rows(run.dataset, (TRAIN, VALIDATION)),
        challenge=None,
        remembered=known_rows(run.dataset, (TRAIN, VALIDATION) if run.dataset.time_ordered else (TRAIN,)),
        recall_check=recall_check,
        index=index_facts(index),
        parity=parity,
        schema_hash=_digest(run.dataset.schema.model_dump_json()),
        vocab_hash=_digest(read_text(folder / layout.ENCODERS)),
        versions={"twotower": __version__, "python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *index.options.packages)},
    )


def _write_terms(run: Run, folder: Path) -> HistoryTermFacts | None:
    """Write the popularity for unknown users, and the weights of the items of a history; return the facts of these.
    None for a model without."""
    if (latest := run.latest_popularity()) is not None:
        np.save(folder / layout.POPULARITY, latest)
    term = next((served for term in terms_of(run.model) if (served := term.served())), None)
    if term is None:
        return None
    np.save(folder / layout.HISTORY_TERM, term.weights)
    rate, exponent = term.recency
    return HistoryTermFacts(history=term.history, rate=rate, exponent=exponent, factor=term.factor)


def _check_unchanged(run: Run, folder: Path, digest: str) -> None:
    """Raise RunError if the files differ from the run in memory: one of them was trained further, or again."""
    same = runs.holds_weights(folder, digest, run.model)
    encoders = Encoders.load(run.dataset.schema, folder)
    measured = read_json(folder / layout.METRICS)  # the same weights may be another run, of other data
    if not same or encoders.digest != run.dataset.encoders.digest or measured != run.metrics:
        raise RunError(f"{run.folder}: holds another run than the one in memory; load the run again, then publish it")


def _check_users(users: Floats) -> None:
    bad = int((~np.isfinite(users).all(1)).sum())
    if bad:
        raise RunError(f"{bad} user vectors are not finite; the model is broken, train it again")


def _unread_rows(run: Run) -> str:
    """Return a warning about the rows that are in no history of the bundle; empty if the model reads no history."""
    split = run.config.split
    parts = (TEST,) if split.histories_grow else (VALIDATION, TEST)
    rows = sum(len(run.dataset.part_indices(part)) for part in parts)
    if not rows or not (run.dataset.schema.histories("user") or run.moves):
        return ""
    names = [PART_NAMES[part] for part in parts]
    option = "split.users" if split.kind in split.kinds_of_users else " and ".join(f"split.{name}" for name in names)
    out = ", but answers leave out their items" if run.config.evaluation.repeats == "exclude" else ""
    way = "" if split.is_given else f"; train with a smaller {option} to serve with nearly all rows"
    return f"the histories of the bundle lack the {rows:,} rows of the {' and '.join(names)} part{out}{way}"


def _left_out(run: Run, users: Ints) -> list[Ints] | None:
    """Return the rows of the items that the search for each user leaves out; None if it leaves out none.

    These are seen items, unless answers hold them, and items with an own count, which are ranked apart."""
    every = (term.added(run.dataset, TEST) for term in terms_of(run.model))
    own = next((added for added in every if isinstance(added, SparseScores)), None)
    excludes = run.config.evaluation.repeats == "exclude"
    if not excludes and own is None:
        return None
    seen, none = run.dataset.interacted_items, np.zeros(0, np.int64)

    def of_user(user: int) -> Ints:
        counted = none if own is None else own.of_user(user).rows
        return np.union1d(seen.row(user) if excludes else none, counted).astype(np.int64)

    return [of_user(user) for user in users.tolist()]


def _vectors(run: Run, n_queries: int) -> tuple[Floats, tuple[Floats, Ints], Floats | None]:
    """Return the vectors of all items, the vectors and rows of up to `n_queries` random users, and of all users.

    The last are None if a feature of the context has no default. With a context the queries are random interactions of
    the test part, or of all parts if it has fewer than two."""
    if not run.dataset.schema.side("context"):
        factors = run.factors(TEST)
        users = factors.users.cpu().numpy()
        chosen = _query_users(run, n_queries)
        return factors.items.cpu().numpy(), (users[chosen], chosen), users
    newest = replace(
        run.dataset, users=replace(run.dataset.users, versions=None), items=replace(run.dataset.items, versions=None)
    )
    scorer = factors_during(run.model, newest, TEST)
    assert isinstance(scorer, ContextFactors)
    rows = run.dataset.part_indices(TEST)
    if len(rows) < 2:
        rows = np.arange(len(run.dataset.pairs))
    rows = np.random.default_rng(0).permutation(rows)[:n_queries]
    chosen = run.dataset.pairs.user[rows].astype(np.int64)
    queries = scorer.of_users(chosen, rows).cpu().numpy()
    stored = run.factors(TEST).users.cpu().numpy() if run.dataset.schema.precomputes else None
    items = items_at_end(scorer.items, run.model, newest)
    return items.cpu().numpy(), (queries, chosen), stored


def _in_contexts(dataset: Dataset, users: Side) -> Side:
    """Return the inputs of the user tower for random interactions: the columns of their users, and their context."""
    n = len(dataset.pairs)
    rows = np.sort(np.random.default_rng(0).permutation(n)[:PARITY_ROWS])
    user = dataset.pairs.user[rows].astype(np.int64)
    columns = {name: rows_of(column, user) for name, column in users.columns.items()}
    columns |= {name: rows_of(column, rows) for name, column in dataset.context.items()}
    return Side(users.frame[user], columns, users.id_column)


def _query_users(run: Run, n: int) -> Ints:
    """Return up to `n` random rows of users with test interactions, or of all users if fewer than two have some."""
    users: Ints = np.unique(run.dataset.test.user).astype(np.int64)
    if len(users) < 2:
        users = np.arange(len(run.dataset.users))
    return np.random.default_rng(0).permutation(users)[:n]


def _probe(bundle: Bundle) -> None:
    """Raise RunError unless the bundle answers, and both methods agree on users from the whole table.

    A tower that reads the context is run in the context of some interactions."""
    retriever = Retriever(bundle)
    if retriever.reads_context:
        pairs = retriever.dataset.pairs
        chosen = np.unique(np.linspace(0, len(pairs) - 1, 64).astype(np.int64))
        vectors = embed_users(retriever, pairs.user[chosen].astype(np.int64), 2, chosen)
        found, _ = retriever.catalogue.rank(vectors[:1], 10, np.zeros(0, np.int64))
        if not np.isfinite(vectors).all() or (found < 0).all():
            raise RunError("the exported tower gives no vectors to search with; the model is broken, train it again")
        return
    one, two = (retriever.recommend(Request(retriever.user_ids[0]), 10, method) for method in (1, 2))
    a, b = (np.array([i.score for i in answer.items]) for answer in (one, two))
    rows = np.unique(np.linspace(0, len(retriever.user_ids) - 1, 256).astype(np.int64))
    stored, live = embed_users(retriever, rows, 1), embed_users(retriever, rows, 2)
    near = np.allclose(stored, live, rtol=0, atol=1e-3 * float(np.abs(stored).max()))
    if not near or len(a) != len(b) or not np.allclose(a, b, rtol=1e-3, atol=1e-4):
        raise RunError("the stored user vectors and the exported tower give different answers")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def build_item_index(items: Floats, metric: Similarity, config: IndexConfig, publication: Publication) -> Index:
    """Return the index of the item vectors (I, D) under their rows. The config names or chooses the kind.

    Raises RunError if no vector can be indexed."""
    chosen, why = config.choose(len(items), metric)
    log.info(f"index: {chosen.label} ({why})")
    index = chosen.build(items, np.arange(len(items)), metric, publication)
    if len(index.rejected):
        log.warning(f"{len(index.rejected):,} of {len(items):,} item vectors are zero or not finite; left out")
    if not len(index):
        raise RunError("no item vector can be indexed; the model is broken, `diagnose(run)` says why")
    return index


def tune_and_check(
    index: Index, queries: Floats, config: IndexConfig, banned: Sequence[Ints] | None = None
) -> RecallCheck:
    """Tune the index with one half of the queries (B, D), and return the recall check by the other half.

    `banned` are the item rows that the search of each query leaves out."""
    half = len(queries) // 2
    # Recall of users outside the tuning is slightly lower, so tuning aims a fifth of the way from the threshold to 1.
    aim = config.min_recall + (1 - config.min_recall) / 5
    searches = [banned, None] if banned else [None]  # a new user's search leaves nothing out
    if index.search_limits():
        params = dict[str, int]()
        for out in searches:
            tune_index(index, queries[:half], config.k, aim, out and out[:half])
            params = {name: max(value, params.get(name, 0)) for name, value in index.search_params.items()}
        index.search_params |= params
    found = min(measure_recall(index, queries[half:], config.k, out and out[half:]) for out in searches)
    if index.search_params:
        params_text = ", ".join(f"{k} {v}" for k, v in index.search_params.items())
        log.info(f"index: {params_text}, tuned to recall@{config.k} {aim:.3f}")
    log.info(f"recall check: {found:.4f} of the exact top {config.k} by {len(queries) - half:,} held-out users")
    return RecallCheck(recall=found, threshold=config.min_recall, k=config.k, queries=len(queries) - half)


def index_facts(index: Index) -> IndexFacts:
    """Return the facts about an index for a manifest."""
    return IndexFacts.model_validate(index.describe().model_dump() | {"rejected": len(index.rejected)})


def _model_card(run: Run, index: Index, recall_check: RecallCheck) -> str:
    """Return the model card: the model, its training data and its metrics."""
    config = run.config.evaluation
    names = [name for name in (WIDTH, *config.metric_set.names(config.k)) if f"test.{name}" in run.metrics]
    values = metric_rows(run.metrics, names)
    shown = [label for label, row in values.items() if any(v is not None for v in row)]
    table = zip(names, *(values[label] for label in shown), strict=True)
    rows = "\n".join(f"| {name} | {' | '.join(cell(v, name) for v in row)} |" for name, *row in table)
    found = verdict(run.metrics, run.config)
    decision, state = f"{found.text}\n\n" if found else "", f"; {run.unfinished}" if run.unfinished else ""
    features = "\n".join(f"- {f.side}: `{f.name}` ({f.kind})" for f in run.dataset.schema.features)
    check = f"recall@{recall_check.k} {recall_check.recall:.4f} against exact search by {recall_check.queries}"
    return f"""# Two-tower model

{run.dataset.describe()}

Split: {run.config.split.kind}. Loss: {run.config.loss.kind}. Vectors: {index.width} numbers, metric {index.metric}.
Index: {index.kind}, {check} held-out users.

| test metric | {" | ".join(shown)} |
|---|{"---|" * len(shown)}
{rows}

{decision}Full catalogue: {RANKED[config.repeats]}; see config.toml for every setting.

Features:

{features}

Trained by twotower {__version__}{state}. Scores are no probabilities of liking, least of all outside the population
and the time of the training data.
"""
