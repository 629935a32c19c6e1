"""Measure evaluation speed beside torch-rechub and RecBole: every user of MovieLens 1M against the whole catalogue.

    make bench-env && TWOTOWER_DATA=path/to/ml-1m.zip .venv-bench/bin/python benchmarks/evaluation_speed.py

The model and the split are those of train_speed.py, with fresh weights: time does not depend on them. The time is that from
a model to its metrics on the test part: vectors, ranking, metrics.

twotower      both towers over all users and films, then `evaluation.evaluate_part`: the ten best of all films without
              those seen in training or validation; recall, NDCG, MRR, hit rate, coverage; AUC, GAUC and log loss too
torch-rechub  `inference_embedding` of both towers through its loader, its FAISS flat index, `topk_metrics`; what was
              seen stays in, as in its examples, which is less work. Then `MatchTrainer.evaluate`, its AUC of the test
              pairs, read in this process (as shipped) or by another; the row without it is "ten best alone". FAISS is as the
              package sets it up, with kernels for the processor
RecBole       `Trainer.evaluate` in its mode "full": what was seen is left out; recall, MRR, NDCG, hit rate. DSSM has no
              vectors there: all pairs go through both towers. `eval_batch_size` is 2^18, not its 4096, which is slower
the limit     the product of all user and film vectors in blocks, and one pass over the scores
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, options, repeat, result, timed
from peers import FIELDS, at_best, codes, is_importable, quiet, recbole_dssm, rechub_loader, rechub_trainer
from train_speed import prepare_movielens, twotower_trainer

from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset
from twotower.data.splits import TEST
from twotower.evaluation.factors import Factors
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.index.faiss.setup import faiss_settings
from twotower.train.factors import factors_before

CONFIG = parse_config({"evaluation": {"k": [10], "bootstrap": 0}})[1].evaluation


def main() -> None:
    parser = options(__doc__, rounds=3)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    dataset = prepare_movielens()
    works: dict[str, Callable[[Dataset], float]] = {"twotower": twotower_evaluation}
    works |= {name: work for name, work in PEERS.items() if is_importable(name)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    floors: list[float] = []
    factors = factors_before(twotower_trainer(dataset, 0).model, dataset, TEST)
    for _ in range(chosen.rounds):
        for name, work in works.items():
            seconds[name].append(work(dataset))
        floors.append(floor(factors))
    ours = seconds.pop("twotower")
    peers, settings = at_best(seconds, more=False)
    results = [
        result(
            "evaluation_speed: all users, whole catalogue",
            ours,
            "s",
            more=False,
            peers=peers,
            settings=settings,
            floor=min(floors),
            threads=chosen.threads,
        )
    ]
    finish(results, chosen)


def twotower_evaluation(dataset: Dataset) -> float:
    model = twotower_trainer(dataset, 0).model
    return timed(lambda: evaluate_part(factors_before(model, dataset, TEST), dataset, TEST, CONFIG))


def rechub_evaluation(dataset: Dataset, pairs: bool = True, workers: int = 0) -> float:
    from torch_rechub.basic.metric import topk_metrics
    from torch_rechub.utils.data import MatchDataGenerator
    from torch_rechub.utils.match import Faiss

    trainer, columns, test = rechub_trainer(dataset), codes(dataset), dataset.part(TEST)
    wanted: dict[int, list[int]] = {}
    for user, item in zip(test.user[test.positive].tolist(), test.item[test.positive].tolist(), strict=True):
        wanted.setdefault(user, []).append(item)
    tables: dict[str, dict[str, Any]] = {s: {n: columns[n] for n in FIELDS[s]} for s in ("user", "item")}
    users = np.array(sorted(wanted))

    def work() -> None:
        # Its first loader is of training rows, which nobody asks for here.
        generator = MatchDataGenerator(tables["user"], np.zeros(len(columns["user_id"])))
        _, *loaders = generator.generate_dataloader(tables["user"], tables["item"], batch_size=4096, num_workers=0)
        user, item = (
            trainer.inference_embedding(trainer.model, side, loader, folder)
            for side, loader in zip(("user", "item"), loaders, strict=True)
        )
        index = Faiss(item.shape[1], "flat", metric="ip")
        index.fit(item.numpy())
        with faiss_settings(torch.get_num_threads(), item.shape[1]):
            found, _ = index.query(user[users], 10)
        topk_metrics(wanted, dict(zip(users.tolist(), found, strict=True)), [10])
        if pairs:
            trainer.model.mode = None
            trainer.evaluate(trainer.model, rechub_loader(dataset, TEST, workers))

    with tempfile.TemporaryDirectory() as folder, quiet():
        torch.save(trainer.model.state_dict(), Path(folder) / "model.pth")
        return timed(work)


def recbole_evaluation(dataset: Dataset) -> float:
    with recbole_dssm(dataset, ranked=True) as (trainer, _, _, test), quiet():
        return timed(lambda: trainer.evaluate(test, load_best_model=False))


def floor(factors: Factors, block: int = 512) -> float:
    """Return the seconds of the products and one pass over the scores."""

    def work() -> None:
        for start in range(0, len(factors.users), block):
            (factors.users[start : start + block] @ factors.items.T).amax(1)

    return min(repeat(work, 0.3))


PEERS: dict[str, Callable[[Dataset], float]] = {
    "torch-rechub": rechub_evaluation,
    "torch-rechub @ num_workers=1": partial(rechub_evaluation, workers=1),
    "torch-rechub, ten best alone": partial(rechub_evaluation, pairs=False),
    "RecBole": recbole_evaluation,
}

if __name__ == "__main__":
    main()
