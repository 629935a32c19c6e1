"""Measure search speed beside FAISS in one run: milliseconds of a query over a million vectors.

    .venv/bin/python benchmarks/search_speed.py
    .venv/bin/python benchmarks/search_speed.py --vectors FOLDER --scale 1000000 --kinds ivf,hnsw
    .venv/bin/python benchmarks/search_speed.py --run runs/retrieve --scale 1000000 --metric dot --threads 1

FOLDER holds items.npy (N, D) and users.npy (M, D), float32; `--run` takes those of a trained run. `--scale` adds copies
of the items with a little noise up to that number. Without either, items and queries come from the same clusters.

Exact search: the package and FAISS's flat index, on the same threads, each in its own process; rounds alternate, and one
process works at a time. FAISS is measured as shipped and at its best: `distance_compute_blas_threshold` at ten queries, every
kernel of OPENBLAS_CORETYPE that the processor can run, one index, faiss.knn or, on several threads, IndexShards; the best
median is the row, for a batch and for one query. The limit is the matrix product alone, by numpy with the fastest of the
same kernels (a batch), or the fastest of three passes over the vectors (one query).
Approximate search: one thread, one process; recall against exact search with users as queries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import Numbers, blas, finish, options, result, timed, tool

from twotower.arrays.types import Vectors
from twotower.index import build_index, measure_recall, tune_index
from twotower.index.blas_threads import one_blas_thread
from twotower.index.exact import Exact
from twotower.index.vector_store import Metric

SHIPPED, OURS = "as shipped", "ours"
QUERIES = 10
"""So many queries at once are a matrix product for FAISS at its best."""
KERNELS = {"HASWELL": {"avx2", "fma"}, "SKYLAKEX": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}}
"""Kernels of OpenBLAS 0.3.15 and the flags of a processor that can run them."""


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--vectors", type=Path, help="folder with items.npy and users.npy; default: made data")
    parser.add_argument("--run", type=Path, help="trained run whose items and users are read")
    parser.add_argument("--scale", type=int, default=1_000_000, help="number of items, reached by copies with noise")
    parser.add_argument(
        "--noise", type=float, default=0.3, help="length of the noise of a copy, in lengths of its vector"
    )
    parser.add_argument("--width", type=int, default=64, help="width of made vectors")
    parser.add_argument("--metric", choices=["cosine", "dot"], default="cosine")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--kinds", default="ivf", help="approximate kinds, separated by commas; empty: none")
    parser.add_argument("--recall", type=float, default=0.95)
    chosen = parser.parse_args()
    items, users = vectors(chosen)
    results = exact(items, users, chosen)
    for kind in filter(None, chosen.kinds.split(",")):
        results += approximate(kind, items, users, chosen)
    finish(results, chosen)


def vectors(chosen: argparse.Namespace) -> tuple[Vectors, Vectors]:
    """Return items (N, D) and users (M, D)."""
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
    """Return the vectors of a run's items and users at the time of the test."""
    from twotower import api

    factors = api.load(folder).factors()
    return factors.items.cpu().numpy(), factors.users.cpu().numpy()


FORMS = {"faiss shards": ", IndexShards, OMP_NUM_THREADS=1", "faiss knn": ", faiss.knn over a numpy array"}
"""Ways to search all vectors beside IndexFlatIP, and what sets them apart."""


