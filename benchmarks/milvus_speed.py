"""Measure one search in Milvus beside FAISS in process: 100,000 vectors of 64 numbers, ten results, each tuned to recall 0.95.

    python benchmarks/milvus_speed.py

The script starts a `milvus-lite server` on loopback and stops it at the end. `--uri http://HOST:19530` measures a cluster instead. Items and
queries are centres with noise; one half of the queries tunes the search parameters, the other half is measured, one query at a time. `build` is the
time until the index is saved, or its collection loaded.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measure import Numbers, finish, options, result

from twotower.index import load_index, measure_recall, tune_index
from twotower.index.faiss.ivf import Ivf
from twotower.index.milvus.milvus import Milvus
from twotower.index.protocol import IndexConfig

WIDTH, K, RECALL, CENTRES, NOISE = 64, 10, 0.95, 1_000, 1.5


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--uri", default="", help="address of a running Milvus; default: a milvus-lite server")
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, WIDTH))
    items, queries = (points(rng, centres, n) for n in (chosen.items, 1_000))
    found = measured("FAISS ivf, in process", items, queries, Ivf())
    with tempfile.TemporaryDirectory() as folder, milvus(Path(folder), chosen.uri) as uri:
        for place in (Milvus(uri=uri, prefix="speed", type="IVF_FLAT"), Milvus(uri=uri, prefix="speed", type="HNSW")):
            found += measured(f"Milvus {place.type}", items, queries, place)
    finish(found, chosen)


def points(rng: np.random.Generator, centres: Any, n: int) -> Any:
    made = (centres[rng.integers(0, len(centres), n)] + NOISE * rng.standard_normal((n, WIDTH))).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@contextmanager
def milvus(folder: Path, uri: str) -> Iterator[str]:
    if uri:
        yield uri
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("milvus-lite")), "server", "--data-dir", str(folder / "data"),
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


def measured(name: str, items: Any, queries: Any, config: IndexConfig) -> list[Numbers]:
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
        times = []
        for query in queries[half:]:
            started = time.perf_counter()
            asked.search(query[None], K)
            times.append((time.perf_counter() - started) * 1e3)
    name = f"milvus_speed: {len(items):,} x {WIDTH}, {name}"
    return [
        result(f"{name}, one search at recall {recall:.3f}", times[20:], "ms", more=False),
        result(f"{name}, build", built, "s", more=False),
    ]


if __name__ == "__main__":
    main()
