"""Measure how cost grows with items: vectors of 64 numbers are indexed by `index.kind = "auto"`, tuned to recall 0.95 and searched."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

from benchmarks.lib.machine import Numbers, timed
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report, exponent
from benchmarks.lib.vectors import Clusters
from twotower.index import build_index, measure_recall, tune_index

WIDTH, K, RECALL = 64, 100, 0.95


def main(chosen: Namespace, report: Report) -> None:
    costs: dict[str, list[float]] = {"build": [], "search": [], "memory": []}
    for items in chosen.sizes:
        ran, told = call(index_items, items)
        name = f"{items:,} items ({told['kind']})"
        for what, cost in (("build", told["build"]), ("search", told["search"]), ("memory", ran.memory)):
            costs[what].append(cost)
        report.add(f"{name}, build and tune", told["build"], "s", more=False)
        report.add(f"{name}, one search at recall {told['recall']:.3f}", told["search"] * 1e3, "ms", more=False)
        report.add(f"{name}, index on disk", told["bytes"] / 1e6, "MB", more=False)
        report.add(f"{name}, memory to build", ran.memory, "MB", more=False)
    for what, found in costs.items():
        report.add(f"exponent of items, {what}", exponent(chosen.sizes, found), more=False)


def index_items(items: int) -> Numbers:
    """Build, tune and search the index that is chosen for a number of items."""
    made = Clusters(1_000, WIDTH, 0.7)
    vectors, queries = made.points(items, 1), made.points(1000, 2)
    started, k = time.perf_counter(), min(K, items)
    index = build_index("auto", vectors, np.arange(items), "cosine")
    tune_index(index, queries[:500], k, RECALL + (1 - RECALL) / 5)
    build = time.perf_counter() - started
    recall = measure_recall(index, queries[500:], k)
    index.threads = 1
    times = [timed(lambda query=query: index.search(query[None], k)) for query in queries[500:700]]  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return {"kind": index.kind, "build": build, "recall": recall, "search": float(np.median(times)), "bytes": size}
