from argparse import Namespace
from typing import Any

import numpy as np
import polars as pl
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.columns import without_columns
from benchmarks.lib.machine import product_rate, timed
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared
from benchmarks.lib.worlds import dataset
from twotower.config.toml import load_config
from twotower.train.trainer import Trainer

DECLARED: dict[str, Any] = declared(__file__)


def main(chosen: Namespace, report: Report) -> None:
    changed = [*filter(None, [chosen.set]), "train.device='cpu'"]
    schema, config = load_config(ROOT / "examples" / "recipes" / "sequence-long.toml", changed)
    assert schema is not None
    schema = schema.model_copy(update={"time_unit": "order", "title": ""})
    schema, config = without_columns(schema, config, ["user_id"], ["item_id"])
    trainer = Trainer(dataset(None, None, drawn(**DECLARED["world"]), schema, config), config)
    epoch = trainer.objective.sampler.epoch(0)
    size, precision = config.train.batch_size, trainer.recipe.train.precision

    def step() -> None:
        trainer.step(epoch, trainer.progress.batch)

    for _ in range(3):
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    dtype = "bfloat16" if precision == "bf16" else "float32"
    rates = [product_rate(dtype)]
    times = [timed(step) for _ in range(chosen.steps)]
    rates.append(product_rate(dtype))
    print(f"{precision}, batches of {size:,} positions, {flops / size / 1e6:.1f} MFLOP a position in products")
    report.facts["precision"] = precision
    name = f"training, {chosen.threads} thread{'s' * (chosen.threads > 1)}"
    report.add(name, [size / seconds for seconds in times], "positions/s", floor=size * max(rates) / flops)


def drawn(users: int, items: int, longest: int) -> pl.DataFrame:
    """Return interactions of users with log-normal lengths and items with a long tail, no pair twice."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.6, 1.0, users)).astype(int), 20, longest)
    taste = np.log(1 / np.arange(1, items + 1) ** 0.7)
    liked = [np.argpartition(-(taste + rng.gumbel(size=items)), n)[:n] for n in lengths]
    user = np.repeat(np.arange(users), lengths)
    time = np.concatenate([rng.permutation(n) for n in lengths])
    return pl.DataFrame({"user_id": user, "item_id": np.concatenate(liked), "timestamp": time})
