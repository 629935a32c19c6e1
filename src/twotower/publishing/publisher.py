"""Publishing of a run as a bundle.

config.toml  encoders.json  vocabularies.arrow  users|items|interactions.parquet, or prepared/      as in the run
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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from twotower import files, runs
from twotower.arrays.types import Floats, Ints
from twotower.data.memmap import MemmapDataset
from twotower.data.splits import TEST
from twotower.errors import RunError
from twotower.evaluation.part_evaluation import evaluate_model
from twotower.features.encoders import Encoders
from twotower.features.side import SIDES, SideName
from twotower.files import layout
from twotower.files.readers import read_json, read_text
from twotower.index.protocol import IndexConfig, Publication
from twotower.onnx.export import export_tower
from twotower.publishing.item_index import build_item_index, index_facts, tune_and_check
from twotower.reports.model_card import model_card
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.user_vectors import embed_users
from twotower.runs import Run
from twotower.runs.folder import reading_folder, run_stamp
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts, Counts
from twotower.store.remote_collections import RemoteCollections
from twotower.store.store import Store
from twotower.version import __version__

log = logging.getLogger(__name__)

PACKAGES = ("torch", "numpy", "polars", "onnx", "onnxruntime", "faiss-cpu")
"""Distributions whose versions a manifest notes."""

COPIED_FILES = (layout.CONFIG, layout.ENCODERS, layout.VOCABULARIES)
FILES_OF_THE_END = (layout.WEIGHTS, layout.MODEL, layout.METRICS)
"""Files that a run has when its training has ended."""


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
    below it is refused, unless `force`, which the history records. A remote index is a new collection, to which the alias
    moves once the bundle is current. The best epoch of a run whose training has not ended is evaluated first; the model card
    says that it was stopped. Raises RunError, with the store unchanged.
    """
    if run.folder is None:
        raise RunError("the run has no folder, which publishing needs; train it with one")
    if run.unfinished:
        measured = evaluate_model(run.factors_during, run.dataset, run.config.evaluation)
        run = replace(run, metrics=measured | run.metrics)
    config = config or run.config.index
    opened = Store.create(store)
    collections = RemoteCollections(opened)
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
    collections: RemoteCollections | None = None,
) -> BundleFacts:
    """Write the files of a bundle into a folder, and return the facts of its manifest."""
    assert run.folder is not None
    if collections is not None and (left := collections.drop_unreferenced()):
        log.info(f"dropped collections that no bundle names: {', '.join(left)}")
    before, source = run_stamp(run.folder), reading_folder(run.folder)
    tables = () if isinstance(run.dataset, MemmapDataset) else layout.TABLES
    for name in (*COPIED_FILES, *(() if run.unfinished else FILES_OF_THE_END), *tables):
        shutil.copyfile(source / name, folder / name)
    if run.unfinished:
        runs.save_model(folder, run)
        files.write_json(folder / layout.METRICS, run.metrics)
    if isinstance(run.dataset, MemmapDataset):
        run.dataset.link(folder / layout.PREPARED)
    model = runs.weights_digest(folder)
    if run_stamp(run.folder) != before:
        raise RunError(f"{run.folder}: another run has replaced it; load the run again, then publish it")
    _check_unchanged(run, folder, model)
    factors = run.factors(TEST)
    items, users = factors.items.cpu().numpy(), factors.users.cpu().numpy()
    _check_users(users)
    register = None if collections is None else collections.register
    index = build_item_index(items, run.model.config.metric, config, Publication(model, register))
    recall_check = tune_and_check(index, users[_query_users(run, config.queries)], config)
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
        metric=run.model.config.metric,
        counts=Counts(users=len(users), items=len(items)),
        schema=run.dataset.schema,
        split=run.config.split,
        similarity=run.config.model.similarity,
        bias=run.config.model.bias,
        keep_seen=run.config.evaluation.repeats != "exclude",
        recall_check=recall_check,
        index=index_facts(index),
        parity=parity,
        schema_hash=_digest(run.dataset.schema.model_dump_json()),
        vocab_hash=_digest(read_text(folder / layout.ENCODERS)),
        versions={"twotower": __version__, "python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *index.options.packages)},
    )


def _check_unchanged(run: Run, folder: Path, digest: str) -> None:
    """Raise RunError if the files differ from the run in memory: one of them was trained further, or again."""
    kept = runs.load_model(folder, digest, run.config, run.dataset.encoders)
    pairs = zip(kept.parameters(), run.model.parameters(), strict=True)
    same = all(a.detach().numpy().tobytes() == b.detach().cpu().numpy().tobytes() for a, b in pairs)
    encoders = Encoders.load(run.dataset.schema, folder)
    measured = read_json(folder / layout.METRICS)  # the same weights may be another run, of other data
    if not same or encoders.digest != run.dataset.encoders.digest or measured != run.metrics:
        raise RunError(f"{run.folder}: holds another run than the one in memory; load the run again, then publish it")


def _check_users(users: Floats) -> None:
    bad = int((~np.isfinite(users).all(1)).sum())
    if bad:
        raise RunError(f"{bad} user vectors are not finite; the model is broken, train it again")


def _query_users(run: Run, n: int) -> Ints:
    """Return up to `n` random rows of users with test interactions (of all users if fewer than two have some)."""
    users: Ints = np.unique(run.dataset.test.user).astype(np.int64)
    if len(users) < 2:
        users = np.arange(len(run.dataset.users))
    return np.random.default_rng(0).permutation(users)[:n]


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
