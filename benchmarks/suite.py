import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from benchmarks import limits
from benchmarks.lib import page
from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import PYTHON, ROOT, TWOTOWER, run
from benchmarks.lib.report import Report, declared, result, save

STEPS: dict[str, Numbers] = declared(__file__)["steps"]


def words(step: Numbers, quick: bool, fill: Mapping[str, str]) -> list[str]:
    text = step["quick"] if quick and "quick" in step else step["run"]
    program, *given = filter(None, (word.format(**fill) for word in text.split()))
    small = ["--quick"] if quick and "quick" not in step else []
    return [*TWOTOWER, *given] if program == "twotower" else [*PYTHON, "benchmarks", program, *given, *small]


def main(chosen: Namespace, report: Report, steps: Mapping[str, Numbers] = STEPS) -> None:
    """Run the steps of a command line. Exits with a message if one fails."""
    wanted = [name for name in chosen.only if name] or list(steps)
    if strange := sorted(set(wanted) - set(steps)):
        sys.exit(f"--only: no step {strange[0]!r}; choose from {', '.join(steps)}")
    if not chosen.date or not os.environ.get("TWOTOWER_DATA"):
        sys.exit("name the date of the run, --date 2026-01-31, and the archive, export TWOTOWER_DATA=path/to/ml-1m.zip")
    folder = Path(chosen.run).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    fill = {"run": str(folder), "server": str(cores[0]), "generator": str(cores[-1])}
    for name in ("sequences", "short"):
        archive = getattr(chosen, name)
        fill[name] = f"--sequences={Path(archive).resolve()}" if archive else ""
    wanted = [name for name in wanted if fill.get(steps[name].get("needs", ""), "given")]
    given = {name: words(step, chosen.quick, fill) for name, step in steps.items() if name in wanted}
    failed = [name for name, w in given.items() if not run_step(name, steps[name], folder, w, chosen.resume)]
    pages = [] if chosen.quick else [ROOT / name for name in ("README.md", "README.zh-CN.md", "docs/benchmarks.md")]
    to = (folder if chosen.quick else ROOT / "benchmarks") / "measurements.md"
    try:
        page.write(folder, chosen.date, to, pages, keep=wanted != list(steps))
    except ValueError as e:
        print(f"error: {e}")
        failed.append("table")
    for limit in limits.judged_all(folder):
        print(limit)
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
        costs = {"whole run": (ran.seconds, "s"), "peak memory": (ran.peak, "MB")}
        found = [result(f"suite: demo, {what}", *cost) for what, cost in costs.items()]
        save(out, found, len(os.sched_getaffinity(0)))
    return True
