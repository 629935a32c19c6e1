"""torch-rechub on the rows of peers.py, as peers.toml describes it."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.machine import timed
from benchmarks.lib.worlds import FIELDS
from benchmarks.speed.tools import BATCH, LAYERS, WIDTH, quiet
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN
from twotower.features.side import SIDES
from twotower.index.faiss.setup import faiss_settings


def need() -> None:
    importlib.import_module("torch_rechub")


def training(dataset: Dataset, folder: Path, workers: int = 0) -> float:
    made, rows = trainer(dataset), loader(dataset, workers=workers)
    with quiet():
        return timed(lambda: made.train_one_epoch(rows))


def evaluation(dataset: Dataset, folder: Path, pairs: bool = True, workers: int = 0) -> float:
    from torch_rechub.basic.metric import topk_metrics
    from torch_rechub.utils.data import MatchDataGenerator
    from torch_rechub.utils.match import Faiss

    made, columns, test = trainer(dataset), codes(dataset), dataset.part(TEST)
    users = np.unique(test.user[test.positive])
    wanted = {user: test.item[test.positive & (test.user == user)].tolist() for user in users.tolist()}
    tables: dict[str, dict[str, Any]] = {s: {n: columns[n] for n in FIELDS[s]} for s in SIDES}

    def work() -> None:
        # Its first loader is of training rows, which nobody asks for here.
        generator = MatchDataGenerator(tables["user"], np.zeros(len(columns["user_id"])))
        _, *loaders = generator.generate_dataloader(tables["user"], tables["item"], batch_size=4096, num_workers=0)
        sides = zip(SIDES, loaders, strict=True)
        user, item = (made.inference_embedding(made.model, side, rows, str(folder)) for side, rows in sides)
        index = Faiss(item.shape[1], "flat", metric="ip")
        index.fit(item.numpy())
        with faiss_settings(torch.get_num_threads(), item.shape[1]):
            found, _ = index.query(user[users], 10)
        topk_metrics(wanted, dict(zip(users.tolist(), found, strict=True)), [10])
        if pairs:
            made.model.mode = None
            made.evaluate(made.model, loader(dataset, TEST, workers))

    with quiet():
        torch.save(made.model.state_dict(), folder / "model.pth")
        return timed(work)


def export(dataset: Dataset, folder: Path, **settings: Any) -> float:
    """Measure the export of both towers, by the exporter it takes by default, or by the older one (`dynamo=False`)."""
    made = trainer(dataset)
    importlib.import_module("onnx")  # as ours has it by now

    def work() -> None:
        for side in SIDES:
            to, given = str(folder / f"{side}.onnx"), settings or None
            if not made.export_onnx(to, mode=side, opset_version=18, onnx_export_kwargs=given):
                raise RuntimeError(f"it wrote no {side} tower")

    with quiet():
        return timed(work)


def codes(dataset: Dataset) -> dict[str, Any]:
    """Return the codes of each of FIELDS by the row of its side."""
    sides = {"user": dataset.users, "item": dataset.items}
    return {name: sides[side].columns[name] for side, names in FIELDS.items() for name in names}


def trainer(dataset: Dataset) -> Any:
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.matching import DSSM
    from torch_rechub.trainers import MatchTrainer

    sizes = {name: int(column.max()) + 1 for name, column in codes(dataset).items()}
    features = {s: [SparseFeature(n, vocab_size=sizes[n], embed_dim=WIDTH) for n in FIELDS[s]] for s in SIDES}
    params = {"dims": list(LAYERS), "activation": "relu"}
    model = DSSM(features["user"], features["item"], user_params=params, item_params=params, temperature=0.1)
    return MatchTrainer(model, mode=0, optimizer_params={"lr": 1e-3}, n_epoch=1, device="cpu")


def loader(dataset: Dataset, part: int = TRAIN, workers: int = 0) -> Any:
    """Return the loader of a part with `workers` processes; the train part is shuffled."""
    from torch_rechub.utils.data import DataGenerator

    pairs, columns = dataset.part(part), codes(dataset)
    x = {name: columns[name][pairs.user] for name in FIELDS["user"]}
    x |= {name: columns[name][pairs.item] for name in FIELDS["item"]}
    y = pairs.positive.astype("float32")
    others = {"x_val": x, "y_val": y, "x_test": x, "y_test": y}
    shuffled, ordered, _ = DataGenerator(x, y).generate_dataloader(**others, batch_size=BATCH, num_workers=workers)
    return shuffled if part == TRAIN else ordered
