"""The tools that peers.py and memory.py compare, and this package beside them: the same rows, fields and widths, each
as a function that does the work and returns its seconds; rechub.py and recbole.py set up the other tools.
"""

import importlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.lib.machine import Numbers, timed, tool
from benchmarks.lib.report import declared
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
Work = Callable[[Dataset, Path], float]  # does the work on a dataset and a fresh folder, and returns its seconds


def trainer(dataset: Dataset, seed: int = 0, device: str = "cpu", precision: str = "fp32") -> Trainer:
    tower: Numbers = {"layers": list(LAYERS), "activation": "ReLU"}
    model: Numbers = {"width": WIDTH, "bias": False, "unknown_rate": 0.0, "pairs": [dict.fromkeys(SIDES, tower)]}
    train: Numbers = {"batch_size": BATCH, "device": device, "precision": precision, "seed": seed}
    return Trainer(dataset, parse_config({"model": model, "train": train})[1])


def training(dataset: Dataset, folder: Path, device: str = "cpu", precision: str = "fp32") -> float:
    """Measure one epoch of the package's trainer, from shuffling to the last update."""
    made = trainer(dataset, device=device, precision=precision)

    def work() -> None:
        pairs = made.objective.sampler.epoch(0)
        for number in range(made.objective.steps_per_epoch):
            made.step(pairs, number)
        if device == "cuda":
            torch.cuda.synchronize()

    return timed(work)


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
    found: dict[str, Work] = {"twotower": globals()[task]}
    for name, settings in declared(str(Path(__file__).with_name("peers.py")))["works"][task].items():
        tool = name.partition(",")[0].partition(" @ ")[0]
        module = importlib.import_module(f"benchmarks.speed.{tool.removeprefix('torch-').lower()}")
        try:
            module.need()
        except ImportError as e:
            print(f"{name} is left out ({e}): make bench-env", file=sys.stderr)
        else:
            found[name] = partial(getattr(module, task), **settings)
    return found


def tool_label(name: str) -> str:
    """Return a tool with its version, and its variant, where `name` has one after a comma."""
    name, comma, way = name.partition(",")
    return tool(PACKAGES[name]).replace("recbole", "RecBole") + comma + way


def at_best(tried: Mapping[str, list[float]], more: bool) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return peers and their settings from the rounds of "TOOL" (as shipped) and "TOOL @ SETTING".

    The variant with the best median represents the tool; if several were tried, the tool as shipped is listed too.
    """
    ways: dict[str, dict[str, list[float]]] = {}
    for name, values in tried.items():
        base, _, setting = name.partition(" @ ")
        if values:
            ways.setdefault(tool_label(base), {})[setting or "as shipped"] = values
    settings = {label: (max if more else min)(of, key=lambda way: median(of[way])) for label, of in ways.items()}
    peers = {label: ways[label][best] for label, best in settings.items()}
    several = [label for label, of in ways.items() if len(of) > 1]
    peers |= {f"{label}, as shipped": ways[label].get("as shipped", []) for label in several}
    return peers, {label: settings[label] for label in several}


@contextmanager
def quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
