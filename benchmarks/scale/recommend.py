import re
import shutil
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.machine import Numbers, read
from benchmarks.lib.processes import call
from benchmarks.lib.report import Report

WIDTH, SEEN = 128, 500
POSITIVE = 0.01  # share of the interactions that are trained on
HELD_OUT = 0.02  # share of the interactions that are not: half of them are positive
BLOCK = 16_384  # users of a search


def main(chosen: Namespace, report: Report) -> None:
    folder = Path(chosen.folder).resolve() / f"recommend-{chosen.users}-{chosen.items}"
    if not (folder / "store" / "CURRENT").exists():
        shutil.rmtree(folder, ignore_errors=True)
        call(make_store, str(folder), chosen.users, chosen.items)
    shutil.rmtree(folder / "recs", ignore_errors=True)
    name = f"top {chosen.k} of {chosen.items:,} items for {chosen.users:,} users"
    half, given = chosen.users // 2, (chosen.k, chosen.threads)
    _, before = call(search, str(folder / "store"), *given, 0, half)
    job, told = call(answer, str(folder), *given)
    _, after = call(search, str(folder / "store"), *given, half, chosen.users)
    kernel = {what: before[what] + after[what] for what in ("seconds", "cpu")}
    report.add(f"{name}, exact kernel", kernel["seconds"], "s")
    report.add_cost(f"{name}, job", job)
    report.add(f"{name}, job, times the kernel", job.seconds / kernel["seconds"], more=False)
    report.add(f"{name}, job, times the kernel in CPU time", told["cpu"] / kernel["cpu"], more=False)
    report.add(f"{name}, job, memory beside the bundle", job.memory - before["memory"], "MB")
    size = sum(path.stat().st_size for path in (folder / "recs").glob("*.parquet"))
    report.add(f"{name}, answers on disk", size / 1e6, "MB")


def answer(folder: str, k: int, threads: int) -> Numbers:
    """Answer all users, as `twotower recommend --users` does, and return the CPU seconds of the process."""
    from twotower.retrieval.recommendation_job import recommend_users

    recommend_users(f"{folder}/store", f"{folder}/users.parquet", f"{folder}/recs", k, threads=threads)
    return {"cpu": time.process_time()}


def make_store(folder: str, users: int, items: int) -> None:
    """Publish a hardly trained model of random tables with an exact index; users.parquet is in random order."""
    import twotower
    from twotower import api
    from twotower.config.toml import parse_config
    from twotower.features.categorical import Categorical

    rng, at = np.random.default_rng(0), Path(folder)
    seen = np.minimum(SEEN, rng.lognormal(2, 1, users)).astype(np.int64) + 1
    user = np.repeat(np.arange(users), seen)
    time_steps = rng.permutation(len(user))
    positive = np.where(time_steps < (1 - HELD_OUT) * len(user), POSITIVE, 0.5)
    actions = pl.DataFrame(
        {
            "user_id": user,
            "item_id": rng.integers(0, items, len(user)),
            "liked": (rng.random(len(user)) < positive).astype(np.int8),
            "at": time_steps,
        }
    )
    features = (
        Categorical(name="user_id", side="user", hash_buckets=100_000),
        Categorical(name="item_id", side="item", hash_buckets=100_000),
    )
    schema = twotower.Schema(label="liked", time="at", time_unit="order", features=features)
    tower = {"layers": [WIDTH]}
    config = parse_config(
        {
            "split": {"kind": "time", "test": HELD_OUT / 2, "validation": HELD_OUT / 2},
            "loss": {"kind": "softmax"},
            "model": {"width": 32, "bias": False, "pairs": [{"user": tower, "item": tower}]},
            "train": {"epochs": 1, "batch_size": 4096, "device": "cpu", "monitor": "validation.recall@10"},
            "evaluation": {"k": [10], "bootstrap": 0, "max_users": 100},
            "index": {"kind": "exact", "queries": 50},
        }
    )[1]
    tables = (pl.DataFrame({"user_id": np.arange(users)}), pl.DataFrame({"item_id": np.arange(items)}), actions)
    api.publish(api.fit(tables, schema, config, folder=at / "run"), at / "store")
    shutil.rmtree(at / "run")
    pl.DataFrame({"user_id": rng.permutation(users)}).write_parquet(at / "users.parquet")


def search(store: str, k: int, threads: int, start: int, stop: int) -> Numbers:
    """Search for a range of user rows; return seconds, CPU seconds, and the private MB before the search."""
    from twotower.retrieval.retriever import Retriever
    from twotower.store.store import Store

    retriever = Retriever(Store(store).current(), threads)
    held = re.search(r"RssAnon:\s+(\d+)", read("/proc/self/status"))
    memory = int(held[1]) / 1024 if held else 0.0
    vectors = np.array(retriever.loaded.stored_vectors(slice(start, stop)))
    retriever.index.search(vectors[:BLOCK], k)
    began, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(vectors), BLOCK):
        retriever.index.search(vectors[first : first + BLOCK], k)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "memory": memory}