def exact(items: Vectors, users: Vectors, chosen: argparse.Namespace) -> list[Numbers]:
    """Return the results for a query of a batch and for one query alone, in milliseconds."""
    size = min(chosen.batch, len(users))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    tuned = [core for core, needs in KERNELS.items() if needs <= set(flags.split())] or ["its own kernel"]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        np.save(folder / "items.npy", items)
        np.save(folder / "queries.npy", users[:size])
        ask = {way: stack.enter_context(worker(way, folder, chosen)) for way in (SHIPPED, *tuned, OURS)}
        told = {way: answer("about")[0] for way, answer in ask.items()}
        times: dict[str, dict[str, list[float]]] = {"batch": {}, "single": {}}
        for number in range(-1, chosen.rounds):
            for way, answer in ask.items():
                for work in told[way]["works"]:
                    kind = work.partition(" ")[0]
                    spent = [s * 1e3 / (size if kind == "batch" else 1) for s in answer(work)]
                    if number >= 0:
                        times[kind].setdefault(f"{work.partition(' ')[2]}, {way}", []).extend(spent)
        for answer in ask.values():
            answer("save")
        agree = share_of_equal(np.load(folder / f"{SHIPPED}.npy"), np.load(folder / f"{OURS}.npy"))
    results = []
    for kind, what in (("batch", f"a query of a batch of {size}"), ("single", "one query")):
        floor = min(median(values) for way, values in times[kind].items() if way.startswith("limit"))
        quick = {way: values for way, values in times[kind].items() if way.startswith("faiss")}
        shipped = quick.pop(f"faiss flat, {SHIPPED}")
        best = min(quick, key=lambda way: median(quick[way]))
        core = best.rpartition(", ")[2]
        beside = f"{tool('faiss-cpu')} flat"
        results.append(
            result(
                f"search_speed: exact, {label(items, chosen)}, {what}",
                times[kind][f"search, {OURS}"],
                "ms",
                more=False,
                peers={f"{beside}, at its best": quick[best], f"{beside}, as shipped": shipped},
                floor=floor,
                **shared_facts(items, chosen),
                agreement_with_faiss=agree,
                settings={
                    f"{beside}, at its best": f"distance_compute_blas_threshold={told[core]['threshold']}, "
                    f"OPENBLAS_CORETYPE={core}{FORMS.get(best.partition(',')[0], '')}"
                },
                tried={way: round(median(values), 4) for way, values in times[kind].items()},
                blas={way: given["blas"] for way, given in told.items()},
                **({"read_gb_per_s": round(items.nbytes / floor / 1e6, 1)} if kind == "single" else {}),
                **settings_doubt(told, items.shape[1]),
            )
        )
    return results


def settings_doubt(told: Mapping[str, Numbers], width: int) -> dict[str, str]:
    """Return a doubt if FAISS at its best ran without the requested threshold or kernels."""
    for way, given in told.items():
        if way in (SHIPPED, OURS):
            continue
        if given["threshold"] != QUERIES * width:
            return {"doubt": f"FAISS's distance_compute_blas_threshold is {given['threshold']}, not {QUERIES * width}"}
        core = given["blas"].get("faiss", "")
        if way in KERNELS and core.upper() != way:
            return {"doubt": f"FAISS's OpenBLAS runs {core or 'unknown kernels'}, not those of {way}"}
    return {}


def share_of_equal(one: Any, other: Any) -> float:
    return round(float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(one, other, strict=True)])), 5)


