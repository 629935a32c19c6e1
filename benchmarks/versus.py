"""Compare the speed of this tree with that of a commit: `python benchmarks/versus.py --base main`.

Training, evaluation, search and serving are measured in pairs, one tree after the other in processes of their own, and in
the other order in every second pair. The result of a part is the geometric mean of the ratios of its speeds, this tree's
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
PARTS = ("train", "contrastive", "evaluate", "search", "tower", "serve")
"""Rows a second of training with bce, and with a softmax over histories; evaluations, requests of method 1, of method 2,
and HTTP requests a second."""
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


def fit(contrastive: bool, epochs: int, folder: Path | None = None) -> object:
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
    return twotower.fit(made_tables(), schema, Config.model_validate(settings), folder=folder)


def measure(part: str, folder: Path) -> float:
    """Return the speed of one part, of which more is better. `folder` holds the tree's run and store."""
    import torch

    torch.set_num_threads(2)
    import twotower

    if part in ("train", "contrastive"):
        epochs = 1 if part == "contrastive" else 3
        runs = [fit(part == "contrastive", epochs) for _ in range(2)]
        return max(float(run.metrics["train.rows_per_second"]) for run in runs)  # type: ignore[attr-defined]
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
        print(measure(given.measure[0], Path(given.measure[1])))
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
    for pair in range(pairs):
        for part in parts:
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
