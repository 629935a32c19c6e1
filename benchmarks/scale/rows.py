import shutil
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.processes import TWOTOWER, run
from benchmarks.lib.report import Report
from benchmarks.scale.steps import torchrun
from benchmarks.scale.world import write_world


def main(chosen: Namespace, report: Report) -> None:
    folder, prepared = Path(chosen.folder).resolve() / "rows", []
    for rows in chosen.sizes:
        name, config = f"{rows:,} interactions", write_world(folder, max(1_000, rows // 40), 100_000, rows)
        prepared.append(run([*TWOTOWER, "prepare", config, "--out", folder / "prepared"]))
        report.add_cost(f"{name}, prepare", prepared[-1])
        for ranks in (1, 2):
            ran, told = torchrun(ranks, threads=max(1, chosen.threads // ranks), steps=300, folder=str(folder))
            what = f"{name}, training, {ranks} rank{'s' if ranks > 1 else ''}"
            report.add(what, told["rows"], "rows/s")
            report.add(f"{what}, memory", ran.memory, "MB")
        shutil.rmtree(folder)
    report.add_exponent("exponent of interactions, prepare", chosen.sizes, [ran.seconds for ran in prepared])
    report.add_exponent("exponent of interactions, memory", chosen.sizes, [ran.memory for ran in prepared])
