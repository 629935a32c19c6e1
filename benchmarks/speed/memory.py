"""Measure peak memory of training, evaluation and search beside torch-rechub, RecBole and FAISS, each in its own process."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.machine import tool
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report, declared

WIDTH, QUERIES, K = 64, 256, 100
PACKAGES = {"torch-rechub": "torch-rechub", "RecBole": "recbole", "faiss": "faiss-cpu"}


def main(chosen: Namespace, report: Report) -> None:

    def peaks(task: str, name: str) -> list[float]:
        return [one for _ in range(chosen.rounds) if (one := peak(task, name, chosen.threads, chosen.items))]

    tables = peaks("tables", "twotower")
    for task in chosen.only:
        ours, *others = declared(__file__)["tasks"][task]
        peers = {tool(PACKAGES[name]).replace("recbole", "RecBole"): peaks(task, name) for name in others}
        floor = chosen.items * WIDTH * 4 / 1e6 if task == "search" else min(tables)
        report.add(task, peaks(task, ours), "MB", more=False, peers=peers, floor=floor)


def peak(task: str, name: str, threads: int, items: int) -> float | None:
    """Return the peak in MB of a new process. The parent must stay small: a child's peak begins with its size."""
    try:
        return call(work, task, name, threads, items)[0].peak
    except ChildProcessError as e:
        if name == "twotower":
            raise
        print(f"{name}, {task}: {str(e).strip().splitlines()[-1:]}", file=sys.stderr)
        return None


def work(task: str, name: str, threads: int, items: int) -> None:
    """Run the measured task."""
    if task == "search":
        search(name, threads, items)
        return
    import torch

    from benchmarks.lib.worlds import prepare_movielens

    torch.set_num_threads(threads)
    dataset = prepare_movielens()
    if task != "tables":
        from benchmarks.speed import tools

        with tempfile.TemporaryDirectory() as folder:
            tools.works(task)[name](dataset, Path(folder))


def search(name: str, threads: int, items: int) -> None:
    """Search vectors with the exact index of a tool."""
    import numpy as np

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((items, WIDTH), dtype=np.float32)
    queries = rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(vectors)
        del vectors
        index.search(queries, K)
        return
    from twotower.index import build_index

    ours = build_index("exact", vectors, np.arange(items), "dot")
    del vectors
    ours.threads = threads
    ours.search(queries, K)
