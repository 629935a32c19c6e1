"""Compare the speed of this tree with that of a commit: `python -m benchmarks.speed.versus --base main`.

Training with bce and with a softmax over histories (train, contrastive: turns a second), evaluations (evaluate), requests of method 1 and of method 2
(search, tower), and HTTP requests a second (serve).

Evaluation, search and serving are measured in pairs, one tree after the other in processes of their own, and in the other
order in every second pair. The trainings of both trees take turns of some steps, and each pair of turns is a pair: speeds of two processes that run one
after the other differ by the machine's mood; neighbouring turns share it. The result of a part is the geometric mean of the ratios of its speeds, this
tree's divided by the commit's, with the bounds of a 95 % interval (Student's t over the logarithms of the pairs).

Both trees are used through the public functions, the command line and HTTP, on made data.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import timed
from benchmarks.lib.processes import PYTHON, ROOT, Conversation, serving
from benchmarks.lib.report import declared, options

DECLARED: dict[str, Any] = declared(__file__)
TURNS: dict[str, tuple[int, int]] = DECLARED["turns"]
USERS: int = DECLARED["world"]["users"]
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Two-sided 95 % quantiles of Student's t, from 1 degree of freedom."""


def main() -> None:
    chosen = options(__doc__, __file__)
    if chosen.measure:
        measure(chosen.measure, Path(chosen.folder), chosen.rows)
        return
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(base), chosen.base], cwd=ROOT, check=True)
        try:
            compare({"base": base, "this": ROOT}, Path(temporary), chosen.only, chosen.pairs, chosen.rows)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)


def compare(trees: Mapping[str, Path], temporary: Path, parts: list[str], pairs: int, rows: int) -> None:
    """Measure the parts in pairs and print a line for each part."""
    folders = {name: temporary / f"made-{name}" for name in trees}
    if set(parts) - set(TURNS):
        for name, tree in trees.items():
            child(tree, "make", folders[name], rows)
    speeds = {part: training_turns(trees, part, rows) for part in TURNS if part in parts}
    for pair in range(pairs):
        for part in [part for part in parts if part not in TURNS]:
            for name in list(trees)[:: 1 if pair % 2 else -1]:
                if part == "serve":
                    found = serving_speed(folders[name] / "store", environment_of(trees[name]))
                else:
                    found = float(child(trees[name], part, folders[name], rows))
                speeds.setdefault(part, {name: [] for name in trees})[name].append(found)
    print("part         base a second  this a second   ratio   95 % interval")
    for part, both in speeds.items():
        base, this = (statistics.median(both[name]) for name in ("base", "this"))
        ratio, low, high = interval([a / b for a, b in zip(both["this"], both["base"], strict=True)])
        print(f"{part:12} {base:13,.1f}  {this:13,.1f}  {ratio:6.3f}   {low:.3f} to {high:.3f}")


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and the bounds of its 95 % interval."""
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = STUDENT[min(len(logs) - 2, len(STUDENT) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


# ---- both trees --------------------------------------------------------------------------------------------------


def environment_of(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "2"}


def words(part: str, folder: Path, rows: int) -> list[str]:
    return [*PYTHON, "benchmarks.speed.versus", "--measure", part, "--folder", str(folder), "--rows", str(rows)]


def child(tree: Path, part: str, folder: Path, rows: int) -> str:
    """Measure a part with the package of a tree; return what it prints last."""
    command = words(part, folder, rows)
    done = subprocess.run(command, cwd=ROOT, env=environment_of(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: {part}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def training_turns(trees: Mapping[str, Path], part: str, rows: int) -> dict[str, list[float]]:
    """Train in both trees at once, in turns of some steps, and return the turns a second of each tree, turn by turn."""
    speeds: dict[str, list[float]] = {name: [] for name in trees}
    with ExitStack() as stack:
        talks = {}
        for name, tree in trees.items():
            talks[name] = stack.enter_context(Conversation(words(part, Path(), rows), environment_of(tree)))
        for talk in talks.values():
            talk.hear()  # each has done its first step
        number = 0
        while True:
            found = {name: talks[name].ask("go") for name in list(trees)[:: 1 if number % 2 else -1]}
            if None in found.values():
                return speeds
            number += 1
            if number > 2:  # the first turns fill caches
                for name, value in found.items():
                    speeds[name].append(1 / value)


def serving_speed(store: Path, environment: Mapping[str, str]) -> float:
    """Return the requests a second that one connection gets: the reciprocal of the least median latency of 300 requests."""
    with serving(store, environment=environment) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        taken = []
        for number in range(2000):
            body = {"user_id": str(number * 7 % USERS), "k": 10, "method": 1 + number % 2}
            started = time.perf_counter()
            connection.request("POST", "/v1/recommend", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            if reply.status != 200:
                raise SystemExit(f"{reply.status} in place of 200")
            taken.append(time.perf_counter() - started)
        return 1 / min(statistics.median(taken[start : start + 300]) for start in range(200, 2000, 300))


# ---- one tree ----------------------------------------------------------------------------------------------------


def measure(part: str, folder: Path, rows: int) -> None:
    """Print the speed of one part, of which more is better, or take the turns of a training. `folder` holds the tree's run and store."""
    import torch

    torch.set_num_threads(2)
    import twotower

    if part in TURNS:
        epochs, steps = TURNS[part]
        fit(part == "contrastive", rows, epochs, callback=TurnTaker(steps))
        return
    if part == "make":
        twotower.publish(fit(True, rows, 1, folder / "run"), folder / "store")
        return
    if part == "evaluate":
        loaded = twotower.load(folder / "run")
        print(1 / min(timed(lambda: twotower.evaluate(loaded)) for _ in range(8)))
        return
    retriever = twotower.retriever(folder / "store")
    requests = [twotower.Request(str(i)) for i in range(0, USERS, 40)]

    def recommend() -> None:
        for request in requests:
            retriever.recommend(request, 10, 1 if part == "search" else 2)

    # The least of several is that of an idle machine.
    print(len(requests) / min(timed(recommend) for _ in range(8)))


