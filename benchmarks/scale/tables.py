"""Measure two tables of a million rows by 64, trained by two ranks of one thread: whole on each, and sharded (TorchRec)."""

from __future__ import annotations

import json
from argparse import Namespace

from benchmarks.lib.processes import TORCHRUN, run
from benchmarks.lib.report import Report, declared


def main(chosen: Namespace, report: Report) -> None:
    script = ["-m", "benchmarks.scale.steps", "--threads", chosen.threads, "--size", chosen.size]
    for way, settings in declared(__file__)["ways"].items():
        steps = 6 if "replicated" in way else 30
        said = run([*TORCHRUN, 2, *script, "--steps", steps, *(f"--set={s}" for s in settings)]).said
        told = json.loads(said[said.index("{") : said.index("}") + 1])
        name = f"two tables of {chosen.size:,} x 64, {way}"
        report.add(name, told["steps"], "steps/s")
        report.add(f"{name}, peak of a rank", told["peak"], "MB", more=False)
