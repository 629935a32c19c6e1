import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report
from benchmarks.lib.vectors import Clusters, search_times, tuned

WIDTH, K, RECALL = 64, 100, 0.95


def main(chosen: Namespace, report: Report) -> None:
    found = []
    for items in chosen.sizes:
        ran, told = call(index_items, items)
        name = f"{items:,} items ({told['kind']})"
        report.add(f"{name}, build and tune", told["build"], "s")
        report.add(f"{name}, one search at recall {told['recall']:.3f}", told["search"], "ms")
        report.add(f"{name}, index on disk", told["bytes"] / 1e6, "MB")
        report.add(f"{name}, memory to build", ran.memory, "MB")
        found.append(told | {"memory": ran.memory})
    for what in ("build", "search", "memory"):
        report.add_exponent(f"exponent of items, {what}", chosen.sizes, [one[what] for one in found])


def index_items(items: int) -> Numbers:
    """Build, tune and search the index that is chosen for a number of items."""
    made, k = Clusters(1_000, WIDTH, 0.7), min(K, items)
    queries = made.points(1000, 2)
    index, built, spent, recall = tuned("auto", made.points(items, 1), queries, "cosine", k, RECALL + (1 - RECALL) / 5)
    search = statistics.median(search_times(index, queries[500:700], k))
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return {"kind": index.kind, "build": built + spent, "recall": recall, "search": search, "bytes": size}
