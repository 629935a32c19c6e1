"""Make a store with a catalogue of any size from a trained store, for load tests without a long training.

    python -m benchmarks.serving.catalogue --store runs/demo-store --items 100000 --to runs/c100k-store --bundles 2

The first rows are the items of the current bundle of `--store`, the others copies of them in turn: id "<id>-<n>", title
"<title>, copy n", and the vector of the original with `--noise` deviations of every number added at random (a number that
all items share, as the bias columns have one, stays as it is). Item ids become text. Users, their vectors, interactions,
encoders and towers are kept, and so are the rows of the originals, so a known user's answer by the originals alone is
what it was. The index is chosen, tuned and judged as `twotower publish` does it, with users that have test interactions.

Only items are copied. The number of users stays, so a user id is found faster than among a million.

A copy has no embedding in the tower: in a history it is an unknown item (code 0), at the cost of a known one. `--bundles 2` publishes two
bundles with different noise, for benchmarks that switch between them; the last is current.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.report import options
from twotower import runs
from twotower.arrays.types import Floats
from twotower.errors import TwoTowerError
from twotower.index import Index, build_index, measure_recall, tune_index
from twotower.publishing.item_index import index_facts
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.store.bundle import Bundle
from twotower.store.manifest import BundleFacts, Counts, RecallCheck
from twotower.store.store import Store

MADE_HERE = {"items.parquet", "README.md"}  # and index/; the rest is copied
PIECE = 65_536
"""Rows whose noise is drawn at once."""


def main() -> None:
    chosen = options(__doc__, __file__)
    try:
        source = Retriever(Store(Path(chosen.store)).current())
        store = Store.create(Path(chosen.to))
        for seed in range(chosen.bundles):
            started = time.perf_counter()
            bundle = publish(source, store, chosen.items, chosen.noise, seed, chosen.kind)
            check, index = bundle.manifest.recall_check, bundle.manifest.index
            print(
                f"{bundle.id}: {chosen.items:,} items, index {index.kind} {index.search_params}, recall@{check.k} "
                f"{check.recall:.4f}, {bundle.size / 1e6:,.0f} MB, {time.perf_counter() - started:.0f} s"
            )
    except TwoTowerError as e:
        sys.exit(f"error: {e}")


def publish(source: Retriever, store: Store, n: int, noise: float, seed: int, kind: str) -> Bundle:
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
        index, check = search(source, vectors(source, n, noise, seed), kind)
        index.save(folder / "index")
        about = (
            f"{known:,} items of bundle {old.id} and {n - known:,} copies, noise {noise}; metrics are of the former."
        )
        (folder / "README.md").write_text(f"# A made catalogue\n\n{about}\n", encoding="utf-8")
        counts = Counts(users=len(source.user_ids), items=n)
        return old.manifest.model_copy(update={"counts": counts, "recall_check": check, "index": index_facts(index)})

    return store.publish(write, answers, reason=f"{n:,} items, seed {seed}")


def items(source: Retriever, n: int) -> pl.DataFrame:
    """Return the table of `n` items: the originals, then copies of them in turn, ids as text."""
    frame, schema = source.dataset.items.frame, source.schema
    row = pl.Series("row", np.arange(n) % frame.height)
    copy = pl.lit(pl.Series("copy", np.arange(n) // frame.height))
    key, title = pl.col(schema.item_id).cast(pl.String), schema.title
    new = [pl.when(copy == 0).then(key).otherwise(pl.format("{}-{}", key, copy)).alias(schema.item_id)]
    if title and title != schema.item_id:
        line = pl.col(title).cast(pl.String)
        new.append(pl.when(copy == 0).then(line).otherwise(pl.format("{}, copy {}", line, copy)).alias(title))
    table = frame[row].with_columns(new)
    if twice := n - table[schema.item_id].n_unique():
        sys.exit(f"error: {twice:,} ids of copies are ids of originals; such a table cannot be copied")
    return table


def vectors(source: Retriever, n: int, noise: float, seed: int) -> Floats:
    """Return (n, D) vectors: originals unchanged, copies with noise, for metric "cosine" at the length of the original."""
    index, rng = source.index, np.random.default_rng(seed)
    known = len(source.item_ids)
    originals = np.full((known, index.width), np.nan, np.float32)  # a rejected one is rejected again
    originals[index.rows] = index.vectors(index.rows)
    size = np.float32(noise) * np.nanstd(originals, axis=0)
    out = np.empty((n, index.width), np.float32)
    out[:known] = originals
    for start in range(known, n, PIECE):
        own = originals[np.arange(start, min(start + PIECE, n)) % known]
        copies = own + size * rng.standard_normal(own.shape, dtype=np.float32)
        if index.metric == "cosine":
            copies *= np.linalg.norm(own, axis=1, keepdims=True) / np.linalg.norm(copies, axis=1, keepdims=True)
        out[start : start + len(own)] = copies
    return out


def search(source: Retriever, vectors: Floats, kind: str) -> tuple[Index, RecallCheck]:
    """Return the index of the vectors and its recall check: tuned with one half of the users, judged with the other."""
    config, metric = runs.read_config(source.bundle.folder)[1].index, source.index.metric
    index = build_index(kind or "auto", vectors, np.arange(len(vectors)), metric)
    users = np.unique(source.dataset.test.user).astype(np.int64)
    users = np.random.default_rng(0).permutation(users if len(users) > 1 else len(source.user_ids))[: config.queries]
    queries = np.asarray(source.loaded.user_vectors[users], np.float32)
    half = len(queries) // 2
    # As in `twotower publish`: users it was not tuned with find a little less.
    tune_index(index, queries[:half], config.k, config.min_recall + (1 - config.min_recall) / 5)
    found = measure_recall(index, queries[half:], config.k)
    check = RecallCheck(recall=found, threshold=config.min_recall, k=config.k, queries=len(queries) - half)
    return index, check


def answers(bundle: Bundle) -> None:
    """Raise RunError unless the bundle loads and answers a known user by both methods."""
    retriever = Retriever(bundle)
    for method in (1, 2):
        answer = retriever.recommend(Request(retriever.user_ids[0]), 10, method)
        assert answer.source == "model", answer
        assert len(answer.items) == min(10, len(retriever.item_ids)), answer


if __name__ == "__main__":
    main()
