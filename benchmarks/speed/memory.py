"""Measure peak memory of training, evaluation and search beside torch-rechub, RecBole and FAISS, each in its own process.

    make bench-env && TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python -m benchmarks.speed.memory

The peak of resident memory of a process that does one task, interpreter, libraries and data included (`ru_maxrss`):

training     one epoch of peers.py
evaluation   all users against the whole catalogue, as in peers.py
search       the 100 best of `--items` vectors of 64 numbers for 256 queries; beside FAISS's flat index, which
             torch-rechub searches with. The limit is the vectors themselves

The limit of the first two is a process that has only read and encoded the tables of MovieLens 1M.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.lib.machine import tool
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report, declared, options

WIDTH, QUERIES, K = 64, 256, 100
PACKAGES = {"torch-rechub": "torch-rechub", "RecBole": "recbole", "faiss": "faiss-cpu"}


def main() -> None:
    chosen = options(__doc__, __file__)

    def peaks(task: str, name: str) -> list[float]:
        return [one for _ in range(chosen.rounds) if (one := peak(task, name, chosen.threads, chosen.items))]

    tables = peaks("tables", "twotower")
    with Report(chosen, "peak_memory") as report:
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


if __name__ == "__main__":
    main()
