"""Measure training and evaluation on cuda in bf16 beside the CPU, and compare their results.

    TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/gpu_speed.py

The model is that of train_speed.py. First the same step on both devices in fp32: the losses and the weights after it must
agree to 1e-4. Then rows per second of an epoch on cuda in bf16, and the seconds of an evaluation over all users and the whole
catalogue. Rounds alternate with the CPU in fp32. The limit is the time of the towers' matrix products alone, in bf16.
Ends with exit code 2 if there is no GPU.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from evaluation_speed import CONFIG
from measure import finish, options, product_rate, result, timed
from train_speed import FLOPS_PER_ROW, prepare_movielens, twotower_trainer

from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.train.factors import factors_before

TOLERANCE = 1e-4


def main() -> None:
    chosen = options(__doc__, rounds=3).parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no GPU; nothing was measured", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(chosen.threads)
    dataset = prepare_movielens()
    losses, difference = parity(dataset)
    if abs(losses[0] - losses[1]) > TOLERANCE or difference > TOLERANCE:
        sys.exit(f"error: one step gives losses {losses} and weights {difference:.1e} apart on cpu and cuda")
    rates: dict[str, list[float]] = {"cuda": [], "cpu": []}
    seconds: dict[str, list[float]] = {"cuda": [], "cpu": []}
    products = []
    epoch(dataset, "cuda", "bf16", -1)  # the first one also loads kernels
    for number in range(chosen.rounds):
        for device, precision in (("cuda", "bf16"), ("cpu", "fp32")):
            rates[device].append(len(dataset.train) / epoch(dataset, device, precision, number))
            seconds[device].append(evaluation(dataset, device))
        products.append(product_rate("bfloat16", 0.3, 8192, "cuda"))
    beside = "cpu, fp32"
    results = [
        result("gpu_speed: difference of losses after one step", abs(losses[0] - losses[1]), "", more=False),
        result(
            "gpu_speed: training in bf16",
            rates["cuda"],
            "rows/s",
            peers={beside: rates["cpu"]},
            floor=statistics.median(products) / FLOPS_PER_ROW,
            gpu=torch.cuda.get_device_name(),
        ),
        result(
            "gpu_speed: evaluation, all users, whole catalogue",
            seconds["cuda"],
            "s",
            more=False,
            peers={beside: seconds["cpu"]},
            gpu=torch.cuda.get_device_name(),
        ),
    ]
    finish(results, chosen)


def parity(dataset: Dataset) -> tuple[list[float], float]:
    """Return the losses of the first step on both devices, and the largest difference of a weight after it."""
    losses, weights = [], []
    for device in ("cpu", "cuda"):
        trainer = twotower_trainer(dataset, 0, device)
        trainer.step(trainer.objective.sampler.epoch(0), 0)
        losses.append(trainer.progress.loss_sum)
        weights.append([p.detach().cpu() for p in trainer.model.parameters()])
    return losses, max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def epoch(dataset: Dataset, device: str, precision: str, seed: int) -> float:
    """Return the seconds of one epoch."""
    trainer = twotower_trainer(dataset, max(0, seed), device, precision)
    started = time.perf_counter()
    pairs = trainer.objective.sampler.epoch(0)
    for number in range(trainer.objective.steps_per_epoch):
        trainer.step(pairs, number)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def evaluation(dataset: Dataset, device: str) -> float:
    """Return the seconds from a model on the device to the metrics of the test part."""
    model = twotower_trainer(dataset, 0, device).model
    return timed(lambda: evaluate_part(factors_before(model, dataset, TEST), dataset, TEST, CONFIG))


if __name__ == "__main__":
    main()
