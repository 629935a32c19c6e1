"""Measure training, evaluation and export beside torch-rechub and RecBole in one process, on MovieLens 1M."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.lib.machine import Numbers, product_rate, repeat
from benchmarks.lib.report import Report, declared
from benchmarks.lib.worlds import prepare_movielens
from benchmarks.speed import tools
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.evaluation.metrics.auc import auc
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer


def main(chosen: Namespace, report: Report) -> None:
    dataset = prepare_movielens()
    for task, about in declared(__file__)["tasks"].items():
        if task in chosen.only:
            compare(report, task, about, dataset, chosen.rounds)
    if "goal" in chosen.only:
        if (took := seconds_to(chosen.goal)) is None:
            print(f"test AUC {chosen.goal} was not reached", file=sys.stderr)
        else:
            report.add(f"train_speed: from the archive to test AUC {chosen.goal:.2f}", took, "s", more=False)


def compare(report: Report, task: str, about: Numbers, dataset: Dataset, rounds: int) -> None:
    """Measure a task of all tools in turns."""
    works = tools.works(task)
    found: dict[str, list[float]] = {name: [] for name in works}
    sizes: dict[str, list[float]] = {name: [] for name in works}
    floors = []
    more = task == "training"
    for _ in range(rounds):
        for name, work in works.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    seconds = work(dataset, Path(folder))
                except Exception as e:  # a peer that fails must not take the others' numbers along
                    if name == "twotower":
                        raise
                    print(f"{name} failed: {e}", file=sys.stderr)
                    continue
                found[name].append(len(dataset.train) / seconds if more else seconds)
                sizes[name].append(sum(p.stat().st_size for p in Path(folder).glob("*.onnx*")) / 1e6)
        floors.append(floor(task, dataset))
    ours = found.pop("twotower")
    peers, settings = tools.at_best(found, more)
    given: Numbers = {"more": more, "peers": peers, "settings": settings}
    if limits := [one for one in floors if one is not None]:
        given["floor"] = statistics.median(limits) if more else min(limits)
    report.add(about["name"], ours, about["unit"], **given)
    if task == "export":
        weights = sum(p.nbytes for p in tools.trainer(dataset).model.parameters()) / 1e6
        ours = sizes.pop("twotower")
        peers, _ = tools.at_best(sizes, more)
        report.add("export_speed: size of both towers", ours, "MB", more=False, peers=peers, floor=weights)


def floor(task: str, dataset: Dataset, block: int = 512) -> float | None:
    """Measure the limit of a task."""
    if task == "training":
        return product_rate() / tools.FLOPS_PER_ROW
    if task == "export":
        return None
    factors = factors_before(tools.trainer(dataset).model, dataset, TEST)

    def work() -> None:
        for start in range(0, len(factors.users), block):
            (factors.users[start : start + block] @ factors.items.T).amax(1)

    return min(repeat(work, 0.3))


def seconds_to(goal: float) -> float | None:
    """Return the seconds from the archive to the first epoch whose test AUC reaches `goal`; the time of the test is excluded."""
    spent = 0.0
    started = time.perf_counter()
    dataset = prepare_movielens()
    _, config = parse_config(declared(__file__)["goal"])
    trainer = Trainer(dataset, config)
    for number in range(config.train.epochs):
        epoch = trainer.objective.sampler.epoch(number)
        for step in range(trainer.objective.steps_per_epoch):
            trainer.step(epoch, step)
        at = time.perf_counter() - started - spent
        testing = time.perf_counter()
        pairs = dataset.part(TEST)
        found = auc(trainer.factors().scores(pairs), pairs.positive)
        spent += time.perf_counter() - testing
        if found >= goal:
            return round(at, 2)
    return None