@contextmanager
def worker(way: str, folder: Path, chosen: argparse.Namespace) -> Iterator[Callable[[str], list[Any]]]:
    """Yield a function that runs a task in another process and returns its seconds or its output."""
    words = [sys.executable, str(Path(__file__).resolve()), "--worker", way, str(folder)]
    words += [str(chosen.threads), str(chosen.k), chosen.metric]
    environment = dict(os.environ)
    if way != OURS:
        environment.pop("OPENBLAS_CORETYPE", None)
    if way in KERNELS:
        environment["OPENBLAS_CORETYPE"] = way
        environment["OMP_NUM_THREADS"] = "1"  # of a thread that IndexShards begins: its threads are those of the shards
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(work: str) -> list[Any]:
            process.stdin.write(work + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            line = process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise SystemExit(f"the process of {way!r} ended with code {process.wait()}")
            answer: list[Any] = json.loads(line)
            return answer

        try:
            yield ask
        finally:
            process.stdin.close()
            process.wait()


def work_for(way: str, folder: Path, threads: int, k: int, metric: Metric) -> None:
    """Run the tasks named by the lines of stdin, in the process of `worker`."""
    items, queries = np.load(folder / "items.npy"), np.load(folder / "queries.npy")
    one: Vectors = queries[:1]
    n, width = items.shape
    about: Numbers = {"threshold": None}
    works: dict[str, Callable[[], Any]] = {}
    if way == OURS:
        ours = Exact().build(items, np.arange(n), metric)
        ours.threads = threads
        del items
        works = {"batch search": lambda: ours.search(queries, k)[0], "single search": lambda: ours.search(one, k)[0]}
    else:
        import faiss as module

        faiss: Any = module
        if way != SHIPPED:
            faiss.cvar.distance_compute_blas_threshold = QUERIES * width
        about["threshold"] = faiss.cvar.distance_compute_blas_threshold
        faiss.omp_set_num_threads(threads)
        flat = faiss.IndexFlatIP(width)
        flat.add(items)
        works = {
            "batch faiss flat": lambda: flat.search(queries, k)[1],
            "single faiss flat": lambda: flat.search(one, k)[1],
        }
        if way != SHIPPED:
            # numpy asks for huge pages, which FAISS's own store does not.
            measure = faiss.METRIC_INNER_PRODUCT
            works |= {
                "batch faiss knn": lambda: faiss.knn(queries, items, k, metric=measure)[1],
                "single faiss knn": lambda: faiss.knn(one, items, k, metric=measure)[1],
            }
            works |= limits(items, queries, threads)
        if way != SHIPPED and threads > 1:
            shards = faiss.IndexShards(width, True, True)
            parts = [faiss.IndexFlatIP(width) for _ in range(threads)]
            for number, part in enumerate(parts):
                part.add(items[n * number // threads : n * (number + 1) // threads])
                shards.add_shard(part)
            works |= {
                "batch faiss shards": lambda: shards.search(queries, k)[1],
                "single faiss shards": lambda: shards.search(one, k)[1],
            }
    works[next(iter(works))]()
    about |= {"works": list(works), "blas": blas()}
    for line in map(str.strip, sys.stdin):
        if line == "about":
            said: list[Any] = [about]
        elif line == "save":
            np.save(folder / f"{way}.npy", next(iter(works.values()))())
            said = []
        else:
            said = [timed(works[line]) for _ in range(1 if line.startswith("batch") else 5)]
        print(json.dumps(said), flush=True)


def limits(items: Vectors, queries: Vectors, threads: int) -> dict[str, Callable[[], object]]:
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


def label(items: Vectors, chosen: argparse.Namespace) -> str:
    return f"{len(items):,} x {items.shape[1]}, {chosen.threads} thread{'s' * (chosen.threads > 1)}"


def shared_facts(items: Vectors, chosen: argparse.Namespace) -> Numbers:
    given = {"items": len(items), "width": items.shape[1], "k": chosen.k, "metric": chosen.metric}
    return given | {"threads": chosen.threads, "vectors": "given" if chosen.vectors or chosen.run else "made up"}


def approximate(kind: str, items: Vectors, users: Vectors, chosen: argparse.Namespace) -> list[Numbers]:
    """Return the results of an approximate index at the target recall on one thread, tuned with half of the users, measured with the others."""
    built: list[Any] = []
    seconds = timed(lambda: built.append(build_index(kind, items, np.arange(len(items)), chosen.metric)))
    index = built[0]
    print(f"{kind}: built in {seconds:.0f} s", file=sys.stderr)
    half = len(users) // 2
    index.threads = chosen.threads
    tune_index(index, users[:half], chosen.k, chosen.recall)
    index.threads = 1
    rates: dict[str, list[float]] = {"batch": [], "single": []}
    for _ in range(chosen.rounds):
        for name, size in (("batch", half), ("single", 1)):

            def ask(size: int = size) -> None:
                for start in range(half, 2 * half, size):
                    index.search(users[start : start + size], chosen.k)

            rates[name].append(half / timed(ask))
    met = measure_recall(index, users[half:], chosen.k)
    shared = shared_facts(items, chosen) | {"threads": 1, "setting": str(index.search_params), "recall": round(met, 4)}
    name = f"search_speed: {kind}, {len(items):,} x {items.shape[1]}, one thread"
    return [
        result(f"{name}, one query", [1e3 / rate for rate in rates["single"]], "ms", more=False, **shared),
        result(f"{name}, queries alone", rates["single"], "queries/s", **shared),
        result(f"{name}, queries in a batch", rates["batch"], "queries/s", **shared),
        result(f"{name}, recall@{chosen.k}", met, "", **shared),
        result(f"search_speed: {kind}, {label(items, chosen)}, built", seconds, "s", more=False, **shared),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work_for(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])  # type: ignore[arg-type]
    else:
        main()
