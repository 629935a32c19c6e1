import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import twotower
from benchmarks.lib.machine import Numbers, blas, read, timed, tool
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report, declared
from benchmarks.lib.rounds import in_turns
from benchmarks.lib.vectors import Clusters, tuned
from twotower.arrays.types import Vectors
from twotower.index import build_index, load_index
from twotower.index.top_k import one_blas_thread
from twotower.index.vector_store import Similarity

DECLARED = declared(__file__)
KERNELS: dict[str, list[str]] = DECLARED["kernels"]
SHIPPED, OURS, CODED = "as shipped", "ours", "ours, int8"
QUERIES = 10  # so many queries at once are a matrix product for FAISS at its best
Works = dict[str, Callable[[], Any]]


def main(chosen: Namespace, report: Report) -> None:
    items, users = vectors(chosen)
    report.facts |= {"items": len(items), "width": items.shape[1], "k": chosen.k, "metric": chosen.metric}
    exact(report, items, users, chosen)
    for kind in chosen.kinds:
        approximate(report, kind, items, users, chosen)


def vectors(chosen: Namespace) -> tuple[Vectors, Vectors]:
    """Return items (N, D) and users (M, D)."""
    wanted, rng = 4 * chosen.batch, np.random.default_rng(0)
    if not chosen.run:
        made = Clusters(2000, chosen.width, 0.6)
        return made.points(chosen.scale, 1), made.points(wanted, 2)
    factors = twotower.load(chosen.run).factors()
    items, users = factors.items.cpu().numpy(), factors.users.cpu().numpy()
    users = users[rng.permutation(len(users))[:wanted]]
    copies = items[rng.integers(0, len(items), max(0, chosen.scale - len(items)))]
    size = np.linalg.norm(copies, axis=1, keepdims=True) * np.float32(chosen.noise / items.shape[1] ** 0.5)
    copies += size * rng.standard_normal(copies.shape, dtype=np.float32)
    if chosen.metric == "cosine":
        copies *= np.linalg.norm(items[:1]) / np.linalg.norm(copies, axis=1, keepdims=True)
    return np.concatenate([items, copies]), users


def exact(report: Report, items: Vectors, users: Vectors, chosen: Namespace) -> None:
    """Measure a query of a batch and one query alone, in milliseconds."""
    queries, flags = users[: chosen.batch], set(read("/proc/cpuinfo").split())
    tuned = [core for core, needs in KERNELS.items() if flags.issuperset(needs)] or ["its own kernel"]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "items.npy", items)
        np.save(Path(folder) / "queries.npy", queries)
        given = (folder, chosen.threads, chosen.k, chosen.metric)
        ways = SHIPPED, *tuned, OURS, CODED
        works = {way: partial(call, work, way, *given, environment=environment(way)) for way in ways}
        rounds = {way: [found for _, found in of] for way, of in in_turns(works, chosen.rounds).items()}
    told = {way: of[0] for way, of in rounds.items()}
    facts: Numbers = {"blas": {way: given["blas"] for way, given in told.items()}}
    facts["agreement_with_faiss"] = agreement(told[SHIPPED], told[OURS])
    agreed = agreement(told[OURS], told[CODED])
    beside = f"{tool('faiss-cpu')} flat"
    for kind, size in (("batch", len(queries)), ("single", 1)):
        times = {
            f"{task.removeprefix(kind)[1:]}, {way}": [1e3 * s / size for one in of for s in one["times"][task]]
            for way, of in rounds.items() for task in of[0]["times"] if task.startswith(kind)
        }  # fmt: skip
        what = f"a query of a batch of {size}" if kind == "batch" else "one query"
        peers = {way: values for way, values in times.items() if way.startswith("faiss")}
        shipped = peers.pop(f"faiss flat, {SHIPPED}")
        best = min(peers, key=lambda way: median(peers[way]))
        form, _, core = best.partition(", ")
        settings = f"distance_compute_blas_threshold={told[core]['threshold']}, OPENBLAS_CORETYPE={core}"
        more: Numbers = {"peers": {f"{beside}, at its best": peers[best], f"{beside}, as shipped": shipped}}
        more["floor"] = min(median(values) for way, values in times.items() if way.startswith("limit"))
        more["settings"] = {f"{beside}, at its best": settings + DECLARED["forms"].get(form, "")}
        more["tried"] = {way: round(median(values), 4) for way, values in times.items()}
        name = f"exact, {len(items):,} x {items.shape[1]}, {plural(chosen.threads)}, {what}"
        report.add(name, times[f"search, {OURS}"], "ms", **more, **facts, **settings_doubt(told, items.shape[1]))
        name = name.replace("exact", "exact int8", 1)
        whole: Numbers = {"peers": {"fp32": times[f"search, {OURS}"]}, "agreement_with_fp32": agreed}
        report.add(name, times[f"search, {CODED}"], "ms", **whole, megabytes=told[CODED]["megabytes"])


