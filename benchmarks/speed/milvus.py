"""Measure one search in Milvus beside FAISS in process: 100,000 vectors of 64 numbers, ten results, each tuned to recall 0.95."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.lib.machine import timed
from benchmarks.lib.processes import free_port
from benchmarks.lib.report import Report
from benchmarks.lib.vectors import Clusters
from twotower.arrays.types import Vectors
from twotower.index import load_index, measure_recall, tune_index
from twotower.index.faiss.ivf import Ivf
from twotower.index.milvus.milvus import Milvus
from twotower.index.protocol import IndexConfig

WIDTH, K, RECALL = 64, 10, 0.95


def main(chosen: Namespace, report: Report) -> None:
    made = Clusters(1_000, WIDTH, 1.5)
    items, queries = made.points(chosen.items, 1), made.points(1_000, 2)
    with tempfile.TemporaryDirectory() as data, milvus(data, chosen.uri) as uri:
        measure(report, "FAISS ivf, in process", items, queries, Ivf())
        for place in (Milvus(uri=uri, prefix="speed", type="IVF_FLAT"), Milvus(uri=uri, prefix="speed", type="HNSW")):
            measure(report, f"Milvus {place.type}", items, queries, place)


@contextmanager
def milvus(data: str, uri: str) -> Iterator[str]:
    """Yield the address of a Milvus, which runs within the block."""
    if uri:
        yield uri
        return
    port = free_port()
    words = [str(Path(sys.executable).with_name("milvus-lite")), "server", "--data-dir", data,
             "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def measure(report: Report, name: str, items: Vectors, queries: Vectors, config: IndexConfig) -> None:
    """Measure one search of an index, and its build."""
    half = len(queries) // 2
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        index = config.build(items, np.arange(len(items)), "cosine")
        index.save(Path(folder) / "index")
        built = time.perf_counter() - started
        tune_index(index, queries[:half], K, RECALL)
        recall = measure_recall(index, queries[half:], K)
        asked = load_index(Path(folder) / "index", verify=False)
        asked.search_params, asked.threads = index.search_params, 1
        times = [1e3 * timed(lambda query=query: asked.search(query[None], K)) for query in queries[half:]]  # type: ignore[misc]
    name = f"{len(items):,} x {WIDTH}, {name}"
    report.add(f"{name}, one search at recall {recall:.3f}", times[20:], "ms", more=False)
    report.add(f"{name}, build", built, "s", more=False)
