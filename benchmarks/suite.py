"""Run every benchmark, one after another, and write the tables of the documents: `make bench`.

    TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/suite.py --date 2026-01-31 --run runs/bench

Each step writes FOLDER/STEP.json and FOLDER/STEP.log. A step that fails does not stop the others; its rows read "not run" in the tables, and
the exit code is 1. `--only STEP,STEP` runs some steps and keeps the results of the others, also in tables and sections. `--resume` keeps the finished
rows of baselines.py and retrieval_quality.py. `--quick` runs a small version of each step, a test without meaningful numbers, whose tables stay
in FOLDER.

Run nothing else meanwhile: most numbers are of two cores, and the load generator needs one of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Numbers, result, save

HERE = Path(__file__).parent
ROOT = HERE.parent
TWOTOWER = str(Path(sys.executable).with_name("twotower"))
MADE = {
    "demo": ("demo", "demo-store"),
    "demo_store": ("demo-store",),
    "retrieve": ("retrieve",),
    "catalogue": ("c100k",),
    "catalogue_1m": ("c1m",),
}
"""Folders that a step makes, removed before it runs again."""
SERVING = "--server-core {server} --generator-core {generator}"


@dataclass(frozen=True)
class Step:
    """A command: a script of this folder, or `twotower`. `quick` are the arguments of the small version; None: those of `full`."""

    name: str
    program: str
    full: str
    quick: str | None = None
    out: bool = True  # whether it writes results
    measured: bool = False  # whether its own time and memory are results

    def words(self, quick: bool, fill: dict[str, str]) -> list[str]:
        text = self.quick if quick and self.quick is not None else self.full
        words = [word.format(**fill) for word in text.split()]
        if self.program != "twotower":
            return [sys.executable, str(HERE / f"{self.program}.py"), *(w for w in words if w)]
        return [TWOTOWER, *words]


STEPS = (
    Step(
        "demo",
        "twotower",
        "demo --run {run}/demo",
        "train examples/own-data.toml --run {run}/demo",
        out=False,
        measured=True,
    ),
    Step("demo_store", "twotower", "publish {run}/demo --store {run}/demo-store", out=False),
    Step("train_speed", "train_speed", "", "--threads 1 --rounds 1 --goal 0.7"),
    Step("evaluation_speed", "evaluation_speed", "", "--threads 1 --rounds 1"),
    Step("export_speed", "export_speed", "", "--threads 1 --rounds 1"),
    Step("peak_memory", "peak_memory", "", "--rounds 1 --items 100000 --only training,search"),
    Step("sequence_speed", "sequence_speed", "--threads 2", "--threads 1 --steps 2"),
    Step("sequence_speed_1", "sequence_speed", "--threads 1", "--threads 1 --steps 2"),
    Step("search_speed", "search_speed", "--kinds=", "--kinds= --scale 20000 --threads 1 --rounds 1"),
    Step(
        "retrieve",
        "twotower",
        "train examples/movielens-retrieve.toml --run {run}/retrieve --set train.epochs=3",
        "train examples/own-data.toml --run {run}/retrieve",
        out=False,
    ),
    Step(
        "search_speed_run",
        "search_speed",
        "--run {run}/retrieve --scale 1000000 --kinds ivf --metric dot --threads 1 --recall 0.96",
        "--run {run}/retrieve --scale 20000 --kinds ivf --metric dot --threads 1 --rounds 1 --batch 16",
    ),
    Step("embed_speed", "embed_speed", "--rows 1000000", "--rows 20000 --threads 1"),
    Step(
        "embed_speed_10",
        "embed_speed",
        "--rows 10000000 --threads 1 --ids vocabulary",
        "--rows 20000 --threads 1 --ids hash",
    ),
    Step(
        "catalogue",
        "catalogue",
        "--store {run}/demo-store --items 100000 --out {run}/c100k --bundles 2",
        "--store {run}/demo-store --items 2000 --out {run}/c100k --bundles 2",
        out=False,
    ),
    Step(
        "catalogue_1m",
        "catalogue",
        "--store {run}/demo-store --items 1000000 --out {run}/c1m",
        "--store {run}/demo-store --items 3000 --out {run}/c1m",
        out=False,
    ),
    Step(
        "serve_load",
        "serve_load",
        f"--store {{run}}/c100k --seconds 60 {SERVING}",
        f"--store {{run}}/c100k --seconds 3 --warm-up 1 --swaps 10 --step 1 --rate 50 {SERVING}",
    ),
    Step(
        "serve_load_cold",
        "serve_load",
        f"--store {{run}}/c1m --only cold --no-floor {SERVING}",
    ),
    Step("milvus_speed", "milvus_speed", "", "--items 2000"),
    Step("scale_rows", "scale", "--only rows", "--only rows --sizes 20000,60000 --folder {run}/scale"),
    Step("scale_items", "scale", "--only items", "--only items --sizes 1000,20000"),
    Step("scale_tables", "scale", "--only tables"),
    Step(
        "scale_end",
        "scale",
        "--only end --folder {run}/scale",
        "--only end --users 2000 --items 20000 --rows 100000 --folder {run}/scale",
    ),
    Step("rank_quality", "rank_quality", "", "--threads 1 --seeds 1 --epochs 1 --only SENet"),
    Step("search_quality", "search_quality", "", "--seeds 1 --epochs 1 --only title"),
    Step("baselines", "baselines", "{sequences}", "{sequences} --tries 1"),
    Step(
        "retrieval_quality",
        "retrieval_quality",
        "{sequences}",
        "{sequences} --threads 1 --seeds 1 --only ablation/full.toml --set train.epochs=1",
    ),
)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> None:
    """Run the steps of a command line, by default that of this process. Exits with a message if one fails."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/bench"), help="folder of results")
    options.add_argument("--sequences", default="", help="archive with the published order of every user's films")
    options.add_argument("--date", required=True, help="date of the run, as the documents show it")
    options.add_argument("--only", default="", help="steps to run, separated by commas")
    options.add_argument("--resume", action="store_true", help="keep the rows that a step has finished")
    options.add_argument("--quick", action="store_true", help="run the small version of each step")
    chosen = options.parse_args(arguments)
    names = [step.name for step in steps]
    wanted = chosen.only.split(",") if chosen.only else names
    if strange := sorted(set(wanted) - set(names)):
        options.error(f"--only: no step {strange[0]!r}; choose from {', '.join(names)}")
    if not os.environ.get("TWOTOWER_DATA"):
        options.error("name the archive: export TWOTOWER_DATA=path/to/ml-1m.zip")
    run: Path = chosen.run.resolve()
    run.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    fill = {
        "run": str(run),
        "sequences": f"--sequences={Path(chosen.sequences).resolve()}" if chosen.sequences else "",
        "server": str(cores[0]),
        "generator": str(cores[-1]),
    }
    failed = [step.name for step in steps if step.name in wanted and not run_step(step, run, chosen, fill)]
    failed += [] if write_tables(run, chosen) else ["table"]
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}; see {chosen.run}/*.log")
    print("every step ran")


def run_step(step: Step, run: Path, chosen: argparse.Namespace, fill: dict[str, str]) -> bool:
    """Run a step. Returns False if it fails."""
    words, out = step.words(chosen.quick, fill), run / f"{step.name}.json"
    if step.out:
        words += ["--out", str(out)]
    if not chosen.resume:
        out.unlink(missing_ok=True)
    for name in MADE.get(step.name, ()):
        shutil.rmtree(run / name, ignore_errors=True)
    print(f"{time.strftime('%H:%M:%S')} {step.name} …", end=" ", flush=True)
    started = time.perf_counter()
    with (run / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    print(f"{seconds:,.0f} s{'' if process.returncode == 0 else f', FAILED ({process.returncode})'}", flush=True)
    if step.measured and process.returncode == 0:
        found: list[Numbers] = [
            result(f"suite: {step.name}, whole run", seconds, "s", more=False),
            result(f"suite: {step.name}, peak memory", used.ru_maxrss * 1024 / 1e6, "MB", more=False),
        ]
        save(out, found, len(os.sched_getaffinity(0)))
    return process.returncode == 0


def write_tables(run: Path, chosen: argparse.Namespace) -> bool:
    words = [sys.executable, str(HERE / "table.py"), str(run), "--date", chosen.date]
    if chosen.only:
        words.append("--keep")
    if chosen.quick:
        words += ["--page", str(run / "benchmarks.md")]
    else:
        words += ["--page", "docs/benchmarks.md", "--readme", "README.md", "--readme", "README.zh-CN.md"]
    return subprocess.run(words, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    main()
