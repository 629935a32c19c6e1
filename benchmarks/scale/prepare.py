import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.processes import ROOT, TWOTOWER, run
from benchmarks.lib.report import Report
from benchmarks.scale.world import write_world


def main(chosen: Namespace, report: Report) -> None:
    folder = Path(chosen.folder).resolve() / "prepare"
    config = write_world(folder, max(1_000, chosen.rows // 40), 100_000, chosen.rows)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        run(["git", "worktree", "add", "--quiet", "--detach", base, chosen.base])
        try:
            ways = {
                "before": (base, []),
                **{e: (ROOT, ["--engine", e, "--memory", chosen.memory]) for e in chosen.engines},
            }
            for turn in range(chosen.turns):
                for way, (tree, options) in ways.items():
                    out = folder / f"prepared-{way}"
                    shutil.rmtree(out, ignore_errors=True)
                    environment = os.environ | {"PYTHONPATH": f"{tree}/src"}
                    ran = run([*TWOTOWER, "prepare", config, "--out", out, *options], environment=environment)
                    name = f"{chosen.rows:,} interactions, {way}, turn {turn + 1}"
                    report.add(name, ran.seconds, "s", more=False)
                    report.add(f"{name}, memory", ran.memory, "MB", more=False)
        finally:
            run(["git", "worktree", "remove", "--force", base])
    shutil.rmtree(folder)
