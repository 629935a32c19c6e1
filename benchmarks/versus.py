"""Compare the speed of this tree with that of a commit: `python benchmarks/versus.py --base main`.

Evaluation, search and serving are measured in pairs, one tree after the other in processes of their own, and in the other
order in every second pair. The trainings of both trees take turns of some steps, and each pair of turns is a pair. The result of a part is the geometric mean of the ratios of its speeds, this tree's
divided by the commit's, with the bounds of a 95 % interval (Student's t over the logarithms of the pairs).

Both trees are used through the public functions, the command line and HTTP, on made data.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
TURNS = {"train": (3, 30), "contrastive": (2, 6)}
"""Epochs of the trainings, and steps of a turn."""
PARTS = ("train", "contrastive", "evaluate", "search", "tower", "serve")
"""Training with bce and with a softmax over histories (turns a second), evaluations, requests of method 1 and of method 2, and
HTTP requests a second."""
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Two-sided 95 % quantiles of Student's t, from 1 degree of freedom."""
USERS, ITEMS, ROWS = 20_000, 20_000, 600_000


def made_tables() -> tuple[object, object, object]:
    """Return tables of users, items and interactions in which a user likes the items of their group."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    user = rng.integers(0, USERS, ROWS)
    item = (ITEMS * rng.random(ROWS) ** 2).astype(np.int64) // 10 * 10 + user % 10
    users = pl.DataFrame({"user_id": np.arange(USERS), "city": rng.integers(0, 100, USERS)})
    items = pl.DataFrame(
        {"item_id": np.arange(ITEMS), "maker": rng.integers(0, 500, ITEMS), "price": rng.random(ITEMS)}
    )
    actions = pl.DataFrame({"user_id": user, "item_id": item, "at": rng.permutation(ROWS)})
    return users, items, actions


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


def fit(contrastive: bool, epochs: int, folder: Path | None = None, callback: TurnTaker | None = None) -> object:
    """Train on the made tables and return the run."""
    import twotower
    from twotower import Categorical, Config, Numeric, Schema, Sequence

    schema = Schema(
        time="at", time_unit="order", features=(
            Categorical(name="user_id", side="user"), Categorical(name="city", side="user"),
            Sequence(name="before", side="user", max_length=50),
            Categorical(name="item_id", side="item"), Categorical(name="maker", side="item"),
            Numeric(name="price", side="item"),
        ),
    )  # fmt: skip
    settings: dict[str, object] = {
        "split": {"kind": "last"},
        "evaluation": {"bootstrap": 0, "max_users": 500},
        "train": {
            "epochs": epochs,
            "batch_size": 4096,
            "device": "cpu",
            "validate_every": 100,
            "monitor": "validation.recall@10",
        },
        "negatives": {"random": 1},
    }
    if contrastive:
        settings |= {"loss": {"kind": "softmax"}, "negatives": {"in_batch": True, "uniform": 1000}}
    config = Config.model_validate(settings)
    return twotower.fit(made_tables(), schema, config, folder=folder, callback=callback)  # type: ignore[arg-type]


def measure(part: str, folder: Path) -> float:
    """Return the speed of one part, of which more is better. `folder` holds the tree's run and store."""
    import torch

    torch.set_num_threads(2)
    import twotower

    if part == "evaluate":
        loaded = twotower.load(folder / "run")
        return 1 / min(seconds(lambda: twotower.evaluate(loaded)) for _ in range(8))
    retriever = twotower.retriever(folder / "store")
    method = 1 if part == "search" else 2
    requests = [twotower.Request(str(i)) for i in range(0, USERS, 40)]

    def recommend() -> None:
        for request in requests:
            retriever.recommend(request, 10, method)  # type: ignore[arg-type]

    return len(requests) / min(seconds(recommend) for _ in range(8))


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes. The least of several is that of an idle machine."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def service(store: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run `twotower serve` on a free port within the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "twotower", "serve", "--store", str(store), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"`{' '.join(command)}` ended with {process.returncode}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def serving_speed(store: Path, environment: dict[str, str]) -> float:
    """Return the requests a second that one connection gets: the reciprocal of the least median latency of 300 requests."""
    with service(store, environment) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
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


