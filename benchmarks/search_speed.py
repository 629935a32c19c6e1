"""Search speed beside FAISS, in one process and one run: milliseconds of a query over a million vectors.

    .venv/bin/python benchmarks/search_speed.py
    .venv/bin/python benchmarks/search_speed.py --vectors FOLDER --scale 1000000 --kinds ivf,hnsw

FOLDER holds items.npy (N, D) and users.npy (M, D), float32. `--scale` adds copies of the items with a little noise until
there are so many. Without a folder, both come from the same clusters. Exact search: FAISS's flat index and ours give
the same answers on the same threads; beside them the matrix product alone and one pass over the vectors, below which
nothing can go. Rounds alternate, so that a busy machine slows all; the table shows medians and ranges.
Approximate search: one thread, one process; recall against exact search with users as queries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from twotower.index import build, recall, tune
from twotower.index.exact import ExactIndex, one_blas_thread
from twotower.index.protocol import Vectors

faiss: Any = _faiss


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vectors", type=Path, help="folder with items.npy and users.npy; by default made up")
    options.add_argument("--scale", type=int, default=1_000_000, help="items; copies with noise are added up to it")
    options.add_argument("--noise", type=float, default=0.3, help="length of a copy's noise, in lengths of its vector")
    options.add_argument("--width", type=int, default=64, help="of made-up vectors")
    options.add_argument("--metric", choices=["cosine", "dot"], default="cosine")
    options.add_argument("--k", type=int, default=100)
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--kinds", default="ivf", help="approximate kinds, with commas; empty for none")
    options.add_argument("--recall", type=float, default=0.95)
    options.add_argument("--json", action="store_true", help="print JSON only")
    chosen = options.parse_args()
    items, users = vectors(chosen)
    result: dict[str, Any] = {
        "items": len(items),
        "width": items.shape[1],
        "k": chosen.k,
        "threads": chosen.threads,
        "load": os.getloadavg()[0],
        **exact(items, users, chosen),
    }
    for kind in filter(None, chosen.kinds.split(",")):
        result |= approximate(kind, items, users, chosen)
    if chosen.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name:<34} {value}")


def vectors(chosen: argparse.Namespace) -> tuple[Vectors, Vectors]:
    """Items (N, D) and users (M, D)."""
    rng = np.random.default_rng(0)
    if chosen.vectors:
        items = np.ascontiguousarray(np.load(chosen.vectors / "items.npy"), np.float32)
        users = np.ascontiguousarray(np.load(chosen.vectors / "users.npy"), np.float32)
        users = users[rng.permutation(len(users))[: 4 * chosen.batch]]
    else:
        centers = rng.standard_normal((2000, chosen.width), dtype=np.float32)
        items = centers[rng.integers(0, 2000, chosen.scale)]
        items += 0.6 * rng.standard_normal(items.shape, dtype=np.float32)
        users = centers[rng.integers(0, 2000, 4 * chosen.batch)]
        users = users + 0.6 * rng.standard_normal(users.shape, dtype=np.float32)
    more = chosen.scale - len(items)
    if more > 0:
        copies = items[rng.integers(0, len(items), more)]
        size = np.linalg.norm(copies, axis=1, keepdims=True) * np.float32(chosen.noise / items.shape[1] ** 0.5)
        copies += size * rng.standard_normal(copies.shape, dtype=np.float32)
        if chosen.vectors and chosen.metric == "cosine":
            copies *= np.linalg.norm(items[:1]) / np.linalg.norm(copies, axis=1, keepdims=True)
        items = np.concatenate([items, copies])
    if chosen.metric == "cosine" and not chosen.vectors:
        items /= np.linalg.norm(items, axis=1, keepdims=True)
    return items, users


def exact(items: Vectors, users: Vectors, chosen: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a query in a batch, and of one query alone."""
    queries, n, threads, k = users[: chosen.batch], len(items), chosen.threads, chosen.k
    one = queries[:1]
    transposed = np.ascontiguousarray(queries.T)
    ours = ExactIndex.build(items, np.arange(n), chosen.metric)
    ours.threads = threads
    faiss.omp_set_num_threads(threads)
    flat = faiss.IndexFlatIP(items.shape[1])
    flat.add(items)

    def share(work: Callable[[int, int], object]) -> None:
        bounds = [n * t // threads for t in range(threads + 1)]
        with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, bounds[:-1], bounds[1:]))

    def products(low: int, high: int) -> None:
        space = np.empty((1024, len(queries)), np.float32)
        for start in range(low, high, 1024):
            block = items[start : min(start + 1024, high)]
            np.matmul(block, transposed, out=space[: len(block)])

    works: dict[str, Callable[[], object]] = {
        "batch.faiss_flat": lambda: flat.search(queries, k),
        "batch.ours": lambda: ours.search(queries, k),
        "batch.matrix_product": lambda: share(products),
        "single.faiss_flat": lambda: flat.search(one, k),
        "single.ours": lambda: ours.search(one, k),
        "single.read_sum": lambda: share(lambda low, high: items[low:high].sum()),
        "single.read_gemv": lambda: share(lambda low, high: items[low:high] @ one[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-1, chosen.rounds):
        for name, work in works.items():
            for _ in range(1 if name.startswith("batch") else 5):
                started = time.perf_counter()
                work()
                spent = (time.perf_counter() - started) * 1e3 / (len(queries) if name.startswith("batch") else 1)
                if number >= 0:
                    times[name].append(spent)
    theirs = flat.search(queries, k)[1]
    agree = float(
        np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(theirs, ours.search(queries, k)[0], strict=True)])
    )
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{f"{name} ms": spread(values) for name, values in times.items()},
        "agreement with faiss": round(agree, 5),
        "read GB/s": round(items.nbytes / min(middle["single.read_sum"], middle["single.read_gemv"]) / 1e6, 1),
        "batch: faiss / ours": round(middle["batch.faiss_flat"] / middle["batch.ours"], 2),
        "batch: ours / matrix product": round(middle["batch.ours"] / middle["batch.matrix_product"], 2),
        "single: ours / gemv": round(middle["single.ours"] / middle["single.read_gemv"], 2),
        "single: ours / sum": round(middle["single.ours"] / middle["single.read_sum"], 2),
        "single: faiss / ours": round(middle["single.faiss_flat"] / middle["single.ours"], 2),
    }


def approximate(kind: str, items: Vectors, users: Vectors, chosen: argparse.Namespace) -> dict[str, Any]:
    """Queries a second on one thread at the target recall, tuned with half of the users and measured with the others."""
    started = time.perf_counter()
    index = build(kind, items, np.arange(len(items)), chosen.metric)
    seconds = time.perf_counter() - started
    print(f"{kind}: built in {seconds:.0f} s", file=sys.stderr)
    half = len(users) // 2
    index.threads = chosen.threads
    found = tune(index, users[:half], chosen.k, chosen.recall)
    index.threads = 1
    rates: dict[str, list[float]] = {"batch": [], "single": []}
    for _ in range(chosen.rounds):
        for name, size in (("batch", half), ("single", 1)):
            spent = time.perf_counter()
            for start in range(half, 2 * half, size):
                index.search(users[start : start + size], chosen.k)
            rates[name].append(half / (time.perf_counter() - spent))
    return {
        f"{kind} setting": found.setting,
        f"{kind} build s": round(seconds, 1),
        f"{kind} recall": round(recall(index, users[half:], chosen.k), 4),
        f"{kind} queries/s, one thread, batch": spread(rates["batch"]),
        f"{kind} queries/s, one thread, single": spread(rates["single"]),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


if __name__ == "__main__":
    main()
