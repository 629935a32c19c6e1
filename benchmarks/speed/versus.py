"""Compare the speed of this tree with that of a commit: `python -m benchmarks speed.versus --base main`."""

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
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import timed
from benchmarks.lib.processes import ROOT, Conversation, call, code, serving
from benchmarks.lib.report import Report, declared

DECLARED: dict[str, Any] = declared(__file__)
TURNS: dict[str, tuple[int, int]] = DECLARED["turns"]
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Two-sided 95 % quantiles of Student's t, from 1 degree of freedom."""


def main(chosen: Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(base), chosen.base], cwd=ROOT, check=True)
        try:
            compare({"base": base, "this": ROOT}, Path(temporary), chosen.only, chosen.pairs, chosen.rows)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)


def compare(trees: Mapping[str, Path], temporary: Path, parts: list[str], pairs: int, rows: int) -> None:
    """Measure the parts in pairs and print a line for each part."""
    folders = {name: str(temporary / f"made-{name}") for name in trees}
    of = {name: os.environ | {"PYTHONPATH": f"{tree}/src", "OMP_NUM_THREADS": "2"} for name, tree in trees.items()}
    speeds: dict[str, dict[str, list[float]]] = {part: {name: [] for name in trees} for part in parts}
    if set(parts) - set(TURNS):
        for name, folder in folders.items():
            call(measure, "make", folder, rows, environment=of[name])
    for part in set(parts) & set(TURNS):
        training_turns(speeds[part], part, rows, of)
    for pair in range(pairs):
        for part in [part for part in parts if part not in TURNS]:
            for name in list(trees)[:: 1 if pair % 2 else -1]:
                if part == "serve":
                    found = serving_speed(Path(folders[name]) / "store", of[name])
                else:
                    found = call(measure, part, folders[name], rows, environment=of[name])[1]
                speeds[part][name].append(found)
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


def training_turns(
    speeds: dict[str, list[float]], part: str, rows: int, environments: Mapping[str, Mapping[str, str]]
) -> None:
    """Train in both trees at once, in turns of some steps, and add the turns a second of each tree, turn by turn."""
    with ExitStack() as stack:
        words = [sys.executable, "-c", code(measure, part, "", rows)]
        talks = {name: stack.enter_context(Conversation(words, given)) for name, given in environments.items()}
        for talk in talks.values():
            talk.hear()  # each has done its first step
        number = 0
        while True:
            found = {name: talks[name].ask("go") for name in list(talks)[:: 1 if number % 2 else -1]}
            if None in found.values():
                return
            number += 1
            if number > 2:  # the first turns fill caches
                for name, value in found.items():
                    speeds[name].append(1 / value)


def serving_speed(store: Path, environment: Mapping[str, str]) -> float:
    """Return the requests a second that one connection gets: the reciprocal of the least median latency of 300 requests."""
    with serving(store, environment=environment) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

        def ask(number: int) -> None:
            body = {"user_id": str(number * 7 % DECLARED["world"]["users"]), "k": 10, "method": 1 + number % 2}
            connection.request("POST", "/v1/recommend", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            if reply.status != 200:
                raise SystemExit(f"{reply.status} in place of 200")

        taken = [timed(lambda n=n: ask(n)) for n in range(2000)]  # type: ignore[misc]
        return 1 / min(statistics.median(taken[start : start + 300]) for start in range(200, 2000, 300))


def measure(part: str, folder: str, rows: int) -> float | None:
    """Return the speed of one part, of which more is better, or take the turns of a training. `folder` holds the tree's run and store."""
    import torch

    torch.set_num_threads(2)
    import twotower

    if part in TURNS:
        epochs, steps = TURNS[part]
        fit(part == "contrastive", rows, epochs, callback=TurnTaker(steps))
        return None
    if part == "make":
        twotower.publish(fit(True, rows, 1, folder=f"{folder}/run"), f"{folder}/store")
        return None
    # The least of several is that of an idle machine.
    if part == "evaluate":
        loaded = twotower.load(f"{folder}/run")
        return 1 / min(timed(lambda: twotower.evaluate(loaded)) for _ in range(8))
    retriever = twotower.retriever(f"{folder}/store")
    requests = [twotower.Request(str(i)) for i in range(0, DECLARED["world"]["users"], 40)]

    def recommend() -> None:
        for request in requests:
            retriever.recommend(request, 10, 1 if part == "search" else 2)

    return len(requests) / min(timed(recommend) for _ in range(8))


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


def fit(contrastive: bool, rows: int, epochs: int, **given: Any) -> Any:
    """Train on tables in which a user likes the items of their group, and return the run."""
    import numpy as np
    import polars as pl

    import twotower

    users, items = DECLARED["world"].values()
    rng = np.random.default_rng(0)
    user = rng.integers(0, users, rows)
    item = (items * rng.random(rows) ** 2).astype(np.int64) // 10 * 10 + user % 10
    tables = (
        pl.DataFrame({"user_id": np.arange(users), "city": rng.integers(0, 100, users)}),
        pl.DataFrame({"item_id": np.arange(items), "maker": rng.integers(0, 500, items), "price": rng.random(items)}),
        pl.DataFrame({"user_id": user, "item_id": item, "at": rng.permutation(rows)}),
    )
    settings = DECLARED["config"] | (DECLARED["contrastive"] if contrastive else {})
    settings["train"] = settings["train"] | {"epochs": epochs}
    schema, config = twotower.Schema.model_validate(DECLARED["schema"]), twotower.Config.model_validate(settings)
    return twotower.fit(tables, schema, config, **given)
