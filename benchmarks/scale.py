"""Measure how cost grows with interactions and items, and one run end to end with a catalogue of ten million.

    python benchmarks/scale.py --only rows --sizes 1000000,10000000,100000000
    python benchmarks/scale.py --only items --sizes 1000,10000,100000,1000000,10000000
    python benchmarks/scale.py --only tables
    python benchmarks/scale.py --only end --items 10000000 --folder runs/scale

rows    sharded Parquet of SIZE interactions is prepared, then trained on for some steps, on one rank and on two
items   SIZE vectors of 64 numbers are indexed by `index.kind = "auto"`, tuned to recall 0.95 and searched; items and
        queries are centres with noise, and no query is an item
tables  two tables of a million rows by 64, trained by two ranks of one thread: whole on each, and sharded (TorchRec)
end     users, items and interactions are written as shards; then the commands prepare, train, embed (two ranks),
        publish, serve; each with its time and memory

Each stage is a process. `memory` is the peak of the private memory of its processes together (RssAnon, sampled ten
times a second), without pages of mapped files. The last line of a curve is the exponent e of cost ~ size^e, by least squares over the sizes within a hundredth of the largest.

The made data: an item has one of a thousand topics, a user three; four of five interactions are with an item of these
topics, and within a topic popular items are much more frequent.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import Numbers, finish, options, result

TOPICS, SHARD = 1_000, 4_000_000
WIDTH, K, RECALL = 64, 100, 0.95
EVALUATED = 300
TWOTOWER = [sys.executable, "-m", "twotower"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

CONFIG = """
data = {{ users = "users/*.parquet", items = "items/*.parquet", interactions = "interactions/*.parquet" }}
split = {{ kind = "time", test = 0.001, validation = 0.001 }}
loss.kind = "softmax"
negatives.uniform = 512
evaluation = {{ k = [10, 100], bootstrap = 50, max_users = {evaluated} }}
index = {{ kind = "auto", min_recall = 0.95, queries = 1000 }}

[model]
width = 32
bias = false
temperature = 0.07

[[model.pairs]]
user = {{ layers = [128, 64] }}
item = {{ layers = [128, 64] }}

[train]
epochs = 1
batch_size = {batch}
lr = 0.002
device = "cpu"
monitor = "validation.recall@10"
checkpoint_seconds = 600
data_shards = 2

[schema]
time = "at"
time_unit = "order"

[[schema.features]]
name = "item_id"
side = "item"
kind = "categorical"
hash_buckets = 200000

[[schema.features]]
name = "topic"
side = "item"
kind = "categorical"

[[schema.features]]
name = "user_id"
side = "user"
kind = "categorical"
hash_buckets = 100000

[[schema.features]]
name = "topics"
side = "user"
kind = "multi_hot"
width = 32
"""


# ---- the made world


def write_world(folder: Path, users: int, items: int, rows: int, batch: int = 2048) -> Path:
    """Write shards of all three tables, and the config that trains on them."""
    for name in ("users", "items", "interactions"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    likes = topics_of(np.arange(users))
    pl.DataFrame(
        {"user_id": np.arange(users), "topics": [*likes]}, schema_overrides={"topics": pl.List(pl.Int64)}
    ).write_parquet(folder / "users" / "part-0.parquet")
    for start in range(0, items, SHARD):
        item = np.arange(start, min(start + SHARD, items))
        pl.DataFrame({"item_id": item, "topic": item % TOPICS}).write_parquet(
            folder / "items" / f"part-{start // SHARD:04d}.parquet"
        )
    rng = np.random.default_rng(0)
    for start in range(0, rows, SHARD):
        n = min(SHARD, rows - start)
        user = (users * rng.random(n) ** 1.5).astype(np.int64)
        topic = np.where(rng.random(n) < 0.8, likes[user, rng.integers(0, 3, n)], rng.integers(0, TOPICS, n))
        item = topic + TOPICS * (items // TOPICS * rng.random(n) ** 3).astype(np.int64)
        pl.DataFrame({"user_id": user, "item_id": item, "at": np.arange(start, start + n)}).write_parquet(
            folder / "interactions" / f"part-{start // SHARD:04d}.parquet"
        )
    (folder / "config.toml").write_text(CONFIG.format(batch=batch, evaluated=EVALUATED), encoding="utf-8")
    return folder / "config.toml"


def topics_of(users: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return (n, 3) the topics that users like."""
    return np.stack([(users * m + a) % TOPICS for m, a in ((7, 1), (131, 5), (977, 11))], 1)


