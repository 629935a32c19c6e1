"""Some training steps on every rank, started by rows.py and tables.py with torchrun. Rank 0 prints speed and memory."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import TORCHRUN, Ran, run
from benchmarks.lib.report import declared
from benchmarks.lib.worlds import dataset
from twotower import Categorical, Config, Schema
from twotower.config.toml import load_config, override_config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.memmap import MemmapDataset
from twotower.distributed import DistributedContext
from twotower.machine import peak_memory_mb
from twotower.train.trainer import Trainer


def torchrun(ranks: int, **given: str | int | list[str]) -> tuple[Ran, Numbers]:
    """Run `measure` on some ranks. Returns its cost, and the speed and memory of rank 0."""
    ran = run([*TORCHRUN, ranks, "-m", "benchmarks.scale.steps", json.dumps(given)])
    return ran, json.loads(ran.said[ran.said.index("{") : ran.said.index("}") + 1])


def measure(threads: int, steps: int, folder: str = "", size: int = 0, changed: list[str] | None = None) -> None:
    """Train on a folder of config.toml and prepared data, or on two made tables with `size` rows each."""
    torch.set_num_threads(threads)
    data: Dataset
    if folder:
        data, config = MemmapDataset.open(Path(folder) / "prepared"), load_config(Path(folder) / "config.toml")[1]
    else:
        data, config = made(size, changed or [])
    context = DistributedContext.from_environment()
    with context.process_group(always=config.train.embedding_placement == "torchrec"):
        trainer = Trainer(data, config, context=context)
        steps, epoch = min(steps, trainer.objective.steps_per_epoch - 2), trainer.objective.sampler.epoch(0)
        trainer.step(epoch, 0)
        started = time.perf_counter()
        for number in range(1, steps + 1):
            trainer.step(epoch, number)
        rate = steps / (time.perf_counter() - started)
        if context.is_main:
            rows = rate * config.train.batch_size
            print(json.dumps({"steps": rate, "rows": rows, "peak": peak_memory_mb()}), flush=True)
        del trainer


def made(size: int, changed: list[str]) -> tuple[Dataset, Config]:
    rng = np.random.default_rng(0)
    ids = {f"{side}_id": rng.integers(0, 100_000, 400_000) for side in ("user", "item")}
    features = tuple(Categorical(name=f"{s}_id", side=s, hash_buckets=size) for s in ("user", "item"))
    config = parse_config(declared(str(Path(__file__).with_name("tables.py")))["config"])[1]
    return dataset(None, None, pl.DataFrame(ids), Schema(features=features)), override_config(config, changed)


if __name__ == "__main__":
    measure(**json.loads(sys.argv[1]))
