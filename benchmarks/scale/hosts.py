import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report
from benchmarks.speed.embedding import fresh_run, write_items
from twotower import runs

sys.path.append(str(ROOT / "tests"))

from hosts import Command, missing
from ray_hosts import Cluster, ray_cluster


def main(chosen: Namespace, report: Report) -> None:
    if why := missing():
        sys.exit(why)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table, fresh = write_items(folder, chosen.rows), fresh_run("hash")
        made = replace(fresh, metrics={"train.best_epoch": 1}, history=[{"epoch": 1, "step": 1, "train.loss": 1.0}])
        runs.start_run(folder / "run", made.dataset, made.config)
        runs.save_run(folder / "run", made)
        with ray_cluster(folder / "run", [f"worker{i}" for i in range(chosen.workers)]) as cluster:
            cluster.put(table)
            measure(cluster, chosen, report)


def measure(cluster: Cluster, chosen: Namespace, report: Report) -> None:
    """Embed by one process, by the cluster, and by the cluster that loses a worker after half of the shards."""
    head, shards = cluster.head, -(-chosen.rows // chosen.shard_rows)

    def lose_half_way(out: str, job: Command) -> None:
        while len(cluster.done(out)) < shards / 2 and job.poll() is None:
            time.sleep(0.1)
        cluster.workers[-1].close()

    ways: dict[str, tuple[str, int, Callable[[str, Command], None]]] = {
        "one process": ("local", chosen.workers, lambda *_: None),
        f"Ray, {chosen.workers} hosts": ("ray", 1, lambda *_: None),
        f"Ray, {chosen.workers} hosts, one lost half-way": ("ray", 1, lose_half_way),
    }
    seconds = {}
    for number, (way, (engine, threads, meanwhile)) in enumerate(ways.items()):
        began, out = time.perf_counter(), f"out{number}"
        job = cluster.embed(head, out, engine, chosen.shard_rows, threads)
        meanwhile(out, job)
        if job.wait(3600):
            sys.exit(job.said)
        seconds[way] = time.perf_counter() - began
        report.add(f"{chosen.rows:,} items, {way}", seconds[way], "s")
        report.add(f"{chosen.rows:,} items, {way}, times one process", seconds[way] / seconds["one process"])
        for file in (name for name in cluster.listed("out0") if name.startswith("part-")):
            if cluster.read(out, file) != cluster.read("out0", file):
                sys.exit(f"{way}: {file} is another file than that of one process")