def agreement(one: Numbers, other: Numbers) -> float:
    """Return the share of the results of one way that another has."""
    both = zip(one["found"], other["found"], strict=True)
    return round(float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in both])), 5)


def megabytes() -> float:
    """Return the memory of this process that no file backs."""
    line = next(line for line in read("/proc/self/status").splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def plural(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def environment(way: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE" or way in (OURS, CODED)}
    # OMP_NUM_THREADS is of a thread that IndexShards begins: its threads are those of the shards.
    return found | ({"OPENBLAS_CORETYPE": way, "OMP_NUM_THREADS": "1"} if way in KERNELS else {})


def settings_doubt(told: Mapping[str, Numbers], width: int) -> dict[str, str]:
    """Return a doubt if FAISS at its best ran without the requested threshold or kernels."""
    for way in set(told) - {SHIPPED, OURS, CODED}:
        threshold, core = told[way]["threshold"], told[way]["blas"].get("faiss", "")
        if threshold != QUERIES * width:
            return {"doubt": f"FAISS's distance_compute_blas_threshold is {threshold}, not {QUERIES * width}"}
        if way in KERNELS and core.upper() != way:
            return {"doubt": f"FAISS's OpenBLAS runs {core or 'unknown kernels'}, not those of {way}"}
    return {}


def approximate(report: Report, kind: str, items: Vectors, users: Vectors, chosen: Namespace) -> None:
    """Measure an approximate index at the target recall on one thread, tuned with half of the users."""
    index, built, _, recall = tuned(kind, items, users, chosen.metric, chosen.k, chosen.recall, chosen.threads)
    half, index.threads = len(users) // 2, 1

    def rate(size: int) -> float:
        starts = range(half, 2 * half, size)
        return half / timed(lambda: [index.search(users[at : at + size], chosen.k) for at in starts])

    rates = in_turns({"batch": partial(rate, half), "alone": partial(rate, 1)}, chosen.rounds)
    size, facts = f"{len(items):,} x {items.shape[1]}", {"setting": str(index.search_params)}
    name = f"{kind}, {size}, one thread"
    report.add(f"{name}, one query", [1e3 / rate for rate in rates["alone"]], "ms", **facts)
    report.add(f"{name}, queries alone", rates["alone"], "queries/s", **facts)
    report.add(f"{name}, queries in a batch", rates["batch"], "queries/s", **facts)
    report.add(f"{name}, recall@{chosen.k}", recall, **facts)
    report.add(f"{kind}, {size}, {plural(chosen.threads)}, built", built, "s", **facts)


def work(way: str, folder: str, threads: int, k: int, metric: Similarity) -> Numbers:
    """Run the tasks of a way. Returns seconds, the results of the first task, the threshold and BLAS kernels."""
    items, queries = np.load(Path(folder) / "items.npy"), np.load(Path(folder) / "queries.npy")
    threshold, asked, held = None, {"batch": queries, "single": queries[:1]}, 0.0
    if way in (OURS, CODED):
        saved = Path(folder) / way
        if not saved.exists():
            store = "int8" if way == CODED else "fp32"
            build_index("exact", items, np.arange(len(items)), metric, {"store": store}).save(saved)
        del items
        before = megabytes()
        ours = load_index(saved)
        ours.threads, held = threads, megabytes() - before
        works: Works = {f"{n} search": lambda q=q: ours.search(q, k)[0] for n, q in asked.items()}  # type: ignore[misc]
    else:
        threshold, works = faiss_works(way, items, asked, threads, k)
    found = {task: one() for task, one in works.items()}  # which also warms them up
    counts = {task: 1 if task.startswith("batch") else 5 for task in works}
    times = {task: [timed(one) for _ in range(counts[task])] for task, one in works.items()}
    answer = next(iter(found.values())).tolist()
    return {"times": times, "found": answer, "threshold": threshold, "blas": blas(), "megabytes": held}


def faiss_works(way: str, items: Vectors, asked: dict[str, Vectors], threads: int, k: int) -> tuple[int, Works]:
    """Return FAISS's threshold of matrix products, and its tasks."""
    import faiss as module

    faiss: Any = module
    n, width = items.shape
    if way != SHIPPED:
        faiss.cvar.distance_compute_blas_threshold = QUERIES * width
    faiss.omp_set_num_threads(threads)

    def searches(name: str, search: Callable[[Vectors], Any]) -> Works:
        return {f"{kind} {name}": lambda some=some: search(some)[1] for kind, some in asked.items()}  # type: ignore[misc]

    flat = faiss.IndexFlatIP(width)
    flat.add(items)
    works = searches("faiss flat", lambda some: flat.search(some, k))
    if way != SHIPPED:
        # numpy asks for huge pages, which FAISS's own store does not.
        works |= searches("faiss knn", lambda some: faiss.knn(some, items, k, metric=faiss.METRIC_INNER_PRODUCT))
        works |= limits(items, asked["batch"], threads)
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
