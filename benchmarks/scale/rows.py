import shutil
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.processes import TWOTOWER, run
from benchmarks.lib.report import Report, exponent
from benchmarks.scale.steps import torchrun
from benchmarks.scale.world import write_world


def main(chosen: Namespace, report: Report) -> None:
    folder = Path(chosen.folder).resolve() / "rows"
    costs: dict[str, list[float]] = {"prepare": [], "memory": []}
    for rows in chosen.sizes:
        name, config = f"{rows:,} interactions", write_world(folder, max(1_000, rows // 40), 100_000, rows)
        ran = run([*TWOTOWER, "prepare", config, "--out", folder / "prepared"])
        costs["prepare"].append(ran.seconds)
        costs["memory"].append(ran.memory)
        report.add(f"{name}, prepare", ran.seconds, "s", more=False)
        report.add(f"{name}, prepare, memory", ran.memory, "MB", more=False)
        for ranks in (1, 2):
            ran, told = torchrun(ranks, threads=max(1, chosen.threads // ranks), steps=300, folder=str(folder))
            what = f"{name}, training, {ranks} rank{'s' if ranks > 1 else ''}"
            report.add(what, told["rows"], "rows/s")
            report.add(f"{what}, memory", ran.memory, "MB", more=False)
        shutil.rmtree(folder)
    for what, found in costs.items():
        report.add(f"exponent of interactions, {what}", exponent(chosen.sizes, found), more=False)
