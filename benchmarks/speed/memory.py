import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import tool
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report, declared
from benchmarks.lib.rounds import in_turns

WIDTH, QUERIES, K = 64, 256, 100
LABELS = {"torch-rechub": tool("torch-rechub"), "RecBole": tool("recbole").replace("recbole", "RecBole")}


def main(chosen: Namespace, report: Report) -> None:
    # This process must stay small: the peak of a child begins with its size.
    def peaks(task: str, names: list[str]) -> dict[str, list[float]]:
        works = {name: partial(call, work, task, name, chosen.threads, chosen.items) for name in names}
        found = in_turns(works, chosen.rounds, optional=names[1:])
        return {name: [ran.peak for ran, _ in costs] for name, costs in found.items()}

    tables = peaks("tables", ["twotower"])["twotower"]
    for task in chosen.only:
        found = peaks(task, declared(__file__)["tasks"][task])
        ours = found.pop("twotower")
        beside = {LABELS.get(name) or tool("faiss-cpu"): values for name, values in found.items()}
        floor = chosen.items * WIDTH * 4 / 1e6 if task == "search" else min(tables)
        report.add(task, ours, "MB", peers=beside, floor=floor)


def work(task: str, name: str, threads: int, items: int) -> None:
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
    import numpy as np

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((items, WIDTH), dtype=np.float32)
    queries = rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    index: Any
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(vectors)
    else:
        from twotower.index import build_index

        index = build_index("exact", vectors, np.arange(items), "dot")
        index.threads = threads
    del vectors
    index.search(queries, K)
