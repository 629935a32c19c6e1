"""Checks of kinds of one's own, to copy and to change: `PYTHONPATH=examples python examples/check_kinds.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch
from mykinds.branches import MaskBranch
from mykinds.carriers import Curved
from mykinds.datasets import Shop
from mykinds.indexes import Lsh
from mykinds.losses import Focal
from mykinds.metrics import TailShare
from mykinds.negatives import Recent
from mykinds.optimizers import RmsProp
from mykinds.poolings import Recency

import twotower
from twotower.arrays.ragged import row_of
from twotower.features.feature import Feature
from twotower.features.sequence import Sequence
from twotower.train.losses.loss import Columns, ContrastiveLoss


def check_loss(loss: ContrastiveLoss) -> None:
    """Assert that `block` gives the gradient of `rows`, which raises positives and lowers all others."""
    logits, positive, columns = torch.randn(20, 15), torch.randint(15, (20, 1)), Columns(torch.ones(15), 40)
    leaf = logits.clone().requires_grad_()
    value = loss.rows(leaf, positive, columns).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(loss.block(logits, positive, columns, torch.ones(20, 1)), value.detach())
    torch.testing.assert_close(logits, gradient)
    assert bool((gradient.gather(1, positive) < 0).all())
    assert bool((gradient.scatter(1, positive, 0.0) >= 0).all())


def check_feature(feature: Feature, column: pl.Series) -> None:
    """Assert that a restored encoder gives each row alone what the first one gives it among others."""
    encoder = feature.fit(column, np.ones(len(column), np.int64))
    state, many = json.loads(encoder.state().model_dump_json()), encoder.transform(column)
    again = feature.encoder.restore(state, encoder.stored_vocabulary())
    assert again.field("x", 8) == encoder.field("x", 8)
    for row in range(len(column)):
        np.testing.assert_array_equal(row_of(again.transform(column[row : row + 1]), 0), row_of(many, row))


def check_model(data: Shop, features: list[Feature], config: twotower.Config, folder: Path) -> None:
    """Assert that two trainings give the same vectors, and that the published model scores as the trained one."""
    own = {f.name for f in features}
    kept = [f for f in data.table_schema.features if f.name not in own]
    schema, shop = data.table_schema.model_copy(update={"features": (*kept, *features)}), data.load()
    tables = (shop.users, shop.items, shop.interactions)
    run, again = (twotower.fit(tables, schema, config, folder=folder / name) for name in ("run", "again"))
    assert run.factors().users.equal(again.factors().users)
    print({name: value for name, value in run.metrics.items() if name.startswith("test.")})
    twotower.publish(run, folder / "store")  # compares each exported tower with torch, and the index with exact search
    retriever = twotower.retriever(folder / "store")
    user = str(run.dataset.users.ids[0])
    expected = {item.id: item.score for item in twotower.recommend(run, user, k=60).items}
    for method in (1, 2):
        for item in retriever.recommend(twotower.Request(user), k=5, method=method).items:
            np.testing.assert_allclose(item.score, expected[item.id], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    check_loss(Focal(gamma=2))
    check_feature(Curved(name="price", side="item"), pl.Series("price", [1.0, None, 20.0, 3.5]))
    tower = {"layers": [8], "branches": [MaskBranch(width=6), {"kind": "identity"}]}
    settings = {
        "model": {"width": 8, "pairs": [{"user": tower, "item": tower}]},
        "loss": Focal(gamma=2),
        "negatives": {"sources": [Recent(n=20)]},
        "train": {
            "optimizer": RmsProp(), "epochs": 2, "batch_size": 256, "history_scope": "causal", "device": "cpu",
            "monitor": "validation.recall@5",
        },
        "evaluation": {"k": [5], "bootstrap": 0, "metrics": [TailShare()]},
        "index": Lsh(bits=256, min_recall=0.5),
    }  # fmt: skip
    mine: list[Feature] = [
        Sequence(name="bought", side="user", interactions="positive", pooling=Recency(steps=4)),
        Curved(name="price", side="item"),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        check_model(Shop(customers=60), mine, twotower.Config.model_validate(settings), Path(temporary))
