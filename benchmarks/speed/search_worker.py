"""A process of search.py that searches in one way: the package, or FAISS with its settings; it runs the task that a line names.

"about" is answered with the tasks, the threshold and the kernels of BLAS, "results" with those of the first task, and a task with its seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.machine import Numbers, blas, timed
from twotower.arrays.types import Vectors
from twotower.index import build_index
from twotower.index.blas_threads import one_blas_thread

SHIPPED, OURS = "as shipped", "ours"
QUERIES = 10
"""So many queries at once are a matrix product for FAISS at its best."""
Works = dict[str, Callable[[], Any]]


def main(way: str, folder: str, threads: int, k: int, metric: str) -> None:
    items, queries = np.load(Path(folder) / "items.npy"), np.load(Path(folder) / "queries.npy")
    about: Numbers = {"threshold": None}
    if way == OURS:
        ours = build_index("exact", items, np.arange(len(items)), "dot" if metric == "dot" else "cosine")
        ours.threads = threads
        del items
        works: Works = {
            "batch search": lambda: ours.search(queries, k)[0],
            "single search": lambda: ours.search(queries[:1], k)[0],
        }
    else:
        about["threshold"], works = faiss_works(way, items, queries, threads, k)
    works[next(iter(works))]()
    about |= {"works": list(works), "blas": blas()}
    for line in map(str.strip, sys.stdin):
        said: Any = about
        if line == "results":
            said = next(iter(works.values()))().tolist()
        elif line != "about":
            said = [timed(works[line]) for _ in range(1 if line.startswith("batch") else 5)]
        print(json.dumps(said), flush=True)


def faiss_works(way: str, items: Vectors, queries: Vectors, threads: int, k: int) -> tuple[int, Works]:
    """Return FAISS's threshold of matrix products, and its tasks."""
    import faiss as module

    faiss: Any = module
    (n, width), one = items.shape, queries[:1]
    if way != SHIPPED:
        faiss.cvar.distance_compute_blas_threshold = QUERIES * width
    faiss.omp_set_num_threads(threads)

    def searches(name: str, search: Callable[[Vectors], Any]) -> Works:
        return {f"batch {name}": lambda: search(queries)[1], f"single {name}": lambda: search(one)[1]}

    flat = faiss.IndexFlatIP(width)
    flat.add(items)
    works = searches("faiss flat", lambda some: flat.search(some, k))
    if way != SHIPPED:
        # numpy asks for huge pages, which FAISS's own store does not.
        works |= searches("faiss knn", lambda some: faiss.knn(some, items, k, metric=faiss.METRIC_INNER_PRODUCT))
        works |= limits(items, queries, threads)
    if way != SHIPPED and threads > 1:
        shards = faiss.IndexShards(width, True, True)
        parts = [faiss.IndexFlatIP(width) for _ in range(threads)]
        for number, part in enumerate(parts):
            part.add(items[n * number // threads : n * (number + 1) // threads])
            shards.add_shard(part)
        works |= searches("faiss shards", lambda some, parts=parts: shards.search(some, k))  # type: ignore[misc]
    return int(faiss.cvar.distance_compute_blas_threshold), works


def limits(items: Vectors, queries: Vectors, threads: int) -> Works:
    """Return the tasks of the limit: the matrix product alone, and passes over the vectors shared among threads."""
    n, transposed, one = len(items), np.ascontiguousarray(queries.T), queries[0].copy()

    def share(work: Callable[[int, int], object]) -> None:
        bounds = [n * t // threads for t in range(threads + 1)]
        with one_blas_thread, ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, bounds[:-1], bounds[1:]))

    def products(low: int, high: int) -> None:
        space = np.empty((1024, len(queries)), np.float32)
        for start in range(low, high, 1024):
            block = items[start : min(start + 1024, high)]
            np.matmul(block, transposed, out=space[: len(block)])

    return {
        "batch limit product": lambda: share(products),
        "single limit sum": lambda: share(lambda low, high: items[low:high].sum()),
        "single limit largest": lambda: share(lambda low, high: items[low:high].max()),
        "single limit gemv": lambda: share(lambda low, high: items[low:high] @ one),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