def training_turns(trees: dict[str, Path], part: str) -> dict[str, list[float]]:
    """Train in both trees at once, in turns of some steps, and return the turns a second of each tree, turn by turn.

    Speeds of two processes that run one after the other differ by the machine's mood; neighbouring turns share it."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, str(HERE), "--measure", part, "-"], env=environment_of(tree), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for name, tree in trees.items()
    }  # fmt: skip

    def turn(name: str) -> float | None:
        process = processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
        return float(line) if line else None

    for process in processes.values():  # each has done its first step
        assert process.stdout is not None
        process.stdout.readline()
    speeds: dict[str, list[float]] = {name: [] for name in trees}
    number = 0
    while True:
        order = list(trees)[:: 1 if number % 2 else -1]
        found = {name: turn(name) for name in order}
        seconds_of = {name: value for name, value in found.items() if value is not None}
        if len(seconds_of) < len(trees):
            break
        number += 1
        if number > 2:  # the first turns fill caches
            for name, value in seconds_of.items():
                speeds[name].append(1 / value)
    for process in processes.values():
        process.kill()
        process.communicate()
    return speeds


def child(tree: Path, *arguments: str) -> str:
    """Run this script with the package of another tree; return what it prints last."""
    command = [sys.executable, str(HERE), *arguments]
    done = subprocess.run(command, env=environment_of(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(arguments)}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def environment_of(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "2"}


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and the bounds of its 95 % interval."""
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = STUDENT[min(len(logs) - 2, len(STUDENT) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="main", help="Commit to compare with.")
    parser.add_argument("--pairs", type=int, default=10, help="Pairs of each part.")
    parser.add_argument("--only", default=",".join(PARTS), help="Parts, separated by commas.")
    parser.add_argument("--measure", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        part = given.measure[0]
        if part in TURNS:
            epochs, steps = TURNS[part]
            fit(part == "contrastive", epochs, callback=TurnTaker(steps))
        else:
            print(measure(part, Path(given.measure[1])))
        return
    if given.make:
        import twotower

        twotower.publish(fit(True, 1, Path(given.make) / "run"), Path(given.make) / "store")  # type: ignore[arg-type]
        return
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(base), given.base], cwd=ROOT, check=True)
        try:
            compare({"base": base, "this": ROOT}, Path(temporary), given.only.split(","), given.pairs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)


def compare(trees: dict[str, Path], temporary: Path, parts: list[str], pairs: int) -> None:
    """Measure the parts in pairs and print a line for each part."""
    for name, tree in trees.items():
        child(tree, "--make", str(temporary / f"made-{name}"))
    speeds: dict[str, dict[str, list[float]]] = {part: {name: [] for name in trees} for part in parts}
    for part in TURNS:
        if part in parts:
            speeds[part] = training_turns(trees, part)
    for pair in range(pairs):
        for part in [part for part in parts if part not in TURNS]:
            for name in list(trees)[:: 1 if pair % 2 else -1]:
                folder = temporary / f"made-{name}"
                if part == "serve":
                    found = serving_speed(folder / "store", environment_of(trees[name]))
                else:
                    found = float(child(trees[name], "--measure", part, str(folder)))
                speeds[part][name].append(found)
    print("part         base a second  this a second   ratio   95 % interval")
    for part, found_speeds in speeds.items():
        base, this = (statistics.median(found_speeds[name]) for name in ("base", "this"))
        ratio, low, high = interval([a / b for a, b in zip(found_speeds["this"], found_speeds["base"], strict=True)])
        print(f"{part:12} {base:13,.1f}  {this:13,.1f}  {ratio:6.3f}   {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
