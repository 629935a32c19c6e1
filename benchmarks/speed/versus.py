import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import timed
from benchmarks.lib.processes import ROOT, Conversation, call, run, serving, usage
from benchmarks.lib.report import Report, declared
from benchmarks.lib.rounds import in_turns, interval

DECLARED: dict[str, Any] = declared(__file__)
TURNS: dict[str, tuple[int, int]] = DECLARED["turns"]


def main(chosen: Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        run(["git", "worktree", "add", "--quiet", "--detach", base, chosen.base])
        try:
            compare({"base": base, "this": ROOT}, temporary, chosen.only, chosen.pairs, chosen.rows)
        finally:
            run(["git", "worktree", "remove", "--force", base])


def compare(trees: Mapping[str, Path], temporary: str, parts: list[str], pairs: int, rows: int) -> None:
    """Measure the parts in pairs and print a line for each part."""
    of = {name: os.environ | {"PYTHONPATH": f"{tree}/src", "OMP_NUM_THREADS": "2"} for name, tree in trees.items()}

    def once(part: str, name: str) -> Any:
        if part in SERVED:
            return SERVED[part](Path(temporary) / name / "store", of[name])
        return call(measure, part, f"{temporary}/{name}", rows, environment=of[name])[1]

    if set(parts) - set(TURNS):
        for name in trees:
            (Path(temporary) / name).mkdir(exist_ok=True)
            once("make", name)
    print("part         base a second  this a second   ratio   95 % interval")
    for part in parts:
        works = {name: partial(once, part, name) for name in trees}
        if part in TURNS:
            found = [training_turns(part, rows, of) for _ in range(max(2, pairs // 2))]
            both = {name: [statistics.geometric_mean(turns[name]) for turns in found] for name in trees}
        else:
            both = in_turns(works, pairs, reverse=True)
        base, this = (statistics.median(both[name]) for name in ("base", "this"))
        ratio, low, high = interval([a / b for a, b in zip(both["this"], both["base"], strict=True)])
        print(f"{part:12} {base:13,.1f}  {this:13,.1f}  {ratio:6.3f}   {low:.3f} to {high:.3f}")


def training_turns(part: str, rows: int, of: Mapping[str, Mapping[str, str]]) -> dict[str, list[float]]:
    """Train in both trees at once, in turns of some steps. Returns the turns a second of each tree, turn by turn."""
    turns: list[dict[str, Any]] = []
    with ExitStack() as stack:
        begun = {name: Conversation(measure, part, "", rows, environment=given) for name, given in of.items()}
        talks = {name: stack.enter_context(talk) for name, talk in begun.items()}
        for talk in talks.values():
            talk.hear()  # each has done its first step
        while not turns or None not in turns[-1].values():
            turns.append({name: talks[name].ask("go") for name in list(talks)[:: 1 if len(turns) % 2 else -1]})
    return {name: [1 / turn[name] for turn in turns[2:-1]] for name in of}  # the first turns fill caches


def serving_speed(store: Path, environment: Mapping[str, str]) -> float:
    """Return requests a second of one connection: the reciprocal of the least median latency of 300 requests."""
    with serving(store, environment=environment) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        taken = [timed(lambda n=n: ask(connection, n, 1 + n % 2)) for n in range(2000)]  # type: ignore[misc]
        return 1 / min(statistics.median(taken[start : start + 300]) for start in range(200, 2000, 300))


def requests_a_processor(method: int, store: Path, environment: Mapping[str, str]) -> float:
    """Return requests a second of processor time of the service's processes: the most of five times 400 requests."""
    with serving(store, environment=environment) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

        def speed(start: int) -> float:
            before = usage(server.pid)["cpu_s"]
            for number in range(start, start + 400):
                ask(connection, number, method)
            return 400 / (usage(server.pid)["cpu_s"] - before)

        return max([speed(start) for start in range(0, 2400, 400)][1:])


def ask(connection: http.client.HTTPConnection, number: int, method: int) -> None:
    body = {"user_id": str(number * 7 % DECLARED["world"]["users"]), "k": 10, "method": method}
    connection.request("POST", "/v1/recommend", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    reply.read()
    if reply.status != 200:
        raise SystemExit(f"{reply.status} in place of 200")


SERVED: dict[str, Callable[[Path, Mapping[str, str]], float]] = {
    "serve": serving_speed,
    "search-request": partial(requests_a_processor, 1),
    "tower-request": partial(requests_a_processor, 2),
}
"""Parts that are measured over HTTP."""


def measure(part: str, folder: str, rows: int) -> float | None:
    """Return the speed of one part, of which more is better, or take the turns of a training. `folder` holds the tree's
    run and store."""
    import torch

    torch.set_num_threads(2)
    import twotower

    if part in TURNS:
        epochs, steps = TURNS[part]
        fit(part == "contrastive", rows, epochs, callback=turn_taker(steps))
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


def turn_taker(steps: int) -> Any:
    """Return the training callback that writes the seconds of some steps and then waits for a line."""
    from twotower.train.progress import Callback

    class TurnTaker(Callback):
        begun = 0.0

        def on_step_end(self, done: int, total: int, loss: float) -> None:
            if done == 1 or done % steps == 0:
                print(time.perf_counter() - self.begun, flush=True)
                sys.stdin.readline()
                self.begun = time.perf_counter()

    return TurnTaker()


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