class TurnTaker:
    """Callback of a training that writes the seconds of some steps, and then waits for a line before it goes on."""

    def __init__(self, steps: int) -> None:
        self._steps, self._last = steps, 0.0

    def on_step_end(self, done: int, total: int, loss: float) -> None:
        if done == 1 or done % self._steps == 0:
            print(time.perf_counter() - self._last, flush=True)
            sys.stdin.readline()
            self._last = time.perf_counter()

    def on_epoch_end(self, history: object) -> None:
        """Ignore the end of an epoch."""


def fit(contrastive: bool, rows: int, epochs: int, folder: Path | None = None, callback: Any = None) -> Any:
    """Train on tables in which a user likes the items of their group, and return the run."""
    import numpy as np
    import polars as pl

    import twotower
    from twotower import Categorical, Config, Numeric, Schema, Sequence

    users, items = DECLARED["world"].values()
    rng = np.random.default_rng(0)
    user = rng.integers(0, users, rows)
    item = (items * rng.random(rows) ** 2).astype(np.int64) // 10 * 10 + user % 10
    tables = (
        pl.DataFrame({"user_id": np.arange(users), "city": rng.integers(0, 100, users)}),
        pl.DataFrame({"item_id": np.arange(items), "maker": rng.integers(0, 500, items), "price": rng.random(items)}),
        pl.DataFrame({"user_id": user, "item_id": item, "at": rng.permutation(rows)}),
    )
    schema = Schema(
        time="at", time_unit="order", features=(
            Categorical(name="user_id", side="user"), Categorical(name="city", side="user"),
            Sequence(name="before", side="user", max_length=50),
            Categorical(name="item_id", side="item"), Categorical(name="maker", side="item"),
            Numeric(name="price", side="item"),
        ),
    )  # fmt: skip
    settings = DECLARED["config"] | (DECLARED["contrastive"] if contrastive else {})
    settings["train"] = settings["train"] | {"epochs": epochs}
    return twotower.fit(tables, schema, Config.model_validate(settings), folder=folder, callback=callback)


if __name__ == "__main__":
    main()
