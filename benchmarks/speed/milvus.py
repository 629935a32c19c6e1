import socket
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.lib.processes import Words, free_port, started
from benchmarks.lib.report import Report
from benchmarks.lib.vectors import Clusters, search_times, tuned
from twotower.index import load_index
from twotower.index.faiss.ivf import Ivf
from twotower.index.milvus.milvus import Milvus
from twotower.index.protocol import IndexConfig

WIDTH, K, RECALL = 64, 10, 0.95


def main(chosen: Namespace, report: Report) -> None:
    made = Clusters(1_000, WIDTH, 1.5)
    items, queries = made.points(chosen.items, 1), made.points(1_000, 2)
    with tempfile.TemporaryDirectory() as data, milvus(data, chosen.uri) as uri:
        kinds: dict[str, IndexConfig] = {"FAISS ivf, in process": Ivf()}
        kinds |= {f"Milvus {t}": Milvus(uri=uri, prefix="speed", type=t) for t in ("IVF_FLAT", "HNSW")}
        for name, kind in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                to = Path(folder) / "index"
                found = tuned(kind, items, queries, "cosine", K, RECALL, save=to)
                index = load_index(to, verify=False)
                index.search_params = found.made.search_params
                times = search_times(index, queries[len(queries) // 2 :], K)[20:]
            name = f"{len(items):,} x {WIDTH}, {name}"
            report.add(f"{name}, one search at recall {found.recall:.3f}", times, "ms")
            report.add(f"{name}, build", found.built, "s")


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextmanager
def milvus(data: str, uri: str) -> Iterator[str]:
    """Yield the address of a Milvus, which runs within the block."""
    if uri:
        yield uri
        return
    port, program = free_port(), Path(sys.executable).with_name("milvus-lite")
    words: Words = [program, "server", "--data-dir", data, "--host", "127.0.0.1", "--port", port]
    with started(words, lambda: listens(port)):
        yield f"http://127.0.0.1:{port}"
