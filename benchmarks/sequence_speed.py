"""Measure the training speed of a transformer over histories, beside the limit of matrix products alone.

    python benchmarks/sequence_speed.py --threads 2

The settings are those of examples/movielens-sequence.toml; the data are made, with the numbers of users, items and
interactions of MovieLens 1M and similar lengths of histories. A step's floating-point operations are counted as it runs; the limit is the rate
of a product of two 2,048 x 2,048 matrices in the precision of the training, measured before and after in the same
process. A profile then shows the share of each operation.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measure import finish, options, product_rate, result, timed
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from twotower.config.toml import load_config
from twotower.data.dataset import build_dataset
from twotower.data.tables import check
from twotower.train.trainer import Trainer

EXAMPLE = Path(__file__).parent.parent / "examples" / "movielens-sequence.toml"
USERS, ITEMS, LONGEST = 6040, 3416, 2000
# Where an operator's time belongs; the first that fits, else "other".
PARTS = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::embedding", "aten::fill_", "aten::zero_"),
    "dropout": ("aten::random_", "aten::ge"),
    "norms": ("native_layer_norm",),
    "softmax of the loss": ("aten::exp_", "aten::amax", "aten::sum", "aten::scatter", "aten::gather"),
    "optimizer and average": ("fused_adam", "aten::lerp"),
}


def main() -> None:
    parser = options(__doc__, threads=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option to change, key=value")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    schema, config = load_config(EXAMPLE, [*chosen.set, "train.device='cpu'"])
    assert schema is not None
    schema = schema.model_copy(update={"time_unit": "order", "title": ""})
    trainer = Trainer(build_dataset(check(None, None, drawn(), schema), schema, config.split), config)
    epoch = trainer.objective.sampler.epoch(0)
    size = config.train.batch_size

    def step() -> None:
        trainer.step(epoch, trainer.progress.batch)

    for _ in range(3):
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    dtype = "bfloat16" if config.train.precision == "bf16" else "float32"
    rates = [product_rate(dtype)]
    times = [timed(step) for _ in range(chosen.steps)]
    rates.append(product_rate(dtype))
    took = statistics.median(times)
    print(
        f"{chosen.threads} threads, {config.train.precision}, batches of {size:,} positions; a step: {took * 1e3:,.0f} ms"
    )
    print(f"products: {flops / size / 1e6:.1f} MFLOP a position at {max(rates) / 1e9:,.0f} GFLOP/s")
    name = f"sequence_speed: training, {chosen.threads} thread{'s' * (chosen.threads > 1)}"
    speed = result(
        name,
        [size / seconds for seconds in times],
        "positions/s",
        floor=size * max(rates) / flops,
        threads=chosen.threads,
        precision=config.train.precision,
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(5):
            step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        part = next((p for p, names in PARTS.items() if any(n in event.key for n in names)), "other")
        spent[part] += event.self_cpu_time_total
    for part, micro in sorted(spent.items(), key=lambda e: -e[1]):
        print(f"{micro / sum(spent.values()):6.1%}  {part}")
    shares = {part: micro / sum(spent.values()) for part, micro in spent.items()}
    finish([speed | {"shares": shares}], chosen)


def drawn() -> pl.DataFrame:
    """Return interactions of users with log-normal lengths and items with a long tail, no pair twice."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.6, 1.0, USERS)).astype(int), 20, LONGEST)
    taste = np.log(1 / np.arange(1, ITEMS + 1) ** 0.7)
    items = [np.argpartition(-(taste + rng.gumbel(size=ITEMS)), n)[:n] for n in lengths]
    user = np.repeat(np.arange(USERS), lengths)
    time_ = np.concatenate([rng.permutation(n) for n in lengths])
    return pl.DataFrame({"user_id": user, "item_id": np.concatenate(items), "timestamp": time_})


if __name__ == "__main__":
    main()
