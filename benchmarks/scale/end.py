import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np

from benchmarks.lib.machine import timed
from benchmarks.lib.processes import TWOTOWER, Server, Watch, Words, run, serving
from benchmarks.lib.report import Report
from benchmarks.scale.world import write_world


def main(chosen: Namespace, report: Report) -> None:
    folder = Path(chosen.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{chosen.items:,} items end to end"

    def stage(what: str, words: Words) -> None:
        report.add_cost(f"{name}, {what}", run(words))

    config = write_world(folder, chosen.users, chosen.items, chosen.rows)
    for made in ("prepared", "run", "vectors", "store"):
        shutil.rmtree(folder / made, ignore_errors=True)
    stage("prepare", [*TWOTOWER, "prepare", config, "--out", folder / "prepared"])
    prepared: Words = ["--set", f"data.prepared={folder / 'prepared'}"]
    stage("train", [*TWOTOWER, "train", config, *prepared, "--run", folder / "run"])
    stage("embed", [*TWOTOWER, "embed", folder / "run", folder / "items", "--out", folder / "vectors"])
    stage("publish", [*TWOTOWER, "publish", folder / "run", "--store", folder / "store"])
    with serving(folder / "store") as server, Watch(server.pid) as watch:
        report.add(f"{name}, serve, ready", server.seconds, "s")
        answers(report, name, server, chosen.users)
    report.add(f"{name}, serve, memory", watch.most, "MB")
    bundle = json.loads(next((folder / "store" / "bundles").glob("*/MANIFEST.json")).read_text())
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    check = bundle["recall_check"]
    report.add(f"{name}, bundle", sum(entry["size"] for entry in bundle["files"]) / 1e6, "MB")
    report.add(f"{name}, recall check at {check['k']}", check["recall"])
    report.add(f"{name}, test recall@100 of 300 users", metrics["test.recall@100"])
    report.add(f"{name}, popularity's", metrics["baseline.popularity.recall@100"])


def answers(report: Report, name: str, server: Server, users: int) -> None:
    """Measure answers by both methods, one request at a time."""
    rng = np.random.default_rng(3)

    def ask(user: int, method: int) -> None:
        found = server.get("/v1/recommend", {"user_id": str(user), "k": 100, "method": method})
        assert len(found["items"]) == 100

    for method in (1, 2):
        times = [timed(lambda u=u, m=method: ask(int(u), m)) for u in rng.integers(0, users, 400)][100:]  # type: ignore[misc]
        for what, share in (("p50", 0.5), ("p99", 0.99)):
            value = float(np.quantile(times, share)) * 1e3
            report.add(f"{name}, answer by method {method}, {what}", value, "ms")
