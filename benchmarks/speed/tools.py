"""The tools that peers.py and memory.py compare, and this package beside them: the same rows, fields and widths, each as a function that
does the work and returns its seconds.

rechub.py and recbole.py set up the other tools. A tool that is not installed is left out.
"""

from __future__ import annotations

import importlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.lib.machine import Numbers, timed, tool
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.side import SIDES
from twotower.onnx.export import export_tower
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

WIDTH, LAYERS, BATCH = 16, (64, 32), 2048
FLOPS_PER_ROW = 2 * 3 * sum(n * WIDTH * 64 + 64 * 32 for n in (4, 3)) + 2 * 3 * 32
"""Multiply-adds of both towers and the dot product, forward and backward (3 x forward), two flops each."""
PACKAGES = {"torch-rechub": "torch-rechub", "RecBole": "recbole"}
Work = Callable[[Dataset, Path], float]
"""Does the work on a dataset and a fresh folder, and returns its seconds."""


def trainer(dataset: Dataset, seed: int = 0, device: str = "cpu", precision: str = "fp32") -> Trainer:
    """Return the package's trainer with a fresh model."""
    tower: Numbers = {"layers": list(LAYERS), "activation": "ReLU"}
    model: Numbers = {"width": WIDTH, "bias": False, "unknown_rate": 0.0, "pairs": [dict.fromkeys(SIDES, tower)]}
    train: Numbers = {"batch_size": BATCH, "device": device, "precision": precision, "seed": seed}
    return Trainer(dataset, parse_config({"model": model, "train": train})[1])


def epoch(dataset: Dataset, folder: Path, device: str = "cpu", precision: str = "fp32") -> float:
    """Measure one epoch of the package's trainer, from shuffling to the last update."""
    made = trainer(dataset, device=device, precision=precision)
    started = time.perf_counter()
    pairs = made.objective.sampler.epoch(0)
    for number in range(made.objective.steps_per_epoch):
        made.step(pairs, number)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def evaluation(dataset: Dataset, folder: Path, device: str = "cpu") -> float:
    """Measure the time from a model to the metrics of the test part."""
    model = trainer(dataset, device=device).model
    config = parse_config({"evaluation": {"k": [10], "bootstrap": 0}})[1].evaluation
    return timed(lambda: evaluate_part(factors_before(model, dataset, TEST), dataset, TEST, config))


def export(dataset: Dataset, folder: Path) -> float:
    """Measure the export of both towers, compared with the model."""
    model = trainer(dataset).model

    def work() -> None:
        for side in SIDES:
            export_tower(model, side, dataset.encoders.fields(side), folder / f"{side}.onnx")

    return timed(work)


def works(task: str) -> dict[str, Work]:
    """Return a task of every tool that can be imported, by "TOOL" (as shipped), "TOOL @ SETTING" or "TOOL, VARIANT"."""
    from benchmarks.speed import recbole, rechub

    rows: dict[str, dict[str, Work]] = {
        "training": {
            "twotower": epoch,
            "torch-rechub": rechub.epoch,
            "torch-rechub @ num_workers=1": partial(rechub.epoch, workers=1),
            "RecBole": recbole.epoch,
        },
        "evaluation": {
            "twotower": evaluation,
            "torch-rechub": rechub.evaluation,
            "torch-rechub @ num_workers=1": partial(rechub.evaluation, workers=1),
            "torch-rechub, ten best alone": partial(rechub.evaluation, pairs=False),
            "RecBole": recbole.evaluation,
        },
        "export": {
            "twotower": export,
            "torch-rechub": rechub.export,
            "torch-rechub, dynamo=False": partial(rechub.export, dynamo=False),
        },
    }
    return {name: work for name, work in rows[task].items() if name == "twotower" or is_importable(name)}


def is_importable(name: str) -> bool:
    """Return True if a tool can be imported; print a line if not."""
    name = name.partition(",")[0].partition(" @ ")[0]
    try:
        if name == "RecBole":
            from benchmarks.speed.recbole import shim

            shim()
        importlib.import_module(PACKAGES[name].replace("-", "_"))
    except ImportError as e:
        print(f"{name} is left out ({e}): make bench-env", file=sys.stderr)
        return False
    return True


def tool_label(name: str) -> str:
    """Return a tool with its version, and its variant, where `name` has one after a comma."""
    name, comma, way = name.partition(",")
    return tool(PACKAGES[name]).replace("recbole", "RecBole") + comma + way


def at_best(tried: Mapping[str, list[float]], more: bool) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return peers and their settings from the rounds of "TOOL" (as shipped) and "TOOL @ SETTING".

    The variant with the best median stands for the tool; where several were tried, the tool as shipped is listed beside it.
    """
    ways: dict[str, dict[str, list[float]]] = {}
    for name, values in tried.items():
        base, _, setting = name.partition(" @ ")
        if values:
            ways.setdefault(tool_label(base), {})[setting or "as shipped"] = values
    peers, settings = {}, {}
    for label, given in ways.items():
        best = (max if more else min)(given, key=lambda setting: median(given[setting]))
        peers[label] = given[best]
        if len(given) > 1:
            settings[label] = best
            peers[f"{label}, as shipped"] = given.get("as shipped", [])
    return peers, settings


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of the tools."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
