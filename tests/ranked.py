"""Trainings of several ranks, and of one process: tests/test_distributed.py and tests/train/torchrec run them.

python -m torch.distributed.run --nproc-per-node 2 tests/ranked.py OUT
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import waves
from version_worlds import CHANGING_SCHEMA, changing
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, REPLAYED_SCHEMA, checkerboard, everything, replayed, settings

from twotower.config.experiment import Config
from twotower.data import prepare
from twotower.data.config import DataConfig
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.distributed import DistributedContext
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.model.pooling.decay import Decay
from twotower.model.pooling.ridge import Ridge
from twotower.model.pooling.sum import Sum
from twotower.model.pooling.transformer import Transformer
from twotower.train.order import Epoch
from twotower.train.trainer import Trainer

SOFTMAX: dict[str, Any] = {"kind": "softmax"}
EARLIER: dict[str, Any] = {"history_scope": "causal"}
Array = npt.NDArray[Any]

AUGMENTED: dict[str, Any] = {"layers": [8], "augment": True}

TOWERS_OF_8: dict[str, Any] = {"width": 8, "pairs": [{"user": {"layers": [8]}, "item": {"layers": [8]}}]}
SLOW: dict[str, Any] = {"lr": 0.1}
"""A larger learning rate makes rounding grow."""


def histories(*names: str) -> dict[str, Any]:
    """A model with a pair for each history of the users."""
    item = {"fields": ["item_id"], "layers": []}
    return {"similarity": "dot", "pairs": [{"user": {"fields": [n], "layers": []}, "item": item} for n in names]}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("everything", {}),
    "pairs and random ones": ("everything", {"negatives": {"random": 2}}),
    "pairs in shards": (
        "everything", {"negatives": {"random": 2}, "train": {"data_shards": 6}, "model": {"stacking": True}},
    ),
    "mimic of pairs": ("board", {"loss": {"mimic": 0.5}, "model": {"pairs": [{"user": AUGMENTED, "item": AUGMENTED}]}}),
    "in batch": ("everything", {"loss": SOFTMAX}),
    "in batch, in shards": ("everything", {"loss": SOFTMAX, "train": {"data_shards": 6}}),
    "memory": ("everything", {"loss": SOFTMAX, "negatives": {"cross_batch_memory": 90, "uniform": 9, "popularity": 7}}),
    "the whole catalogue": ("board", {"loss": SOFTMAX, "negatives": {"full": True}}),
    "own candidates": ("everything", {
        "loss": {"kind": "bpr"},
        "negatives": {
            "random": 3, "disliked": 2, "attribute": {"feature": "brand", "n": 2}, "cross_batch_memory": 30,
        },
    }),
    "own candidates in shards": ("everything", {
        "loss": {"kind": "gbce"},
        "negatives": {"random": 3, "disliked": 2, "hard": {"n": 1, "ranks": [1, 9], "ratio": 5}},
        "train": {"data_shards": 6},
    }),
    "mimic of candidates": ("board", {
        "loss": {"kind": "softmax", "mimic": 0.5},
        "negatives": {"uniform": 5, "cross_batch_memory": 40},
        "model": {"pairs": [{"user": AUGMENTED, "item": AUGMENTED}]},
    }),
    "earlier": ("earlier", {"loss": SOFTMAX, "negatives": {"uniform": 9, "disliked": 2}, "train": EARLIER}),
    "earlier in shards": (
        "earlier", {"loss": SOFTMAX, "negatives": {"uniform": 9, "disliked": 2}, "train": EARLIER | {"data_shards": 6}},
    ),
    "prepared, in shards": (
        "prepared", {"loss": SOFTMAX, "negatives": {"uniform": 9, "random": 2}, "train": {"data_shards": 6} | SLOW},
    ),
    "versions": (
        "versions",
        {"loss": SOFTMAX, "negatives": {"uniform": 9, "random": 2, "disliked": 2}, "train": {"data_shards": 6}},
    ),
    "weights of pairs in shards": ("weights", {"negatives": {"random": 2}, "train": {"data_shards": 6}}),
    "weights of candidates": ("weights", {
        "loss": {"kind": "softmax", "mimic": 0.5},
        "negatives": {"uniform": 5, "cross_batch_memory": 40, "disliked": 2},
        "model": {"pairs": [{"user": AUGMENTED, "item": AUGMENTED}]},
    }),
    "beside": ("beside", {"loss": SOFTMAX, "negatives": {"uniform": 9}, "train": EARLIER}),
    "mix": ("histories", {
        "loss": SOFTMAX,
        "negatives": {"full": True},
        "train": {"solved": [{"kind": "ials", "unobserved": [0.1, 0.3]}]} | SLOW,
        "model": histories("two", "one"),
    }),
    "own counts": ("replayed", {
        "loss": SOFTMAX,
        "negatives": {"uniform": 9},
        "scorers": [{"kind": "repeats", "history": "taken"}],
        "evaluation": {"k": [5], "repeats": "allow"},
        "train": {"monitor": "validation.recall@5", "lr": 0.3},
    }),
    "recent popularity": ("waves", {
        "loss": SOFTMAX,
        "negatives": {"uniform": 9},
        "scorers": ["trending"],
        "train": {"monitor": "validation.recall@5"} | SLOW,
    }),
    "attention": (
        "attention",
        {"loss": SOFTMAX, "negatives": {"full": True}, "train": EARLIER | SLOW, "model": TOWERS_OF_8},
    ),
    "a last batch of one": ("board", {"loss": SOFTMAX, "train": {"batch_size": 0}}),
    "a last batch of one pair": ("board", {"train": {"batch_size": 0}}),
    "a last batch of one, histories of items": (
        "fans", {"loss": SOFTMAX, "negatives": {"uniform": 60, "disliked": 5}, "train": {"batch_size": 0}},
    ),
}  # fmt: skip

_KINDS = ("pairs", "own candidates in shards", "mimic of candidates", "memory", "earlier", "attention")
_RULES: dict[str, dict[str, Any]] = {
    "Adagrad": {"optimizer": "Adagrad", "lr": 0.05},
    "Adam": {"optimizer": "Adam", "lr": 0.01},
    "AdamW, a decay": {"optimizer": "AdamW", "lr": 0.01, "embedding_weight_decay": 0.1},
    "SGD, clipped, averaged": {"clip_norm": 0.3, "ema_decay": 0.9},
}
TORCHREC: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{case}, by {way}": (case, {"embedding_sharding": f"{way}_wise"})
        for way in ("table", "column")
        for case in _KINDS
    },
    **{f"{case}, by row": (case, {"embedding_sharding": "row_wise"}) for case in ("pairs", "earlier", "beside")},
    **{f"pairs, {rule}": ("pairs", {"embedding_sharding": "auto", **train}) for rule, train in _RULES.items()},
    "pairs in shards, by row": ("pairs in shards", {"embedding_sharding": "row_wise"}),
}
"""Cases with sharded tables: name -> (case, settings of `train` that differ)."""


@cache
def world(name: str) -> Dataset:
    """Make a dataset, once in a process."""
    if name == "everything":
        return build_dataset(check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, Config().split)
    if name == "versions":
        return build_dataset(check(*changing(), CHANGING_SCHEMA), CHANGING_SCHEMA, Config().split)
    if name == "weights":
        users, items, log = checkerboard()
        weighted = CHECKERBOARD_SCHEMA.model_copy(update={"weight": "n"})
        tables = check(users, items, log.with_columns(n=log["at"] % 7 / 2), weighted)  # 0 to 3
        return build_dataset(tables, weighted, Config().split)
    if name == "prepared":
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)
        checkerboard()[2].write_parquet(Path(folder, "interactions.parquet"))
        data = DataConfig(interactions=folder + "/*.parquet")
        return prepare.write_prepared(data, CHECKERBOARD_SCHEMA, SplitConfig(kind="last"), Path(folder, "out"))
    if name == "waves":
        return waves.world()
    if name == "replayed":
        taken = Sequence(name="taken", side="user", share_embedding=False)
        repeats = REPLAYED_SCHEMA.model_copy(update={"features": (*REPLAYED_SCHEMA.features, taken)})
        return build_dataset(check(None, None, replayed(), repeats), repeats, SplitConfig(kind="time"))
    own: dict[str, Any] = {"side": "user", "share_embedding": False}
    decay = Decay(rates=(0.5, 0.9))
    transformer = Transformer(window=128, heads=2, dropout=0.0, input_dropout=0.0)
    extra: dict[str, tuple[Sequence, ...]] = {
        "fans": (Sequence(name="fans", side="item", interactions="all"),),
        "earlier": (Sequence(name="met", pooling=decay, interactions="all", **own),),
        "beside": (Sequence(name="also", **own), Sequence(name="met", side="user", pooling=decay, beside=("also",))),
        "histories": tuple(
            Sequence(name=n, pooling=pooling, interactions="positive", **own)
            for n, pooling in (("one", Ridge()), ("two", Sum()))
        ),
        "attention": (Sequence(name="met", side="user", pooling=transformer, width=8),),
    }
    features = (*CHECKERBOARD_SCHEMA.features, *extra.get(name, ()))
    schema: Schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": features})
    return build_dataset(check(*checkerboard(), schema), schema, Config().split)


def trainer(case: str, context: DistributedContext | None = None, **train: Any) -> Trainer:
    """Make the trainer of a case, without dropout and unknown values: ranks draw other ones than one process."""
    name, sections = CASES[case]
    data = world(name)
    sections = {k: dict(v) if isinstance(v, dict) else v for k, v in sections.items()}
    sections["model"] = {"unknown_rate": 0.0, "width": 8} | sections.get("model", {})
    chosen = {"optimizer": "SGD", "lr": 0.5, "batch_size": 90, "epochs": 2} | sections.get("train", {}) | train
    if chosen["batch_size"] == 0:
        positives = sections.get("loss", {}).get("kind", "bce") != "bce"
        chosen["batch_size"] = (len(data.positive_indices) if positives else len(data.train)) - 1
    config = settings(**sections | {"train": {"device": "cpu"} | chosen})
    return Trainer(data, config, context=context)


def single(case: str, **train: Any) -> dict[str, Array]:
    """Return what one process trains: `results`, and as "initial/…" the weights before; once in a test process."""
    return dict(_single(case, tuple(sorted(train.items()))))


@cache
def _single(case: str, train: tuple[tuple[str, Any], ...]) -> dict[str, Array]:
    made = trainer(case, **dict(train))
    initial = {f"initial/{n}": p.detach().numpy().copy() for n, p in made.model.named_parameters()}
    return initial | results(made)


def results(of: Trainer) -> dict[str, Array]:
    """Train, and return the weights, the loss and metrics of each epoch, and the shards that were read."""
    torch.set_num_threads(1)
    epochs: list[Epoch] = []
    make = of.objective.sampler.epoch

    def epoch(index: int) -> Epoch:
        epochs.append(make(index))
        return epochs[-1]

    setattr(of.objective.sampler, "epoch", epoch)  # noqa: B010
    trained = of.run()
    found = {n: p.detach().numpy().copy() for n, p in trained.model.named_parameters()}
    names = ("train.loss", "validation.auc", "validation.recall@5")
    found["history"] = np.array([[entry.get(n, 0.0) for n in names] for entry in trained.history])
    found["shards"] = np.array(sorted(epochs[-1]._held))
    return found


def main() -> None:
    out, context = Path(sys.argv[1]), DistributedContext.from_environment()
    cases = sys.argv[2:] or list(CASES)
    with context.process_group(timeout=60, always=True):
        for number, case in enumerate(cases):
            of, train = TORCHREC.get(case, (case, {}))
            found = results(
                trainer(of, context, **(train | {"embedding_placement": "torchrec"} if case in TORCHREC else {}))
            )
            np.savez(out / f"{number}-{context.rank}.npz", allow_pickle=False, **found)
            if context.is_main:
                (out / f"{number}.txt").write_text(case, encoding="utf-8")


if __name__ == "__main__":
    assert os.environ.get("WORLD_SIZE"), "run by torchrun"
    main()
