import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.report import Report
from twotower import runs
from twotower.arrays.types import Floats
from twotower.index import Index
from twotower.index.protocol import Publication
from twotower.publishing.publisher import build_item_index, index_facts, tune_and_check
from twotower.retrieval.retriever import Retriever
from twotower.store.manifest import BundleFacts, Counts, RecallCheck
from twotower.store.store import Store

MADE_HERE = ("items.parquet", "README.md", "index", "MANIFEST.json")  # the rest is copied


def main(chosen: Namespace, report: Report) -> None:
    source, store = Retriever(Store(Path(chosen.store)).current()), Store.create(Path(chosen.to))
    n, known = chosen.items, len(source.item_ids)
    if n < known:
        sys.exit(f"error: --items is {n:,}, the store has {known:,} items; ask for at least as many")
    for seed in range(chosen.bundles):

        def write(folder: Path, seed: int = seed) -> BundleFacts:
            old = source.bundle
            shutil.copytree(old.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*MADE_HERE))
            items(source, n).write_parquet(folder / "items.parquet")
            index, check = search(source, vectors(source, n, chosen.noise, seed))
            index.save(folder / "index")
            about = (
                f"{known:,} items of {old.id}, {n - known:,} copies, noise {chosen.noise}; metrics are of the former."
            )
            (folder / "README.md").write_text(f"# A made catalogue\n\n{about}\n", encoding="utf-8")
            made = {"counts": Counts(users=len(source.user_ids), items=n), "recall_check": check}
            return old.manifest.model_copy(update=made | {"index": index_facts(index)})

        bundle = store.publish(write, reason=f"{n:,} items, seed {seed}")
        check, index = bundle.manifest.recall_check, bundle.manifest.index
        about = f"index {index.kind} {index.search_params}, recall@{check.k} {check.recall:.4f}"
        print(f"{bundle.id}: {n:,} items, {about}, {bundle.size / 1e6:,.0f} MB")


def items(source: Retriever, n: int) -> pl.DataFrame:
    """Return the table of `n` items: the originals, then copies of them in turn, ids as text."""
    frame, schema = source.dataset.items.frame, source.schema
    copy = pl.lit(pl.Series("copy", np.arange(n) // frame.height))
    marks = {schema.item_id: "{}-{}"} | ({schema.title: "{}, copy {}"} if schema.title else {})
    table = frame[pl.Series("row", np.arange(n) % frame.height)].with_columns(
        pl.when(copy == 0).then(pl.col(column).cast(pl.String)).otherwise(pl.format(mark, column, copy)).alias(column)
        for column, mark in marks.items()
    )
    if twice := n - table[schema.item_id].n_unique():
        sys.exit(f"error: {twice:,} ids of copies are ids of originals; such a table cannot be copied")
    return table


def vectors(source: Retriever, n: int, noise: float, seed: int) -> Floats:
    """Return (n, D) vectors: originals, and copies with noise, for "cosine" at the length of the original."""
    index, rng, known = source.index, np.random.default_rng(seed), len(source.item_ids)
    originals = np.full((known, index.width), np.nan, np.float32)  # a rejected one is rejected again
    originals[index.rows] = index.vectors(index.rows)
    out = originals[np.arange(n) % known]
    copies = out[known:]
    own = np.linalg.norm(copies, axis=1, keepdims=True)
    copies += np.float32(noise) * np.nanstd(originals, axis=0) * rng.standard_normal(copies.shape, dtype=np.float32)
    if index.metric == "cosine":
        copies *= own / np.linalg.norm(copies, axis=1, keepdims=True)
    return out


def search(source: Retriever, vectors: Floats) -> tuple[Index, RecallCheck]:
    """Return the index of the vectors and its recall check, as `twotower publish` makes them."""
    config, metric = runs.read_config(source.bundle.folder)[1].index, source.index.metric
    users = np.unique(source.dataset.test.user).astype(np.int64)
    users = np.random.default_rng(0).permutation(users if len(users) > 1 else len(source.user_ids))[: config.queries]
    index = build_item_index(vectors, metric, config, Publication())
    return index, tune_and_check(index, source.loaded.stored_vectors(users), config)
