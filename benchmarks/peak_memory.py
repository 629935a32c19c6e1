"""Measure peak memory of training, evaluation and search beside torch-rechub, RecBole and FAISS, each in its own process.

    make bench-env && TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/peak_memory.py

The peak of resident memory of a process that does one task, interpreter, libraries and data included (`getrusage`):

training     one epoch of train_speed.py
evaluation   all users against the whole catalogue, as in evaluation_speed.py
search       the 100 best of `--items` vectors of 64 numbers for 256 queries; beside FAISS's flat index, which
             torch-rechub searches with. The limit is the vectors themselves

The limit of the first two is a process that has only read and encoded the tables of MovieLens 1M.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import Numbers, finish, options, result, tool

WIDTH, QUERIES, K = 64, 256, 100
TASKS = {
    "training": ("twotower", "torch-rechub", "RecBole"),
    "evaluation": ("twotower", "torch-rechub", "RecBole"),
    "search": ("twotower", "faiss"),
}


def main() -> None:
    parser = options(__doc__, threads=1, rounds=3)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--only", default=",".join(TASKS), help="tasks to run, separated by commas")
    parser.add_argument("--task", choices=[*TASKS, "tables"], help=argparse.SUPPRESS)
    parser.add_argument("--by", default="twotower", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.task:
        work(chosen.task, chosen.by, chosen.threads, chosen.items)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6))
        return
    tables = [peak("tables", "twotower", chosen) for _ in range(chosen.rounds)]
    results = []
    for task in chosen.only.split(","):
        tools = TASKS[task]
        peaks: dict[str, list[float]] = {}
        for name in tools:
            found = [peak(task, name, chosen) for _ in range(chosen.rounds)]
            peaks[name] = [one for one in found if one is not None]
        results.append(entry(task, peaks, tables, chosen))
    finish(results, chosen)


def entry(task: str, peaks: dict[str, list[float]], tables: list[Any], chosen: argparse.Namespace) -> Numbers:
    ours = peaks.pop("twotower")
    packages = {"torch-rechub": "torch-rechub", "RecBole": "recbole", "faiss": "faiss-cpu"}
    floor = chosen.items * WIDTH * 4 / 1e6 if task == "search" else min(tables)
    return result(
        f"peak_memory: {task}",
        ours,
        "MB",
        more=False,
        peers={tool(packages[name]).replace("recbole", "RecBole"): values for name, values in peaks.items()},
        floor=floor,
        threads=chosen.threads,
    )


def peak(task: str, name: str, chosen: argparse.Namespace) -> float | None:
    """Return the peak in MB of a new process. The parent must stay small: a child's peak begins with its size."""
    words = [sys.executable, str(Path(__file__)), "--task", task, "--by", name]
    words += ["--threads", str(chosen.threads), "--items", str(chosen.items)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        if name == "twotower":
            sys.exit(f"error: {task} failed:\n{done.stderr[-2000:]}")
        print(f"{name}, {task}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(done.stdout.strip().splitlines()[-1])


def work(task: str, name: str, threads: int, items: int) -> None:
    """Run the measured task."""
    if task == "search":
        search(name, threads, items)
        return
    import torch
    import train_speed

    torch.set_num_threads(threads)
    dataset = train_speed.prepare_movielens()
    if task == "training":
        ({"twotower": train_speed.twotower_epoch} | train_speed.PEERS)[name](dataset, 0)
    if task == "evaluation":
        import evaluation_speed

        ({"twotower": evaluation_speed.twotower_evaluation} | evaluation_speed.PEERS)[name](dataset)


def search(name: str, threads: int, items: int) -> None:
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
    from twotower.index.exact import Exact

    ours = Exact().build(vectors, np.arange(items), "dot")
    del vectors
    ours.threads = threads
    ours.search(queries, K)


if __name__ == "__main__":
    main()
