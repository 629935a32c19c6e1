"""Search speed beside FAISS, in one process and one run: milliseconds of a query over a million vectors.

    .venv/bin/python benchmarks/search_speed.py
    .venv/bin/python benchmarks/search_speed.py --vectors FOLDER --scale 1000000 --kinds ivf,hnsw
    .venv/bin/python benchmarks/search_speed.py --run runs/retrieve --scale 1000000 --metric dot --threads 1

FOLDER holds items.npy (N, D) and users.npy (M, D), float32; `--run` takes those of a trained run. `--scale` adds copies
of the items with a little noise until there are so many. Without either, both come from the same clusters. Exact search:
FAISS's flat index and ours give the same answers on the same threads; the limit is the matrix product alone (a batch) or
one pass over the vectors (one query). Rounds alternate, so that a busy machine slows all.
Approximate search: one thread, one process; recall against exact search with users as queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from measure import Numbers, finish, options, result, spread, timed, tool

from twotower.index import build, recall, tune
from twotower.index.exact import ExactIndex, one_blas_thread
from twotower.index.protocol import Vectors

faiss: Any = _faiss


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--vectors", type=Path, help="folder with items.npy and users.npy; by default made up")
    parser.add_argument("--run", type=Path, help="a trained run: its items and users")
    parser.add_argument("--scale", type=int, default=1_000_000, help="items; copies with noise are added up to it")
    parser.add_argument("--noise", type=float, default=0.3, help="length of a copy's noise, in lengths of its vector")
    parser.add_argument("--width", type=int, default=64, help="of made-up vectors")
    parser.add_argument("--metric", choices=["cosine", "dot"], default="cosine")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--kinds", default="ivf", help="approximate kinds, with commas; empty for none")
    parser.add_argument("--recall", type=float, default=0.95)
    chosen = parser.parse_args()
    items, users = vectors(chosen)
    results = exact(items, users, chosen)
    for kind in filter(None, chosen.kinds.split(",")):
        results += approximate(kind, items, users, chosen)
    finish(results, chosen)


def vectors(chosen: argparse.Namespace) -> tuple[Vectors, Vectors]:
    """Items (N, D) and users (M, D)."""
    rng = np.random.default_rng(0)
    given = chosen.vectors or chosen.run
    if given:
        items, users = of_run(given) if chosen.run else (load(given / f"{side}.npy") for side in ("items", "users"))
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
        if given and chosen.metric == "cosine":
            copies *= np.linalg.norm(items[:1]) / np.linalg.norm(copies, axis=1, keepdims=True)
        items = np.concatenate([items, copies])
    if chosen.metric == "cosine" and not given:
        items /= np.linalg.norm(items, axis=1, keepdims=True)
    return items, users


def load(path: Path) -> Vectors:
    return np.ascontiguousarray(np.load(path), np.float32)


def of_run(folder: Path) -> tuple[Vectors, Vectors]:
    """The vectors of a run's items and users, as they are when the test is asked."""
    from twotower import pipeline

    factors = pipeline.load(folder).factors()
    return factors.items.cpu().numpy(), factors.users.cpu().numpy()


def exact(items: Vectors, users: Vectors, chosen: argparse.Namespace) -> list[Numbers]:
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
                spent = timed(work) * 1e3 / (len(queries) if name.startswith("batch") else 1)
                if number >= 0:
                    times[name].append(spent)
    theirs = flat.search(queries, k)[1]
    agree = float(
        np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(theirs, ours.search(queries, k)[0], strict=True)])
    )
    middle = {name: spread(values)["median"] for name, values in times.items()}
    read = min(middle["single.read_sum"], middle["single.read_gemv"])
    shared = about(items, chosen) | {"agreement_with_faiss": round(agree, 5)}
    beside = f"{tool('faiss-cpu')} flat"
    name = f"search_speed: exact, {label(items, chosen)}"
    return [
        result(
            f"{name}, a query of a batch of {len(queries)}",
            times["batch.ours"],
            "ms",
            more=False,
            peers={beside: times["batch.faiss_flat"]},
            floor=middle["batch.matrix_product"],
            **shared,
        ),
        result(
            f"{name}, one query",
            times["single.ours"],
            "ms",
            more=False,
            peers={beside: times["single.faiss_flat"]},
            floor=read,
            read_gb_per_s=round(items.nbytes / read / 1e6, 1),
            **shared,
        ),
    ]


def label(items: Vectors, chosen: argparse.Namespace) -> str:
    return f"{len(items):,} x {items.shape[1]}, {chosen.threads} thread{'s' * (chosen.threads > 1)}"


def about(items: Vectors, chosen: argparse.Namespace) -> Numbers:
    given = {"items": len(items), "width": items.shape[1], "k": chosen.k, "metric": chosen.metric}
    return given | {"threads": chosen.threads, "vectors": "given" if chosen.vectors or chosen.run else "made up"}


def approximate(kind: str, items: Vectors, users: Vectors, chosen: argparse.Namespace) -> list[Numbers]:
    """Queries a second on one thread at the target recall, tuned with half of the users and measured with the others."""
    built: list[Any] = []
    seconds = timed(lambda: built.append(build(kind, items, np.arange(len(items)), chosen.metric)))
    index = built[0]
    print(f"{kind}: built in {seconds:.0f} s", file=sys.stderr)
    half = len(users) // 2
    index.threads = chosen.threads
    found = tune(index, users[:half], chosen.k, chosen.recall)
    index.threads = 1
    rates: dict[str, list[float]] = {"batch": [], "single": []}
    for _ in range(chosen.rounds):
        for name, size in (("batch", half), ("single", 1)):

            def ask(size: int = size) -> None:
                for start in range(half, 2 * half, size):
                    index.search(users[start : start + size], chosen.k)

            rates[name].append(half / timed(ask))
    met = recall(index, users[half:], chosen.k)
    shared = about(items, chosen) | {"threads": 1, "setting": str(found.setting), "recall": round(met, 4)}
    name = f"search_speed: {kind}, {len(items):,} x {items.shape[1]}, one thread"
    return [
        result(f"{name}, one query", [1e3 / rate for rate in rates["single"]], "ms", more=False, **shared),
        result(f"{name}, queries alone", rates["single"], "queries/s", **shared),
        result(f"{name}, queries in a batch", rates["batch"], "queries/s", **shared),
        result(f"{name}, recall@{chosen.k}", met, "", **shared),
        result(f"search_speed: {kind}, {label(items, chosen)}, built", seconds, "s", more=False, **shared),
    ]


if __name__ == "__main__":
    main()
