"""Run every benchmark, one after another, and write the tables of the documents: `make bench`.

    TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python -m benchmarks.suite --date 2026-01-31 --run runs/bench

Each step of suite.toml writes FOLDER/STEP.json and FOLDER/STEP.log. A step that fails does not stop the others; its rows read "not run" in the
tables, and the exit code is 1. `--only STEP,STEP` runs some steps and keeps the results of the others, also in tables and sections. `--resume` keeps
the finished rows of the scripts of quality. `--quick` runs a small version of each step, a test without meaningful numbers, whose tables stay
in FOLDER.

Run nothing else meanwhile: most numbers are of two cores, and the load generator needs one of them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.lib import page
from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import PYTHON, ROOT, TWOTOWER, run
from benchmarks.lib.report import declared, options, result, save

STEPS: dict[str, Numbers] = declared(__file__)["steps"]


def words(step: Numbers, quick: bool, fill: Mapping[str, str]) -> list[str]:
    """Return the command of a step."""
    text = step["quick"] if quick and "quick" in step else step["run"]
    program, *given = (word.format(**fill) for word in text.split())
    if program == "twotower":
        return [*TWOTOWER, *given]
    small = ["--quick"] if quick and "quick" not in step else []
    return [*PYTHON, f"benchmarks.{program}", *(word for word in given if word), *small]


def main(arguments: Sequence[str] | None = None, steps: Mapping[str, Numbers] = STEPS) -> None:
    """Run the steps of a command line, by default that of this process. Exits with a message if one fails."""
    chosen = options(__doc__, __file__, arguments)
    wanted = [name for name in chosen.only if name] or list(steps)
    if strange := sorted(set(wanted) - set(steps)):
        sys.exit(f"--only: no step {strange[0]!r}; choose from {', '.join(steps)}")
    if not chosen.date:
        sys.exit("name the date of the run: --date 2026-01-31")
    if not os.environ.get("TWOTOWER_DATA"):
        sys.exit("name the archive: export TWOTOWER_DATA=path/to/ml-1m.zip")
    folder = Path(chosen.run).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    fill = {
        "run": str(folder),
        "sequences": f"--sequences={Path(chosen.sequences).resolve()}" if chosen.sequences else "",
        "server": str(cores[0]),
        "generator": str(cores[-1]),
    }
    failed = []
    for name in steps:
        if name in wanted and not run_step(
            name, steps[name], folder, words(steps[name], chosen.quick, fill), chosen.resume
        ):
            failed.append(name)
    readmes = [] if chosen.quick else [ROOT / "README.md", ROOT / "README.zh-CN.md"]
    to = folder / "benchmarks.md" if chosen.quick else ROOT / "docs" / "benchmarks.md"
    try:
        page.write(folder, chosen.date, to, readmes, keep=wanted != list(steps))
    except ValueError as e:
        print(f"error: {e}")
        failed.append("table")
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}; see {chosen.run}/*.log")
    print("every step ran")


def run_step(name: str, step: Numbers, folder: Path, command: list[str], resume: bool) -> bool:
    """Run a step. Returns False if it fails."""
    out = folder / f"{name}.json"
    if command[2] != "twotower":
        command = [*command, "--out", str(out)]
    if not resume:
        out.unlink(missing_ok=True)
    for made in step.get("makes", []):
        shutil.rmtree(folder / made, ignore_errors=True)
    print(f"{time.strftime('%H:%M:%S')} {name} …", end=" ", flush=True)
    try:
        ran = run(command, (folder / f"{name}.log").open("w+"))
    except ChildProcessError as e:
        print(f"FAILED: {str(e).splitlines()[0]}", flush=True)
        return False
    print(f"{ran.seconds:,.0f} s", flush=True)
    if step.get("measured"):
        found = [
            result("suite: demo, whole run", ran.seconds, "s", more=False),
            result("suite: demo, peak memory", ran.peak, "MB", more=False),
        ]
        save(out, found, len(os.sched_getaffinity(0)))
    return True


if __name__ == "__main__":
    main()
