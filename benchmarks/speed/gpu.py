import statistics
import sys
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.lib.machine import product_rate
from benchmarks.lib.report import Report
from benchmarks.lib.rounds import in_turns
from benchmarks.lib.worlds import prepare_movielens
from benchmarks.speed import tools
from twotower.data.dataset import Dataset

TOLERANCE = 1e-4


def main(chosen: Namespace, report: Report) -> None:
    if not torch.cuda.is_available():
        print("error: torch finds no GPU; nothing was measured", file=sys.stderr)
        sys.exit(2)
    dataset, nowhere = prepare_movielens(), Path()
    losses, difference = parity(dataset)
    if abs(losses[0] - losses[1]) > TOLERANCE or difference > TOLERANCE:
        sys.exit(f"error: one step gives losses {losses} and weights {difference:.1e} apart on cpu and cuda")
    tools.training(dataset, nowhere, "cuda", "bf16")  # the first one also loads kernels
    works = {
        "cuda training": lambda: len(dataset.train) / tools.training(dataset, nowhere, "cuda", "bf16"),
        "cuda evaluation": lambda: tools.evaluation(dataset, nowhere, "cuda"),
        "cpu training": lambda: len(dataset.train) / tools.training(dataset, nowhere),
        "cpu evaluation": lambda: tools.evaluation(dataset, nowhere),
        "limit": lambda: product_rate("bfloat16", 0.3, 8192, "cuda"),
    }
    found = in_turns(works, chosen.rounds)
    floor = statistics.median(found["limit"]) / tools.FLOPS_PER_ROW
    report.facts["gpu"] = torch.cuda.get_device_name()
    report.add("difference of losses after one step", abs(losses[0] - losses[1]), more=False)
    beside = {part: {"cpu, fp32": found[f"cpu {part}"]} for part in ("training", "evaluation")}
    report.add("training in bf16", found["cuda training"], "rows/s", peers=beside["training"], floor=floor)
    seconds, peers = found["cuda evaluation"], beside["evaluation"]
    report.add("evaluation, all users, whole catalogue", seconds, "s", peers=peers)


def parity(dataset: Dataset) -> tuple[list[float], float]:
    """Return the losses of the first step on both devices, and the largest difference of a weight after it."""
    losses, weights = [], []
    for device in ("cpu", "cuda"):
        trainer = tools.trainer(dataset, device=device)
        trainer.step(trainer.objective.sampler.epoch(0), 0)
        losses.append(trainer.progress.loss_sum)
        weights.append([p.detach().cpu() for p in trainer.model.parameters()])
    return losses, max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
