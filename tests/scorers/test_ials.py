"""Start `ials` beside columns of the items: known items score as without, and new ones as their columns let expect."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from worlds import settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import check
from twotower.evaluation.factors import Factors
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.values import UNKNOWN
from twotower.scorers.columns import ContentMatrix
from twotower.scorers.ials import PRIOR_ITEMS, nearest
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

USERS, ITEMS, KINDS = 500, 80, 5
COLUMNS = ["kind", "tags", "year"]


def features() -> tuple[Feature, ...]:
    return (
        Sequence(name="h", side="user", share_embedding=False, pooling={"kind": "ridge", "steps": 60}),
        Categorical(name="item_id", side="item"),
        Categorical(name="kind", side="item"),
        MultiHot(name="tags", side="item", pooling="sqrt"),
        Numeric(name="year", side="item", buckets=8),
    )


def log() -> Dataset:
    """Users take items of one kind, most of the time; every eighth item is in the test part alone, and the last one,
    without a value of a column, in none."""
    rng = np.random.default_rng(2)
    items = pl.DataFrame(
        {
            "item_id": range(ITEMS + 1),
            "kind": [*(f"k{i % KINDS}" for i in range(ITEMS)), None],
            "tags": [*([f"t{t}" for t in rng.choice(9, 1 + i % 3, replace=False)] for i in range(ITEMS)), []],
            "year": [*(1980 + rng.integers(0, 40, ITEMS)).tolist(), None],
        },
        schema_overrides={"tags": pl.List(pl.String)},
    )
    rows = list[tuple[int, int, str]]()
    for user in range(USERS):
        own = rng.permutation(np.arange(user % KINDS, ITEMS, KINDS))[:5]
        for item in np.unique([*own, *rng.integers(0, ITEMS, 2)]).tolist():
            rows.append((user, item, "test" if item % 8 == 3 or rng.random() < 0.1 else "train"))
    schema = Schema(features=features())
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "part"], orient="row")
    return build_dataset(check(None, items, frame, schema), schema, SplitConfig(kind="column", column="part"))


def config(item: dict[str, Any]) -> Config:
    return settings(
        model={
            "width": 12, "similarity": "dot", "temperature": 1.0, "bias": True, "unknown_rate": 0.0,
            "pairs": [{"user": {"fields": ["h"], "layers": []}, "item": {"layers": []} | item}],
        },
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={
            "epochs": 0, "device": "cpu", "solved": [{"kind": "ials", "unobserved": [0.3], "regularization": [0.008]}],
        },
        evaluation={"k": [5], "bootstrap": 0},
    )  # fmt: skip


BESIDE: dict[str, Any] = {"fields": ["item_id", *COLUMNS], "join": "sum", "activation": "Identity"}


def factors(data: Dataset, item: dict[str, Any]) -> Factors:
    return factors_before(Trainer(data, config(item)).run().model, data, TEST)


def test_known_items_score_as_without_columns_and_new_ones_by_them() -> None:
    data = log()
    alone, beside = factors(data, {"fields": ["item_id"]}), factors(data, BESIDE)
    codes = np.asarray(data.items.columns["item_id"])
    known, kinds = codes != UNKNOWN, np.arange(ITEMS + 1) % KINDS
    assert (~known).sum() == ITEMS // 8 + 1
    torch.testing.assert_close(beside.users, alone.users)
    torch.testing.assert_close(beside.items[known], alone.items[known], rtol=1e-4, atol=1e-5)
    assert not alone.items[~known, :-2].any()
    assert not beside.items[-1, :-2].any(), "nothing is known of it"
    scores = (beside.users @ beside.items.T).numpy()
    of_new = scores[:, ~known][:, :-1]
    likes = (np.arange(USERS)[:, None] % KINDS) == kinds[~known][None, :-1]
    assert of_new[likes].mean() > of_new[~likes].mean() + 2 * of_new[~likes].std()


def test_the_vectors_of_values_are_those_of_a_ridge_regression() -> None:
    data, generator = log(), torch.Generator().manual_seed(0)
    codes = np.asarray(data.items.columns["item_id"])
    content = ContentMatrix.of(data, (*COLUMNS,), codes, int(codes.max()) + 1)
    vectors, weights = (
        torch.randn(len(content.matrix), 4, generator=generator),
        torch.rand(len(content.matrix), generator=generator),
    )
    vectors[:, 3] = 0.0
    found = nearest(content, vectors, weights)
    n = content.matrix.n_columns
    values = (content.scales * torch.eye(n)).double()
    rows = content.matrix.product(values.float()).double()
    squares = rows.T @ (weights[:, None] * rows) + PRIOR_ITEMS * torch.eye(n)
    wanted = values @ torch.linalg.solve(squares, rows.T @ (weights[:, None] * vectors).double())
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    assert not found[:, 3].any()


def test_an_item_of_few_positives_tells_little_of_its_values() -> None:
    """Its vector is one of chance, and values of none have zeros."""
    data = log()
    users, items = (Trainer(data, config(BESIDE)).run().model.towers(side)[0].embeddings for side in ("user", "item"))
    assert users.rows_of("h").any()
    for name in COLUMNS:
        rows = items.rows_of(name)
        assert not rows[UNKNOWN].any()
        assert rows.any()
    untaken = (
        np.bincount(
            np.asarray(data.items.columns["item_id"])[data.pairs.item[data.parts == TRAIN]],
            minlength=len(items.rows_of("item_id")),
        )
        == 0
    )
    assert not items.rows_of("item_id")[torch.from_numpy(untaken)].any()