# ---- processes and what they hold


class Watch(threading.Thread):
    """Samples the memory of a process and its children, until `end`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most, self.over = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.most = max(self.most, sum(map(_held, _family(self.pid))))

    def end(self) -> float:
        """Stop sampling. Returns the peak in MB."""
        self.over.set()
        self.join()
        return self.most


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _held(pid: int) -> float:
    with suppress(OSError, TypeError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1e3 if found else 0.0
    return 0.0


def run(words: list[Any]) -> tuple[float, float, str]:
    """Run a command. Returns seconds, memory in MB and output. Exits if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = Watch(process.pid)
    watch.start()
    said, _ = process.communicate()
    memory = watch.end()
    if process.returncode:
        raise SystemExit(f"{words} failed:\n{said[-3000:]}")
    return time.perf_counter() - started, memory, said


def child(function: str, *arguments: Any) -> tuple[float, float, Numbers]:
    """Run a function of this script in a new process, as `run`. Returns its printed JSON too."""
    call = f"import json, scale; print(json.dumps(scale.{function}{arguments!r}))"
    seconds, memory, said = run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {call}"]
    )
    found: Numbers = json.loads(said.splitlines()[-1])
    return seconds, memory, found


# ---- rows


def rows_curve(sizes: list[int], folder: Path, threads: int) -> list[Numbers]:
    found, seconds, memory = [], [], []
    for rows in sizes:
        config = write_world(folder / "rows", max(1_000, rows // 40), 100_000, rows)
        took, held, _ = run([*TWOTOWER, "prepare", config, "--out", folder / "rows" / "prepared"])
        seconds.append(took)
        memory.append(held)
        name = f"scale: {rows:,} interactions"
        found += [
            result(f"{name}, prepare", took, "s", more=False, size=rows),
            result(f"{name}, prepare, memory", held, "MB", more=False),
        ]
        for ranks in (1, 2):
            script = [*TORCHRUN, ranks, __file__, "--steps", folder / "rows", "--threads", max(1, threads // ranks)]
            _, held, said = run(script)
            rate = float(said.split("rows a second:")[1].split()[0])
            what = f"{name}, training, {ranks} rank{'s' if ranks > 1 else ''}"
            found += [result(what, rate, "rows/s"), result(f"{what}, memory", held, "MB", more=False)]
        shutil.rmtree(folder / "rows")
    found.append(result("scale: exponent of interactions, prepare", exponent(sizes, seconds), "", more=False))
    found.append(result("scale: exponent of interactions, memory", exponent(sizes, memory), "", more=False))
    return found


def train_steps(folder: Path, threads: int, steps: int = 300) -> None:
    """Train some steps on the prepared dataset, on all ranks; rank 0 prints rows per second."""
    import torch

    from twotower.config.toml import load_config
    from twotower.data.memmap import MemmapDataset
    from twotower.distributed import DistributedContext
    from twotower.train.trainer import Trainer

    torch.set_num_threads(threads)
    context = DistributedContext.from_environment()
    _, config = load_config(folder / "config.toml")
    with context.process_group():
        trainer = Trainer(MemmapDataset.open(folder / "prepared"), config, context=context)
        steps = min(steps, trainer.objective.steps_per_epoch - 2)
        epoch = trainer.objective.sampler.epoch(0)
        trainer.step(epoch, 0)
        started = time.perf_counter()
        for number in range(1, steps + 1):
            trainer.step(epoch, number)
        rate = steps * config.train.batch_size / (time.perf_counter() - started)
    if context.is_main:
        print(f"rows a second: {rate:.0f} over {steps} steps")


# ---- items


def items_curve(sizes: list[int]) -> list[Numbers]:
    found: list[Numbers] = []
    costs: dict[str, list[float]] = {"build": [], "search": [], "memory": []}
    for items in sizes:
        _, held, told = child("index_items", items)
        name = f"scale: {items:,} items ({told['kind']})"
        costs["build"].append(told["build"])
        costs["search"].append(told["search"])
        costs["memory"].append(held)
        found += [
            result(f"{name}, build and tune", told["build"], "s", more=False, size=items),
            result(f"{name}, one search at recall {told['recall']:.3f}", told["search"] * 1e3, "ms", more=False),
            result(f"{name}, index on disk", told["bytes"] / 1e6, "MB", more=False),
            result(f"{name}, memory to build", held, "MB", more=False),
        ]
    return found + [
        result(f"scale: exponent of items, {what}", exponent(sizes, cost), "", more=False)
        for what, cost in costs.items()
    ]


def index_items(items: int) -> Numbers:
    """Build, tune and search the index that is chosen for `n` items."""
    import tempfile

    from twotower.index import measure_recall, tune_index
    from twotower.index.auto import Auto

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((TOPICS, WIDTH)).astype(np.float32)

    def some(n: int, seed: int) -> Any:
        own = np.random.default_rng(seed)
        made = centres[own.integers(0, TOPICS, n)]
        made += 0.7 * own.standard_normal((n, WIDTH), dtype=np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    vectors, queries = some(items, 1), some(1000, 2)
    started = time.perf_counter()
    index = Auto().build(vectors, np.arange(items), "cosine")
    k = min(K, items)
    tune_index(index, queries[:500], k, RECALL + (1 - RECALL) / 5)
    build = time.perf_counter() - started
    recall = measure_recall(index, queries[500:], k)
    index.threads = 1
    times = []
    for query in queries[500:700]:
        started = time.perf_counter()
        index.search(query[None], k)
        times.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return {"kind": index.kind, "build": build, "recall": recall, "search": float(np.median(times)), "bytes": size}


# ---- tables


WAYS = (("Adam", "replicated", ""), ("Adam", "torchrec", "auto"), ("Adagrad", "replicated", ""),
        ("Adagrad", "torchrec", "table"), ("Adagrad", "torchrec", "column"), ("SGD", "torchrec", "auto"))  # fmt: skip


def tables() -> list[Numbers]:
    found = []
    for optimizer, kind, sharding in WAYS:
        _, _, said = run([*TORCHRUN, 2, __file__, "--tables", f"{optimizer},{kind},{sharding}"])
        told = json.loads(said[said.index("{") : said.index("}") + 1])
        name = f"scale: two tables of {TABLE:,} x 64, {optimizer}, {kind}{f' ({sharding})' if sharding else ''}"
        found += [
            result(name, told["steps"], "steps/s"),
            result(f"{name}, peak of a rank", told["peak"], "MB", more=False),
        ]
    return found


TABLE = 1_000_000


def table_steps(way: str) -> None:
    """Train some steps with one placement of the tables, on all ranks; rank 0 prints speed and memory."""
    import torch

    from twotower.config.toml import parse_config
    from twotower.data.dataset import build_dataset
    from twotower.data.tables import check
    from twotower.distributed import DistributedContext
    from twotower.features.categorical import Categorical
    from twotower.features.schema import Schema
    from twotower.machine import peak_memory_mb
    from twotower.train.trainer import Trainer

    optimizer, kind, sharding = way.split(",")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    ids = {"user_id": rng.integers(0, 100_000, 400_000), "item_id": rng.integers(0, 100_000, 400_000)}
    features = tuple(Categorical(name=f"{s}_id", side=s, hash_buckets=TABLE) for s in ("user", "item"))
    schema = Schema(features=features)
    tower = {"layers": [64]}
    body: dict[str, Any] = {
        "model": {"width": 64, "bias": False, "pairs": [{"user": tower, "item": tower}]},
        "loss": {"kind": "softmax"},
        "train": {
            "device": "cpu",
            "optimizer": optimizer,
            "embedding_placement": kind,
            "monitor": "validation.recall@10",
        }
        | ({"embedding_sharding": sharding if sharding == "auto" else f"{sharding}_wise"} if sharding else {}),
    }
    dataset, (_, config) = (
        build_dataset(check(None, None, pl.DataFrame(ids), schema), schema, parse_config({})[1].split),
        parse_config(body),
    )
    context = DistributedContext.from_environment()
    with context.process_group(always=kind == "torchrec"):
        trainer = Trainer(dataset, config, context=context)
        epoch, steps = trainer.objective.sampler.epoch(0), 6 if kind == "replicated" else 30
        trainer.step(epoch, 0)
        started = time.perf_counter()
        for number in range(1, steps + 1):
            trainer.step(epoch, number)
        spent = time.perf_counter() - started
        if context.is_main:
            print(json.dumps({"steps": steps / spent, "peak": peak_memory_mb()}), flush=True)
        del trainer


# ---- all the way


def end_to_end(users: int, items: int, rows: int, folder: Path) -> list[Numbers]:
    name, found = f"scale: {items:,} items end to end", []

    def told(stage: str, seconds: float, memory: float | None = None) -> None:
        found.append(result(f"{name}, {stage}", seconds, "s", more=False))
        if memory is not None:
            found.append(result(f"{name}, {stage}, memory", memory, "MB", more=False))
        print(f"{stage}: {seconds:,.0f} s, {memory or 0:,.0f} MB", flush=True)

    config = write_world(folder, users, items, rows)
    for made in ("prepared", "run", "vectors", "store"):
        shutil.rmtree(folder / made, ignore_errors=True)
    told("prepare", *run([*TWOTOWER, "prepare", config, "--out", folder / "prepared"])[:2])
    here = ["--set", f"data.prepared={(folder / 'prepared').resolve()}"]
    told("train", *run([*TWOTOWER, "train", config, *here, "--run", folder / "run"])[:2])
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    table = [folder / "run", folder / "items", "--out", folder / "vectors"]
    told("embed, two ranks", *run([*TORCHRUN, 2, "-m", "twotower", "embed", *table])[:2])
    seconds, memory, said = run([*TWOTOWER, "publish", folder / "run", "--store", folder / "store"])
    print(said)
    told("publish", seconds, memory)
    bundle = json.loads(next((folder / "store" / "bundles").glob("*/MANIFEST.json")).read_text())
    size = sum(entry["size"] for entry in bundle["files"]) / 1e6
    with serving(folder / "store") as (ready, ask, held):
        told("serve, ready", ready)
        rng = np.random.default_rng(3)
        for method in (1, 2):
            times = [ask(int(u), method) for u in rng.integers(0, users, 400)][100:]
            for what, share in (("p50", 0.5), ("p99", 0.99)):
                value = float(np.quantile(times, share)) * 1e3
                found.append(result(f"{name}, answer by method {method}, {what}", value, "ms", more=False))
        found.append(result(f"{name}, serve, memory", held(), "MB", more=False))
    return [
        *found,
        result(f"{name}, bundle", size, "MB", more=False),
        result(f"{name}, recall check at {bundle['recall_check']['k']}", bundle["recall_check"]["recall"], ""),
        result(f"{name}, test recall@100 of {EVALUATED:,} users", metrics["test.recall@100"], ""),
        result(f"{name}, popularity's", metrics["baseline.popularity.recall@100"], ""),
    ]


@contextmanager
def serving(store: Path) -> Iterator[tuple[float, Any, Any]]:
    """Start a service. Yields seconds until ready, a function that times one request, and one that returns its memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*TWOTOWER, "serve", "--store", str(store), "--port", str(port)], stdout=subprocess.DEVNULL
    )
    watch = Watch(process.pid)
    watch.start()
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.perf_counter() > started + 600:
                    raise SystemExit("the service did not start") from None
                time.sleep(0.05)
        ready = time.perf_counter() - started

        def ask(user: int, method: int) -> float:
            body = json.dumps({"user_id": str(user), "k": 100, "method": method}).encode()
            call = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/recommend", body, {"Content-Type": "application/json"}
            )
            began = time.perf_counter()
            with urllib.request.urlopen(call, timeout=60) as answer:
                assert len(json.load(answer)["items"]) == 100
            return time.perf_counter() - began

        yield ready, ask, lambda: watch.most
    finally:
        watch.end()
        process.terminate()
        process.wait(60)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return e of cost ~ size^e over the upper sizes."""
    x, y = np.log(np.array(sizes, float)), np.log(np.array(costs, float))
    upper = x >= x.max() - np.log(100) - 1e-9
    return float(np.polyfit(x[upper], y[upper], 1)[0]) if upper.sum() > 1 else float("nan")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="rows,items,tables,end", help="parts to run, separated by commas")
    parser.add_argument("--sizes", default="", help="numbers of rows or items, separated by commas")
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"), help="folder for the made data")
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tables", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.steps:
        train_steps(chosen.steps, chosen.threads)
        return
    if chosen.tables:
        table_steps(chosen.tables)
        return
    sizes = [int(s) for s in chosen.sizes.split(",") if s]
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for part in chosen.only.split(","):
        if part == "rows":
            found = rows_curve(sizes or [10**6, 10**7, 10**8], chosen.folder, chosen.threads)
        elif part == "items":
            found = items_curve(sizes or [10**3, 10**4, 10**5, 10**6, 10**7])
        elif part == "tables":
            found = tables()
        else:
            found = end_to_end(chosen.users, chosen.items, chosen.rows, chosen.folder)
        finish(found, chosen)


if __name__ == "__main__":
    main()
