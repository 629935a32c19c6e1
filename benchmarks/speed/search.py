"""Measure search speed beside FAISS in one run: milliseconds of a query over a million vectors."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import twotower
from benchmarks.lib.machine import Numbers, read, timed, tool
from benchmarks.lib.processes import PYTHON, Conversation
from benchmarks.lib.report import Report, declared
from benchmarks.lib.vectors import Clusters
from benchmarks.speed.search_worker import OURS, QUERIES, SHIPPED
from twotower.arrays.types import Vectors
from twotower.index import build_index, measure_recall, tune_index

DECLARED = declared(__file__)
KERNELS: dict[str, list[str]] = DECLARED["kernels"]


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


def label(items: Vectors, threads: int) -> str:
    return f"{len(items):,} x {items.shape[1]}, {threads} thread{'s' * (threads > 1)}"


def exact(report: Report, items: Vectors, users: Vectors, chosen: Namespace) -> None:
    """Measure a query of a batch and one query alone, in milliseconds."""
    size = min(chosen.batch, len(users))
    flags = set(read("/proc/cpuinfo").split())
    tuned = [core for core, needs in KERNELS.items() if flags.issuperset(needs)] or ["its own kernel"]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        np.save(folder / "items.npy", items)
        np.save(folder / "queries.npy", users[:size])
        ways = {way: stack.enter_context(worker(way, folder, chosen)) for way in (SHIPPED, *tuned, OURS)}
        told = {way: talk.ask("about") for way, talk in ways.items()}
        times: dict[str, dict[str, list[float]]] = {"batch": {}, "single": {}}
        for number in range(-1, chosen.rounds):
            for way, talk in ways.items():
                for work in told[way]["works"]:
                    kind, _, what = work.partition(" ")
                    spent = [s * 1e3 / (size if kind == "batch" else 1) for s in talk.ask(work)]
                    if number >= 0:
                        times[kind].setdefault(f"{what}, {way}", []).extend(spent)
        found = [np.array(talk.ask("results")) for way, talk in ways.items() if way in (SHIPPED, OURS)]
        agree = float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(*found, strict=True)]))
    beside = f"{tool('faiss-cpu')} flat"
    for kind, what in (("batch", f"a query of a batch of {size}"), ("single", "one query")):
        quick = {way: values for way, values in times[kind].items() if way.startswith("faiss")}
        shipped = quick.pop(f"faiss flat, {SHIPPED}")
        best = min(quick, key=lambda way: median(quick[way]))
        form, _, core = best.partition(", ")
        settings = f"distance_compute_blas_threshold={told[core]['threshold']}, OPENBLAS_CORETYPE={core}"
        report.add(
            f"exact, {label(items, chosen.threads)}, {what}",
            times[kind][f"search, {OURS}"],
            "ms",
            more=False,
            peers={f"{beside}, at its best": quick[best], f"{beside}, as shipped": shipped},
            floor=min(median(values) for way, values in times[kind].items() if way.startswith("limit")),
            agreement_with_faiss=round(agree, 5),
            settings={f"{beside}, at its best": settings + DECLARED["forms"].get(form, "")},
            tried={way: round(median(values), 4) for way, values in times[kind].items()},
            blas={way: given["blas"] for way, given in told.items()},
            **settings_doubt(told, items.shape[1]),
        )


def worker(way: str, folder: Path, chosen: Namespace) -> Conversation:
    """Start the process that searches in a way."""
    environment = dict(os.environ)
    if way != OURS:
        environment.pop("OPENBLAS_CORETYPE", None)
    if way in KERNELS:
        environment["OPENBLAS_CORETYPE"] = way
        environment["OMP_NUM_THREADS"] = "1"  # of a thread that IndexShards begins: its threads are those of the shards
    words = [*PYTHON, "benchmarks.speed.search_worker", way, folder, chosen.threads, chosen.k, chosen.metric]
    return Conversation(words, environment)


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


def approximate(report: Report, kind: str, items: Vectors, users: Vectors, chosen: Namespace) -> None:
    """Measure an approximate index at the target recall on one thread, tuned with half of the users, measured with the others."""
    built: list[Any] = []
    seconds = timed(lambda: built.append(build_index(kind, items, np.arange(len(items)), chosen.metric)))
    index = built[0]
    half = len(users) // 2
    index.threads = chosen.threads
    tune_index(index, users[:half], chosen.k, chosen.recall)
    index.threads = 1
    rates: dict[int, list[float]] = {half: [], 1: []}
    for _ in range(chosen.rounds):
        for size, found in rates.items():

            def ask(size: int = size) -> None:
                for start in range(half, 2 * half, size):
                    index.search(users[start : start + size], chosen.k)

            found.append(half / timed(ask))
    name, facts = f"{kind}, {len(items):,} x {items.shape[1]}, one thread", {"setting": str(index.search_params)}
    report.add(f"{name}, one query", [1e3 / rate for rate in rates[1]], "ms", more=False, **facts)
    report.add(f"{name}, queries alone", rates[1], "queries/s", **facts)
    report.add(f"{name}, queries in a batch", rates[half], "queries/s", **facts)
    report.add(f"{name}, recall@{chosen.k}", measure_recall(index, users[half:], chosen.k), **facts)
    report.add(f"{kind}, {label(items, chosen.threads)}, built", seconds, "s", more=False, **facts)
