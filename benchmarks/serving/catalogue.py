import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.report import Report
from twotower import runs
from twotower.arrays.types import Floats
from twotower.errors import TwoTowerError
from twotower.index import Index
from twotower.index.protocol import Publication
from twotower.publishing.item_index import build_item_index, index_facts, tune_and_check
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts, Counts, RecallCheck
from twotower.store.store import Store

MADE_HERE = {"items.parquet", "README.md"}  # and index/; the rest is copied
PIECE = 65_536  # rows whose noise is drawn at once


def main(chosen: Namespace, report: Report) -> None:
    try:
        source = Retriever(Store(Path(chosen.store)).current())
        store = Store.create(Path(chosen.to))
        for seed in range(chosen.bundles):
            bundle = publish(source, store, chosen.items, chosen.noise, seed)
            check, index = bundle.manifest.recall_check, bundle.manifest.index
            about = f"index {index.kind} {index.search_params}, recall@{check.k} {check.recall:.4f}"
            print(f"{bundle.id}: {chosen.items:,} items, {about}, {bundle.size / 1e6:,.0f} MB")
    except TwoTowerError as e:
        sys.exit(f"error: {e}")


def publish(source: Retriever, store: Store, n: int, noise: float, seed: int) -> Bundle:
    """Publish a bundle of `n` items and make it current once it answers. Raises RunError; on failure nothing changes."""
    known = len(source.item_ids)
    if n < known:
        sys.exit(f"error: --items is {n:,}, the store has {known:,} items; ask for at least as many")

    def write(folder: Path) -> BundleFacts:
        old = source.bundle
        for name in (entry.path for entry in old.manifest.files):
            if name not in MADE_HERE and "/" not in name:
                shutil.copyfile(old.folder / name, folder / name)
        items(source, n).write_parquet(folder / "items.parquet")
        index, check = search(source, vectors(source, n, noise, seed))
        index.save(folder / "index")
        about = f"{known:,} items of {old.id} and {n - known:,} copies, noise {noise}; metrics are of the former."
        (folder / "README.md").write_text(f"# A made catalogue\n\n{about}\n", encoding="utf-8")
        counts = Counts(users=len(source.user_ids), items=n)
        return old.manifest.model_copy(update={"counts": counts, "recall_check": check, "index": index_facts(index)})

    return store.publish(write, answers, reason=f"{n:,} items, seed {seed}")


def items(source: Retriever, n: int) -> pl.DataFrame:
    """Return the table of `n` items: the originals, then copies of them in turn, ids as text."""
    frame, schema = source.dataset.items.frame, source.schema
    copy = pl.lit(pl.Series("copy", np.arange(n) // frame.height))

    def marked(column: str, mark: str) -> pl.Expr:
        text = pl.col(column).cast(pl.String)
        return pl.when(copy == 0).then(text).otherwise(pl.format(mark, text, copy)).alias(column)

    marks = {schema.title: "{}, copy {}"} if schema.title else {}
    marks[schema.item_id] = "{}-{}"
    table = frame[pl.Series("row", np.arange(n) % frame.height)].with_columns(marked(*mark) for mark in marks.items())
    if twice := n - table[schema.item_id].n_unique():
        sys.exit(f"error: {twice:,} ids of copies are ids of originals; such a table cannot be copied")
    return table


def vectors(source: Retriever, n: int, noise: float, seed: int) -> Floats:
    """Return (n, D) vectors: originals unchanged, copies with noise, for metric "cosine" at the length of the original."""
    index, rng, known = source.index, np.random.default_rng(seed), len(source.item_ids)
    originals = np.full((known, index.width), np.nan, np.float32)  # a rejected one is rejected again
    originals[index.rows] = index.vectors(index.rows)
    out, size = originals[np.arange(n) % known], np.float32(noise) * np.nanstd(originals, axis=0)
    for start in range(known, n, PIECE):
        own = out[start : start + PIECE].copy()
        copies = own + size * rng.standard_normal(own.shape, dtype=np.float32)
        if index.metric == "cosine":
            copies *= np.linalg.norm(own, axis=1, keepdims=True) / np.linalg.norm(copies, axis=1, keepdims=True)
        out[start : start + PIECE] = copies
    return out


def search(source: Retriever, vectors: Floats) -> tuple[Index, RecallCheck]:
    """Return the index of the vectors and its recall check, as `twotower publish` makes them."""
    config, metric = runs.read_config(source.bundle.folder)[1].index, source.index.metric
    users = np.unique(source.dataset.test.user).astype(np.int64)
    users = np.random.default_rng(0).permutation(users if len(users) > 1 else len(source.user_ids))[: config.queries]
    index = build_item_index(vectors, metric, config, Publication())
    return index, tune_and_check(index, np.asarray(source.loaded.user_vectors[users], np.float32), config)


def answers(bundle: Bundle) -> None:
    """Raise RunError unless the bundle loads and answers a known user by both methods."""
    retriever = Retriever(bundle)
    for method in (1, 2):
        answer = retriever.recommend(Request(retriever.user_ids[0]), 10, method)
        assert answer.source == "model", answer
        assert len(answer.items) == min(10, len(retriever.item_ids)), answer
