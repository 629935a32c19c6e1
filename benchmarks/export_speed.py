"""Measure the export of both towers as ONNX beside torch-rechub: seconds and bytes.

    make bench-env && TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/export_speed.py

The model is that of train_speed.py, with fresh weights: time and size do not depend on them. The package's time includes
writing the file, loading it, and comparing it with the model. torch-rechub's is its
`MatchTrainer.export_onnx`, which traces with `torch.onnx.export` (opset 18, any batch size) and compares nothing; by the
exporter it takes by default, and by the older one (`dynamo=False`). Its bytes count the file of weights that it may
write beside the graph. The limit of the bytes is that of the weights alone.
RecBole exports no model.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import finish, options, result, timed
from peers import is_importable, quiet, rechub_trainer, tool_label
from train_speed import prepare_movielens, twotower_trainer

from twotower.data.dataset import Dataset
from twotower.features.side import SIDES
from twotower.onnx.export import export_tower

Export = Callable[[Dataset, Path], float]
"""Writes both towers into a folder and gives the seconds."""


def main() -> None:
    parser = options(__doc__, rounds=3)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dataset = prepare_movielens()
    works: dict[str, Export] = {"twotower": twotower_export}
    if is_importable("torch-rechub"):
        works |= {tool_label("torch-rechub"): rechub_export}
        works |= {tool_label("torch-rechub, dynamo=False"): partial(rechub_export, dynamo=False)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    sizes: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(chosen.rounds):
        for name, work in works.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    seconds[name].append(work(dataset, Path(folder)))
                    sizes[name].append(sum(p.stat().st_size for p in Path(folder).iterdir()) / 1e6)
                except Exception as e:  # a peer that fails must not take the others' numbers along
                    if name == "twotower":
                        raise
                    print(f"{name} failed: {e}", file=sys.stderr)
    weights = sum(p.nbytes for p in twotower_trainer(dataset, 0).model.parameters()) / 1e6
    results = [
        result(
            "export_speed: both towers",
            seconds.pop("twotower"),
            "s",
            more=False,
            peers=seconds,
            threads=chosen.threads,
        ),
        result(
            "export_speed: size of both towers",
            sizes.pop("twotower"),
            "MB",
            more=False,
            peers=sizes,
            floor=weights,
        ),
    ]
    finish(results, chosen)


def twotower_export(dataset: Dataset, folder: Path) -> float:
    model = twotower_trainer(dataset, 0).model

    def work() -> None:
        for side in SIDES:
            export_tower(model, side, dataset.encoders.fields(side), folder / f"{side}.onnx")

    return timed(work)


def rechub_export(dataset: Dataset, folder: Path, **settings: Any) -> float:
    trainer = rechub_trainer(dataset)
    importlib.import_module("onnx")  # as ours has it by now

    def work() -> None:
        for side in SIDES:
            made = trainer.export_onnx(
                str(folder / f"{side}.onnx"), mode=side, opset_version=18, onnx_export_kwargs=settings or None
            )
            if not made:
                raise RuntimeError(f"it wrote no {side} tower")

    with quiet():
        return timed(work)


if __name__ == "__main__":
    main()
