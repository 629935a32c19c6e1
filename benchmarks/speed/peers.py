import statistics
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

from benchmarks.lib.machine import Numbers, product_rate, repeat
from benchmarks.lib.report import Report, declared
from benchmarks.lib.rounds import in_turns
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
            report.add(f"train_speed: from the archive to test AUC {chosen.goal:.2f}", took, "s")


def compare(report: Report, task: str, about: Numbers, dataset: Dataset, rounds: int) -> None:
    """Measure a task of all tools in turns, beside its limit."""
    works, more = tools.works(task), task == "training"

    def once(work: tools.Work) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            seconds = work(dataset, Path(folder))
            return seconds, sum(p.stat().st_size for p in Path(folder).glob("*.onnx*")) / 1e6

    turns = {name: partial(once, work) for name, work in works.items()} | {"limit": lambda: (floor(task, dataset), 0.0)}
    found = in_turns(turns, rounds, optional=set(works) - {"twotower"})
    limits = [limit for limit, _ in found.pop("limit")]
    speeds = {name: [len(dataset.train) / s if more else s for s, _ in pairs] for name, pairs in found.items()}
    ours = speeds.pop("twotower")
    peers, settings = tools.at_best(speeds, more)
    limit = None if task == "export" else statistics.median(limits) if more else min(limits)
    report.add(about["name"], ours, about["unit"], more=more, peers=peers, settings=settings, floor=limit)
    if task == "export":
        sizes = {name: [size for _, size in pairs] for name, pairs in found.items()}
        ours, weights = sizes.pop("twotower"), sum(p.nbytes for p in tools.trainer(dataset).model.parameters()) / 1e6
        peers, _ = tools.at_best(sizes, more)
        report.add("export_speed: size of both towers", ours, "MB", peers=peers, floor=weights)


def floor(task: str, dataset: Dataset, block: int = 512) -> float:
    """Measure the limit of a task; 0 for an export."""
    if task != "evaluation":
        return product_rate() / tools.FLOPS_PER_ROW if task == "training" else 0.0
    factors = factors_before(tools.trainer(dataset).model, dataset, TEST)

    def work() -> None:
        for start in range(0, len(factors.users), block):
            (factors.users[start : start + block] @ factors.items.T).amax(1)

    return min(repeat(work, 0.3))


def seconds_to(goal: float) -> float | None:
    """Return the seconds from the archive to the first epoch whose test AUC reaches `goal`, without the tests."""
    spent, started = 0.0, time.perf_counter()
    dataset = prepare_movielens()
    _, config = parse_config(declared(__file__)["goal"])
    trainer = Trainer(dataset, config)
    for number in range(config.train.epochs):
        epoch = trainer.objective.sampler.epoch(number)
        for step in range(trainer.objective.steps_per_epoch):
            trainer.step(epoch, step)
        testing = time.perf_counter()
        pairs = dataset.part(TEST)
        if auc(trainer.factors().scores(pairs), pairs.positive) >= goal:
            return round(testing - started - spent, 2)
        spent += time.perf_counter() - testing
    return None
