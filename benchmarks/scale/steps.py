"""Some steps of a training on every rank: what rows.py and tables.py start with torchrun. Rank 0 prints its speed and memory."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.lib.report import declared
from benchmarks.lib.worlds import dataset
from twotower import Categorical, Schema
from twotower.config.toml import load_config, override_config, parse_config
from twotower.data.memmap import MemmapDataset
from twotower.distributed import DistributedContext
from twotower.machine import peak_memory_mb
from twotower.train.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, required=True, help="number of steps")
    parser.add_argument(
        "--folder", type=Path, help="folder with config.toml and a prepared dataset; default: the tables"
    )
    parser.add_argument("--size", type=int, default=0, help="rows of each of two made tables")
    parser.add_argument("--set", action="append", default=[], help="option to change, key=value")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    data: MemmapDataset | object
    if chosen.folder:
        _, config = load_config(chosen.folder / "config.toml", chosen.set)
        data = MemmapDataset.open(chosen.folder / "prepared")
    else:
        config = override_config(
            parse_config(declared(str(Path(__file__).with_name("tables.py")))["config"])[1], chosen.set
        )
        rng = np.random.default_rng(0)
        ids = {f"{side}_id": rng.integers(0, 100_000, 400_000) for side in ("user", "item")}
        features = tuple(Categorical(name=f"{s}_id", side=s, hash_buckets=chosen.size) for s in ("user", "item"))
        data = dataset(None, None, pl.DataFrame(ids), Schema(features=features))
    context = DistributedContext.from_environment()
    with context.process_group(always=config.train.embedding_placement == "torchrec"):
        trainer = Trainer(data, config, context=context)
        steps, epoch = min(chosen.steps, trainer.objective.steps_per_epoch - 2), trainer.objective.sampler.epoch(0)
        trainer.step(epoch, 0)
        started = time.perf_counter()
        for number in range(1, steps + 1):
            trainer.step(epoch, number)
        rate = steps / (time.perf_counter() - started)
        if context.is_main:
            rows = rate * config.train.batch_size
            print(json.dumps({"steps": rate, "rows": rows, "peak": peak_memory_mb()}), flush=True)
        del trainer


if __name__ == "__main__":
    main()
