"""Publishing of a run as a bundle, and the evaluation of a bundle.

config.toml  encoders.json  users|items|interactions.parquet, or prepared/      as in the run
model.safetensors  model.json  metrics.json
user_tower.onnx  item_tower.onnx      equality with torch is checked before they are published
user_vectors.npy  index/              of the same model
README.md                             the model card
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import twotower
from twotower import runs
from twotower.arrays.types import Codes, Floats, Ints
from twotower.data.memmap import MemmapDataset
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics import Metrics
from twotower.evaluation.part import PartEvaluation
from twotower.features.encoders import Encoders
from twotower.features.schema import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_json, read_text
from twotower.index import (
    Index,
    Metric,
    MilvusLocation,
    build_index,
    choose_index,
    choose_milvus_type,
    measure_recall,
    tune_index,
)
from twotower.index.choose import IndexConfig
from twotower.onnx.export import export_tower
from twotower.reports.model_card import model_card
from twotower.retrieval.evaluation import embed_users, rank_items, seen_before
from twotower.retrieval.request import Method, Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.runs.folder import reading_folder, run_stamp
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts, Counts, IndexFacts, RecallCheck
from twotower.store.milvus_collections import MilvusCollections
from twotower.store.store import Store

log = logging.getLogger(__name__)

COPIED_FILES = (layout.CONFIG, layout.ENCODERS, layout.WEIGHTS, layout.MODEL, layout.METRICS)


def publish(
    run: Run,
    store: Path | str,
    config: IndexConfig | None = None,
    *,
    force: bool = False,
    reason: str = "",
) -> Bundle:
    """Publish a run as the current bundle of a store, which is created if it does not exist.

    The index is tuned to `config.min_recall` with one half of a sample of users and checked with the other half; a bundle
    below it is refused, unless `force`, which the history records. An index in Milvus is a new collection, to which the
    alias moves once the bundle is current. Raises RunError, with the store unchanged.
    """
    if run.folder is None:
        raise RunError("the run has no folder, which publishing needs; train it with one")
    config = config or run.config.index
    opened = Store.create(store)
    collections = MilvusCollections(opened)
    try:
        bundle = opened.publish(
            lambda folder: _write(run, config, folder, collections), _probe, reason=reason, force=force
        )
    except BaseException:
        collections.drop_registered()
        raise
    if line := collections.update_alias():
        log.info(line)
    log.info(f"published: {bundle.id}, {bundle.size / 1e6:,.1f} MB; now the current bundle of {store}")
    return bundle


def _write(
    run: Run,
    config: IndexConfig,
    folder: Path,
    collections: MilvusCollections | None = None,
) -> BundleFacts:
    """Write the files of a bundle into a folder, and return the facts of its manifest."""
    assert run.folder is not None
    if collections is not None and (left := collections.drop_unreferenced()):
        log.info(f"dropped collections that no bundle names: {', '.join(left)}")
    before, source = run_stamp(run.folder), reading_folder(run.folder)
    for name in COPIED_FILES if isinstance(run.dataset, MemmapDataset) else (*COPIED_FILES, *layout.TABLES):
        shutil.copyfile(source / name, folder / name)
    if isinstance(run.dataset, MemmapDataset):
        run.dataset.link(folder / layout.PREPARED)
    model = runs.weights_digest(folder)
    if run_stamp(run.folder) != before:
        raise RunError(f"{run.folder}: another run has replaced it; load the run again, then publish it")
    _check_unchanged(run, folder)
    factors = run.factors(TEST)
    items, users = factors.items.cpu().numpy(), factors.users.cpu().numpy()
    _check_users(users)
    index = _build_index(items, run.model.metric, config, model, collections)
    recall_check = _tune_and_check(index, users[_query_users(run, config.queries)], config)
    index.save(folder / layout.INDEX)
    np.save(folder / layout.USER_VECTORS, users)
    parity: dict[SideName, float] = {}
    for side in SIDES:
        fields = run.dataset.encoders.fields(side)
        parity[side] = export_tower(
            run.model, side, fields, folder / layout.tower(side), run.dataset.side_before(side, TEST), model
        )
        log.info(f"{side}_tower.onnx: largest difference from torch {parity[side]:.1e}")
    (folder / layout.MODEL_CARD).write_text(model_card(run, index, recall_check), encoding="utf-8")
    return BundleFacts(
        model=model,
        dims=users.shape[1],
        metric=run.model.metric,
        counts=Counts(users=len(users), items=len(items)),
        schema=run.dataset.schema,
        split=run.config.split,
        similarity=run.config.model.similarity,
        bias=run.config.model.bias,
        recall_check=recall_check,
        index=IndexFacts.of(index),
        parity=parity,
        schema_hash=_digest(run.dataset.schema.model_dump_json()),
        vocab_hash=_digest(run.dataset.encoders.to_json()),
        versions={"twotower": twotower.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "polars", "onnx", "onnxruntime", "faiss-cpu")}
        | ({"pymilvus": version("pymilvus")} if index.remote else {}),
    )


def _check_unchanged(run: Run, folder: Path) -> None:
    """Raise RunError if the files differ from the run in memory: one of them was trained further, or again."""
    kept = runs.load_model(folder, run.config, run.dataset.encoders)
    pairs = zip(kept.parameters(), run.model.parameters(), strict=True)
    same = all(a.detach().numpy().tobytes() == b.detach().cpu().numpy().tobytes() for a, b in pairs)
    text = read_text(folder / layout.ENCODERS)
    encoders = Encoders.from_json(run.dataset.schema, text)
    measured = read_json(folder / layout.METRICS)  # the same weights may be another run, of other data
    if not same or encoders.to_json() != run.dataset.encoders.to_json() or measured != run.metrics:
        raise RunError(f"{run.folder}: holds another run than the one in memory; load the run again, then publish it")


def _check_users(users: Floats) -> None:
    bad = int((~np.isfinite(users).all(1)).sum())
    if bad:
        raise RunError(f"{bad} user vectors are not finite; the model is broken, train it again")


def _build_index(
    items: Floats,
    metric: Metric,
    config: IndexConfig,
    model: str,
    collections: MilvusCollections | None,
) -> Index:
    location = None
    if config.kind == "milvus":
        type_, why = (config.type, "set by index.type")
        if config.type == "auto":
            type_, why = choose_milvus_type(len(items))
        assert type_ != "auto"
        kind, params = "milvus", None

        def on_create(name: str) -> None:
            if collections is not None:
                collections.register(uri, name)
            log.info(f"index: collection {name} at {uri}")

        # An absolute path: the service may run in another folder.
        uri = config.uri if "://" in config.uri else str(Path(config.uri).absolute())
        location = MilvusLocation(uri, config.prefix, type_, config.timeout, model, on_create)
        log.info(f"index: milvus {type_} ({why})")
    elif config.kind == "auto":
        kind, params, why = choose_index(len(items), metric)
        log.info(f"index: {kind} ({why})")
    else:
        kind, params = config.kind, None
        log.info(f"index: {kind} (set by index.kind)")
    index = build_index(kind, items, np.arange(len(items)), metric, params, location)
    if len(index.rejected):
        log.warning(f"{len(index.rejected):,} of {len(items):,} item vectors are zero or not finite; left out")
    if not len(index):
        raise RunError("no item vector can be indexed; the model is broken, `diagnose(run)` says why")
    return index


def _query_users(run: Run, n: int) -> Ints:
    """Return up to `n` random rows of users with test interactions (of all users if fewer than two have some)."""
    users: Ints = np.unique(run.dataset.test.user).astype(np.int64)
    if len(users) < 2:
        users = np.arange(len(run.dataset.users))
    return np.random.default_rng(0).permutation(users)[:n]


def _tune_and_check(index: Index, queries: Floats, config: IndexConfig) -> RecallCheck:
    """Tune the index with one half of the queries (B, D), and return the recall check by the other half."""
    half = len(queries) // 2
    # Recall of users outside the tuning is slightly lower, so tuning aims a fifth of the way from the threshold to 1.
    aim = config.min_recall + (1 - config.min_recall) / 5
    tuned = tune_index(index, queries[:half], config.k, aim)
    found = measure_recall(index, queries[half:], config.k)
    if tuned.search_params:
        log.info(
            f"index: {', '.join(f'{k} {v}' for k, v in tuned.search_params.items())}, tuned to recall@{config.k} {aim:.3f}"
        )
    log.info(f"recall check: {found:.4f} of the exact top {config.k} by {len(queries) - half:,} held-out users")
    return RecallCheck(recall=found, threshold=config.min_recall, k=config.k, queries=len(queries) - half)


def _probe(bundle: Bundle) -> None:
    """Raise RunError unless the bundle answers and both methods agree on users from the whole table."""
    retriever = Retriever(bundle)
    one, two = (retriever.recommend(Request(retriever.user_ids[0]), 10, method) for method in (1, 2))
    a, b = (np.array([i.score for i in answer.items]) for answer in (one, two))
    rows = np.unique(np.linspace(0, len(retriever.user_ids) - 1, 256).astype(np.int64))
    stored, live = embed_users(retriever, rows, 1), embed_users(retriever, rows, 2)
    near = np.allclose(stored, live, rtol=0, atol=1e-3 * float(np.abs(stored).max()))
    if not near or len(a) != len(b) or not np.allclose(a, b, rtol=1e-3, atol=1e-4):
        raise RunError("the stored user vectors and the exported tower give different answers")


def evaluate_bundle(retriever: Retriever) -> dict[str, Metrics]:
    """Return the test metrics of a bundle, measured with the retriever that serves it.

    "index" and "exact" are method 1 (precomputed user vectors), "live" is method 2 (online user tower), and "intervals"
    has the bootstrap intervals of "index". Raises RunError without a test part.
    """
    dataset, config = retriever.dataset, runs.read_config(retriever.bundle.folder)[1].evaluation
    if not len(dataset.test):
        raise RunError(f"{retriever.bundle.folder}: the bundle has no test part")
    named: dict[SideName, Codes] = {"user": dataset.pairs.user, "item": dataset.pairs.item}
    for side, rows in named.items():
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(retriever.dataset.side(side)):
            raise RunError(f"{retriever.bundle.folder}: damaged (interactions name a {side} that is not there)")
    seen = seen_before(dataset, TEST)
    out: dict[str, Metrics] = {}
    searches: tuple[tuple[str, Method, bool], ...] = (("index", 1, False), ("exact", 1, True), ("live", 2, False))
    for name, method, exact in searches:

        def search(users: Ints, k: int, method: Method = method, exact: bool = exact) -> Ints:
            return rank_items(retriever, users, k, method, seen, exact)

        report = PartEvaluation.from_search(search, _scores(retriever, method), dataset, TEST, config)
        out[name] = report.metrics()
        if name == "index":
            out["intervals"] = {
                f"{m}.{end}": v
                for m, pair in report.intervals().items()
                for end, v in zip(("low", "high"), pair, strict=True)
            }
    return out


def _scores(retriever: Retriever, method: Method) -> Any:
    """Return the scores (n,) of the test pairs by the served vectors; -1e9 for rejected items."""
    pairs = retriever.dataset.test
    users = embed_users(retriever, np.arange(len(retriever.user_ids)), method)
    items = np.full((len(retriever.item_ids), users.shape[1]), np.nan, np.float32)
    rows = retriever.index.rows
    items[rows] = retriever.index.vectors(rows)
    import torch

    scores = Factors(torch.from_numpy(np.ascontiguousarray(users)), torch.from_numpy(items)).scores(pairs)
    return np.nan_to_num(scores, nan=-1e9)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
