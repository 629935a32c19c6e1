"""Measure training and evaluation on cuda in bf16 beside the CPU, and compare their results.

    TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python -m benchmarks.speed.gpu

The model is that of peers.py. First the same step on both devices in fp32: the losses and the weights after it must
agree to 1e-4. Then rows per second of an epoch on cuda in bf16, and the seconds of an evaluation over all users and the whole
catalogue. Rounds alternate with the CPU in fp32. The limit is the time of the towers' matrix products alone, in bf16.
Ends with exit code 2 if there is no GPU.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from benchmarks.lib.machine import product_rate
from benchmarks.lib.report import Report, options
from benchmarks.lib.worlds import prepare_movielens
from benchmarks.speed import tools
from twotower.data.dataset import Dataset

TOLERANCE = 1e-4


def main() -> None:
    chosen = options(__doc__, __file__)
    if not torch.cuda.is_available():
        print("error: torch finds no GPU; nothing was measured", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(chosen.threads)
    dataset, nowhere = prepare_movielens(), Path()
    losses, difference = parity(dataset)
    if abs(losses[0] - losses[1]) > TOLERANCE or difference > TOLERANCE:
        sys.exit(f"error: one step gives losses {losses} and weights {difference:.1e} apart on cpu and cuda")
    rates: dict[str, list[float]] = {"cuda": [], "cpu": []}
    seconds: dict[str, list[float]] = {"cuda": [], "cpu": []}
    products = []
    tools.epoch(dataset, nowhere, "cuda", "bf16")  # the first one also loads kernels
    for _ in range(chosen.rounds):
        for device, precision in (("cuda", "bf16"), ("cpu", "fp32")):
            rates[device].append(len(dataset.train) / tools.epoch(dataset, nowhere, device, precision))
            seconds[device].append(tools.evaluation(dataset, nowhere, device))
        products.append(product_rate("bfloat16", 0.3, 8192, "cuda"))
    floor = statistics.median(products) / tools.FLOPS_PER_ROW
    with Report(chosen, "gpu_speed", gpu=torch.cuda.get_device_name()) as report:
        report.add("difference of losses after one step", abs(losses[0] - losses[1]), more=False)
        report.add("training in bf16", rates["cuda"], "rows/s", peers={"cpu, fp32": rates["cpu"]}, floor=floor)
        beside = {"cpu, fp32": seconds["cpu"]}
        report.add("evaluation, all users, whole catalogue", seconds["cuda"], "s", more=False, peers=beside)


def parity(dataset: Dataset) -> tuple[list[float], float]:
    """Return the losses of the first step on both devices, and the largest difference of a weight after it."""
    losses, weights = [], []
    for device in ("cpu", "cuda"):
        trainer = tools.trainer(dataset, device=device)
        trainer.step(trainer.objective.sampler.epoch(0), 0)
        losses.append(trainer.progress.loss_sum)
        weights.append([p.detach().cpu() for p in trainer.model.parameters()])
    return losses, max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


if __name__ == "__main__":
    main()
