from argparse import Namespace

from benchmarks.lib.report import Report, declared
from benchmarks.scale.steps import torchrun


def main(chosen: Namespace, report: Report) -> None:
    for way, settings in declared(__file__)["ways"].items():
        steps = 6 if "replicated" in way else 30
        _, told = torchrun(2, threads=chosen.threads, steps=steps, size=chosen.size, changed=settings)
        name = f"two tables of {chosen.size:,} x 64, {way}"
        report.add(name, told["steps"], "steps/s")
        report.add(f"{name}, peak of a rank", told["peak"], "MB")
