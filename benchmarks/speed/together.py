import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.lib.processes import TWOTOWER, run
from benchmarks.lib.report import Report
from benchmarks.lib.rounds import in_turns
from benchmarks.scale.world import write_world


def main(chosen: Namespace, report: Report) -> None:
    folder = Path(chosen.folder).resolve() / "together"
    config = write_world(folder, chosen.rows // 40, max(1000, chosen.rows // 200), chosen.rows)
    works = {"alone": partial(slowest, config, ["alone"], {"OMP_NUM_THREADS": "1"})}
    works["both"] = partial(slowest, config, ["one", "other"], {})
    found = in_turns(works, chosen.rounds, reverse=True)
    ratios = [both / alone for both, alone in zip(found["both"], found["alone"], strict=True)]
    report.add("one training alone, one thread", found["alone"], "s")
    report.add("two trainings at once, the slower one", found["both"], "s")
    report.add("two trainings at once / one alone with one thread", ratios, more=False)
    shutil.rmtree(folder)


def slowest(config: Path, names: Sequence[str], changed: dict[str, str]) -> float:
    """Return the seconds of the slowest of some trainings at once."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")} | changed

    def train(name: str) -> float:
        folder = config.with_name(f"run-{name}")
        shutil.rmtree(folder, ignore_errors=True)
        return run([*TWOTOWER, "train", config, "--run", folder], environment=environment).seconds

    with ThreadPoolExecutor(len(names)) as pool:
        return max(pool.map(train, names))
