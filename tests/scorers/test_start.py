"""Starts against the maths written plainly in float64: the first model ranks as the closed form does, in torch and
exported."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from trainers import same, weights
from worlds import settings

from twotower import api
from twotower.arrays.ragged import Column, Ragged
from twotower.config.experiment import Config
from twotower.config.scorers import with_scorers
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.diagnostics import diagnose
from twotower.errors import ConfigError, Interrupted, RunError, TrainingError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors, Scorer
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.field import PoolingSpec
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.text import Text
from twotower.features.values import UNKNOWN
from twotower.model.pooling.pooling import Pooling
from twotower.model.pooling.sum import Sum
from twotower.model.two_tower import PairConfig
from twotower.onnx.export import export_tower
from twotower.onnx.tower import OnnxTower
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.scorers import SCORERS, Ials, PairValues, Slit, Start, TransitionFactors
from twotower.scorers.columns import ColumnFactors, ContentMatrix, PositivesAndContent, _Directions, shared_out
from twotower.scorers.positives import PositiveMatrix, PositiveSequences
from twotower.scorers.slit import decayed_products
from twotower.scorers.start import common_items, search
from twotower.train.closed_forms import evaluation_of_search
from twotower.train.factors import factors_before
from twotower.train.trainer import Trainer

USERS, ITEMS, WIDTH = 60, 14, 20


class Neighbours(Start):
    """A start of one's own: an item's score is the number of users who have it and an item of the history."""

    def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
        counts = torch.nn.functional.pad(positives.gram().float().fill_diagonal_(0), (0, width - positives.n_columns))
        return PairValues(counts, (torch.eye(positives.n_columns, width),))


FORMS: list[type[Start]] = [kind for kind in SCORERS if issubclass(kind, Start)]
KINDS: list[type[Start]] = [*FORMS, Neighbours]
POOLING: dict[str, dict[str, Any]] = {
    "ease": {"kind": "sum"},
    "ials": {"kind": "ridge", "steps": 30},
    "columns": {"kind": "decay", "rates": [0.5]},
    "slit": {"kind": "decay", "rates": [0.5]},
    "transitions": {"kind": "sum"},
    Neighbours.kind: {"kind": "sum"},
}
IN_ORDER = ("columns", "slit", "transitions")
DECAYED = ("columns", "slit")
BY_COLUMNS = ("columns",)
EXACT: dict[str, dict[str, Any]] = {
    "ease": {"regularization": [3.0]},
    "ials": {"steps": 30, "sweeps": 3, "unobserved": [0.2], "regularization": [0.008]},
    "columns": {"regularization": [0.2]},
    "slit": {"regularization": [3.0]},
    "transitions": {"span": 3, "lag": 1.0, "frequency": 0.3},
    Neighbours.kind: {},
}
CHOICES: dict[str, tuple[str, list[float]]] = {
    "ease": ("regularization", [0.001, 3.0, 1e6]),
    "ials": ("regularization", [0.001, 0.05, 1.0]),
    "columns": ("regularization", [0.001, 0.2, 10.0]),
    "slit": ("regularization", [0.001, 3.0, 1e6]),
}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


def log_of_tastes(weighted: bool) -> pl.DataFrame:
    """Users of two tastes, each with a random part of its items and a few others; item 13 is in the test part alone."""
    rng = np.random.default_rng(1)
    liked = rng.random((USERS, ITEMS)) < np.where(np.arange(ITEMS) % 2 == np.arange(USERS)[:, None] % 2, 0.6, 0.15)
    user, item = np.nonzero(liked[:, : ITEMS - 1])
    part = rng.choice(["train", "validation", "test"], len(user), p=[0.7, 0.15, 0.15])
    users, items = np.r_[user, np.arange(9)], np.r_[item, np.full(9, ITEMS - 1)]
    frame = pl.DataFrame({"user_id": users, "item_id": items, "part": [*part, *["test"] * 9]})
    frame = frame.with_columns(t=pl.Series(rng.permutation(len(frame))))
    return frame.with_columns(w=pl.Series(rng.choice([0.5, 1.0, 2.0], len(frame)))) if weighted else frame


def world(of: str, weighted: bool = False, pooling: dict[str, Any] | None = None) -> Dataset:
    history = Sequence(name="h", side="user", share_embedding=False, pooling=pooling or POOLING[of])
    features: tuple[Feature, ...] = (history, Categorical(name="item_id", side="item"))
    if of in BY_COLUMNS:
        features += Categorical(name="colour", side="item"), MultiHot(name="tags", side="item", separator="|")
        features += (Numeric(name="price", side="item", buckets=4),)
    in_order: dict[str, Any] = {"time": "t", "time_unit": "order"} if of in IN_ORDER else {}
    schema = Schema(features=features, weight="w" if weighted else "", **in_order)
    return build_dataset(
        check(
            None,
            columns() if of in BY_COLUMNS else None,
            log_of_tastes(weighted),
            schema,
        ),
        schema,
        SplitConfig(kind="column", column="part"),
    )


def columns() -> pl.DataFrame:
    """A colour of each item, None for one, up to three tags, and a price, None for one."""
    tags = ["|".join(f"t{n}" for n in range(4) if (item >> n) & 1) for item in range(ITEMS)]
    prices = [None, *(float((item * 5) % ITEMS) for item in range(1, ITEMS))]
    return pl.DataFrame({"item_id": range(ITEMS), "colour": [*"rgb" * 4, None, "r"], "tags": tags, "price": prices})


def config(kind: str, pairs: int = 1, train: dict[str, Any] | None = None, **options: Any) -> Config:
    item: dict[str, Any] = {"fields": ["item_id"], "layers": []}
    if kind in BY_COLUMNS:
        item |= {"fields": ["tags", "colour", "price"], "join": "sum", "activation": "Identity"}
    user: dict[str, Any] = {"fields": ["h"], "layers": []}
    pair = {"user": user, "item": item}
    start = {"kind": kind} | EXACT[kind] | options
    return settings(
        model={"width": WIDTH, "similarity": "dot", "bias": False, "temperature": 1.0, "pairs": [pair] * pairs},
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        split={"kind": "column", "column": "part"},
        train={
            "epochs": 0,
            "solved": [start],
            "monitor": "validation.recall@5",
            "device": "cpu",
            **({"history_scope": "causal"} if kind in DECAYED else {}),
        }
        | (train or {}),
    )


def of_scorers(*scorers: dict[str, Any]) -> tuple[Dataset, Config]:
    """The log of tastes, and a config of scorers alone."""
    train = {"epochs": 0, "monitor": "validation.recall@5", "device": "cpu"}
    split: dict[str, Any] = {"kind": "column", "column": "part"}
    model = {"similarity": "dot", "bias": False, "temperature": 1.0}
    given: dict[str, Any] = {"evaluation": {"k": [5]}, "model": model, "loss": "softmax", "negatives": {"full": True}}
    given |= {"split": split, "train": train}
    features = (Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item"))
    schema, found = with_scorers(Schema(features=features), Config.model_validate(given | {"scorers": scorers}))
    return build_dataset(check(None, None, log_of_tastes(False), schema), schema, SplitConfig(**split)), found


def matrix(data: Dataset) -> np.ndarray:
    """X (users, items) of the train part, in float64."""
    x = np.zeros((len(data.users), len(data.items)))
    pairs = data.pairs.take(data.parts == TRAIN)
    x[pairs.user, pairs.item] = pairs.weight
    return x


def ease_weights(x: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv(x.T @ x + 3.0 * np.eye(x.shape[1]))
    b: np.ndarray = -inverse / np.diag(inverse)
    np.fill_diagonal(b, 0)
    return b


def of_size_one(weights: np.ndarray, data: Dataset, histories: np.ndarray, root: float = 0.0) -> np.ndarray:
    """The scores of some histories (n, items) of zeros and ones, divided by their lengths to the power of `root`, and
    scaled so that those of the items of the train part for its histories have the root mean square 1."""
    x = (matrix(data) > 0).astype(float)
    learned, asked = ((h / np.maximum(h.sum(1, keepdims=True), 1) ** root) @ weights for h in (x, histories))
    scaled: np.ndarray = asked / np.sqrt((learned[x.any(1)] ** 2).sum(1).mean() / x.any(0).sum())
    return scaled


def ials_scores(x: np.ndarray, histories: np.ndarray) -> np.ndarray:
    """The same, of a last half step over the histories. Every row is solved by its normal equations."""
    a, rate, codes = 0.2, 0.008, np.flatnonzero(x.sum(0))
    first = torch.randn(len(codes) + 1, WIDTH, generator=torch.Generator().manual_seed(1)) * (0.1 / WIDTH**0.5)
    v = np.zeros((x.shape[1], WIDTH))
    v[codes] = first[1:].double().numpy()

    def half(w: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
        out = np.zeros((len(w), WIDTH))
        for row in np.flatnonzero(w.sum(1)):
            gram = (other * w[row][:, None]).T @ other + a * other.T @ other
            out[row] = np.linalg.solve(gram + rate * (w[row].sum() + a * n) * np.eye(WIDTH), w[row] @ other)
        return out

    for _ in range(3):
        v = half(x.T, half(x, v, len(codes)), int((x.sum(1) > 0).sum()))
    return half(histories, v, len(codes)) @ v.T


def content_of(data: Dataset) -> np.ndarray:
    """The vectors of the items (items, values), by columns."""
    table, order = columns(), data.items.ids.cast(pl.Int64).to_numpy()
    colours, tags, prices = np.zeros((ITEMS, 3)), np.zeros((ITEMS, 4)), np.zeros((ITEMS, 4))
    for item, (colour, listed) in enumerate(zip(table["colour"], table["tags"], strict=True)):
        if colour:
            colours[item, "rgb".index(colour)] = 1
        for tag in filter(None, listed.split("|")):
            tags[item, int(tag[1:])] = 1 / len(listed.split("|"))
    for row, bucket in enumerate(np.asarray(data.items.columns["price"])):
        if bucket:
            prices[order[row], bucket - 1] = 1
    sized = []
    for part in (colours, tags, prices):
        squares = (part**2).sum(1)
        sized.append(part / np.sqrt(squares[squares > 0].mean()))
    content: np.ndarray = np.concatenate(sized, 1)[order]
    return content


def neighbour_scores(x: np.ndarray, histories: np.ndarray) -> np.ndarray:
    counts = x.T @ x
    np.fill_diagonal(counts, 0)
    predicted: np.ndarray = histories @ counts
    return predicted


def transition_table(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of counts of transitions between items (items, items), by a loop over every pair of positives of a
    user, and the sums of rows of counts."""
    counts = np.zeros((len(data.items), len(data.items)))
    weights = data.pairs.weight
    mean = weights[data.parts == TRAIN].mean()
    for user in range(len(data.users)):
        mine = latest_last(data, user)
        for place, before in enumerate(mine):
            for gap, after in enumerate(mine[place + 1 : place + 4], 1):
                counts[data.pairs.item[before], data.pairs.item[after]] += weights[after] / mean / gap
    columns = np.maximum(counts.sum(0), 1e-9)
    return np.log1p(counts / (columns / columns[columns > 1e-9].mean()) ** 0.3), counts.sum(1)


def transition_scores(data: Dataset, histories: np.ndarray, width: int = ITEMS) -> np.ndarray:
    """The scores by `width` leading right singular vectors, of a root mean square of 1 after one item."""
    table, rows = transition_table(data)
    if width < ITEMS:
        table /= np.sqrt(np.maximum(table.sum(1, keepdims=True), 1e-9))
    _, _, vt = np.linalg.svd(table * rows[:, None] ** 0.25)
    projected = table @ vt[:width].T @ vt[:width]
    mean_square = rows @ (projected**2).sum(1) / rows.sum() / (matrix(data).sum(0) > 0).sum()
    predicted: np.ndarray = histories @ projected / mean_square**0.5
    return predicted


def latest_last(data: Dataset, user: int) -> np.ndarray:
    """Rows of the user's positives of the train part, the oldest first."""
    mine = np.flatnonzero((data.pairs.user == user) & (data.parts == TRAIN))
    ordered: np.ndarray = mine[np.argsort(data.times[mine])]
    return ordered


def decayed(items: np.ndarray, n: int) -> np.ndarray:
    """The decayed mean (n,) of items, the oldest first, at a rate of a half."""
    out = np.zeros(n)
    for age, item in enumerate(items[::-1]):
        out[item] += 0.5**age
    mean: np.ndarray = out / max(out.sum(), 1e-9)
    return mean


def slit_scores(data: Dataset, histories: np.ndarray, width: int = ITEMS, ridge: float = 3.0) -> np.ndarray:
    """The scores by `width` leading eigenvectors, of a root mean square of 1 after the histories that were learned
    from. Every positive is a row of a regression that is solved by its normal equations."""
    n = len(data.items)
    x, y, w = [], [], []
    for user in range(len(data.users)):
        mine = latest_last(data, user)
        for place in range(1, len(mine)):
            items = data.pairs.item[mine]
            x.append(decayed(items[:place], n))
            y.append(np.eye(n)[items[place]])
            positive = float(data.pairs.weight[mine[place]])
            w.append(positive * sum(0.5**age for age in range(place)) ** 2)
    rows, targets, weights = np.array(x), np.array(y), np.array(w)
    products = (rows * weights[:, None]).T @ targets
    table = np.linalg.solve((rows * weights[:, None]).T @ rows + ridge * np.eye(n), products)
    vectors = np.linalg.eigh(products.T @ table)[1][:, ::-1][:, :width]
    projected = table @ vectors @ vectors.T
    mean_square = weights @ ((rows @ projected) ** 2).sum(1) / weights.sum() / (matrix(data).sum(0) > 0).sum()
    predicted: np.ndarray = histories @ projected / mean_square**0.5
    return predicted


def columns_scores(data: Dataset, histories: np.ndarray, ridge: float = 0.2) -> np.ndarray:
    """The discriminants of each column, fitted over the positives after a user's first."""
    content, taken = content_of(data), matrix(data).sum(0)
    scores_of_columns = np.zeros(histories.shape)
    for part in np.split(content, (3, 7), 1):
        known = np.sign(part.max(1))
        f = (part - np.average(part, axis=0, weights=taken * known)) * known[:, None]
        before, after, weights = [], [], []
        for user in range(len(data.users)):
            mine = latest_last(data, user)
            for place in range(1, len(mine)):
                items = data.pairs.item[mine]
                before.append(decayed(items[:place], len(f)) @ f)
                after.append(f[items[place]])
                weights.append(float(data.pairs.weight[mine[place]]))
        k = part.shape[1]
        moments = np.cov(np.array(before).T, np.array(after).T, aweights=weights, ddof=0)
        a, b, c = moments[:k, :k], moments[:k, k:], moments[k:, k:]
        a, c = (m + ridge * np.trace(m) / k * np.eye(k) for m in (a, c))
        scores_of_columns += histories @ f @ np.linalg.inv(a) @ b @ np.linalg.inv(c) @ f.T
    return scores_of_columns


def histories_of(kind: str, data: Dataset) -> np.ndarray:
    """What the pooling of a kind makes of the histories of the train part (users, items), each item an axis."""
    if kind in DECAYED:
        items = data.pairs.item
        return np.array([decayed(items[latest_last(data, user)], len(data.items)) for user in range(len(data.users))])
    return (matrix(data) > 0).astype(float)


NAIVE: dict[str, Callable[[Dataset, np.ndarray], np.ndarray]] = {
    "ease": lambda data, histories: of_size_one(ease_weights(matrix(data)), data, histories),
    "ials": lambda data, histories: ials_scores(matrix(data), histories),
    "columns": columns_scores,
    "slit": slit_scores,
    "transitions": transition_scores,
    Neighbours.kind: lambda data, histories: neighbour_scores(matrix(data), histories),
}


def padded(column: Column) -> np.ndarray:
    """The codes of a column of lists, -1 after the end of a row."""
    assert isinstance(column, Ragged)
    found = np.full((len(column), max(1, column.lengths.max())), -1)
    for row in range(len(column)):
        found[row, : column.lengths[row]] = column.row(row)
    return found


def scores(found: Factors) -> np.ndarray:
    product: np.ndarray = (found.users @ found.items.T).numpy()
    return product


@every_kind
@pytest.mark.parametrize("weighted", [False, True])
def test_without_training_the_scores_are_those_of_the_closed_form(kind: type[Start], weighted: bool) -> None:
    data = world(kind.kind, weighted)
    trained = Trainer(data, config(kind.kind)).run()
    assert (trained.history, trained.metrics["train.best_epoch"]) == ([], 0.0)
    x = matrix(data)
    found = scores(factors_before(trained.model, data, VALIDATION))
    np.testing.assert_allclose(found, NAIVE[kind.kind](data, histories_of(kind.kind, data)), rtol=2e-3, atol=2e-4)
    assert found[:, x.sum(0) == 0].any() == (kind.kind in BY_COLUMNS), (
        "an item without training scores 0, but for its columns"
    )


def test_words_that_training_lacks_are_no_direction() -> None:
    """A text is a column of lists too, in which parts of words that are unknown have the code of that."""
    about = pl.Series([f"common rare{item} {'red' if item % 2 else 'blue'}" for item in range(ITEMS)])
    words = Text(name="about", side="item", pooling={"kind": "mean"}, min_count=40)
    schema = world("columns").schema
    schema = schema.model_copy(update={"features": (*schema.features, words)})
    tables = check(None, columns().with_columns(about=about), log_of_tastes(False), schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    content = ContentMatrix.of(data, ("about",), np.arange(1, ITEMS + 1, dtype=np.int32), ITEMS + 1)
    lists = data.items.columns["about"]
    assert isinstance(lists, Ragged)
    known = [(lists.row(item) != UNKNOWN).mean() for item in range(ITEMS)]
    assert 0 < min(known) < 1
    found = content.matrix.product(torch.ones(content.matrix.n_columns, 1))[1:, 0]
    np.testing.assert_allclose(found, known, rtol=1e-6)


def test_columns_have_one_size_also_where_a_list_repeats_a_value() -> None:
    schema = world("columns").schema
    tags = pl.Series(["|".join(["a", "b", "a", "c"][: 1 + item % 4]) for item in range(ITEMS)])
    tables = check(None, columns().with_columns(tags=tags), log_of_tastes(False), schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    for column in ("tags", "colour", "price"):
        content = ContentMatrix.of(data, (column,), np.arange(1, ITEMS + 1, dtype=np.int32), ITEMS + 1)
        items = content.matrix.product(content.scales * torch.eye(content.matrix.n_columns))
        squares = items.square().sum(1)
        assert float(squares[squares > 0].mean()) == pytest.approx(1.0, rel=1e-5), column


def test_the_values_of_a_list_weigh_as_its_pooling_has_them() -> None:
    """By `sqrt` each of n values weighs 1 / sqrt(n), in the vectors of the items and in those that histories are pooled
    from."""
    schema, found = world("columns").schema, []
    for pooling, exponent in (("mean", 1.0), ("sqrt", 0.5), ("sum", 0.0)):
        features = [
            f.model_copy(update={"pooling": PoolingSpec(kind=pooling)}) if f.name == "tags" else f
            for f in schema.features
        ]
        changed = schema.model_copy(update={"features": tuple(features)})
        tables = check(None, columns(), log_of_tastes(False), changed)
        data = build_dataset(tables, changed, SplitConfig(kind="column", column="part"))
        sections = config("columns").model_dump(mode="json")
        sections["model"]["pairs"][0]["item"]["fields"] = ["tags"]
        model = Trainer(data, Config.model_validate(sections)).run().model
        rows = model.towers("item")[0].embeddings.rows_of("tags").detach()
        vectors, lists = factors_before(model, data, VALIDATION).items, data.items.columns["tags"]
        assert isinstance(lists, Ragged)
        for place in range(len(lists)):
            codes = torch.from_numpy(lists.row(place).astype(np.int64))
            expected = rows[codes].sum(0) / max(1, len(codes)) ** exponent
            torch.testing.assert_close(vectors[place], expected, rtol=1e-4, atol=1e-5)
        found.append(scores(factors_before(model, data, VALIDATION)))
    assert not np.allclose(found[0], found[1], atol=0.01)
    assert not np.allclose(found[1], found[2], atol=0.01)


def test_items_of_no_known_value_tell_nothing() -> None:
    schema, none = world("columns").schema, pl.lit(None, pl.Float64)
    empty = columns().with_columns(colour=none.cast(pl.String), tags=pl.lit(""), price=none)
    data = build_dataset(
        check(None, empty, log_of_tastes(False), schema), schema, SplitConfig(kind="column", column="part")
    )
    with pytest.raises(
        TrainingError, match="no column that differs among the positives that follow others; leave it out of scorers"
    ):
        Trainer(data, config("columns")).run()


def test_each_rate_has_a_discriminant_of_its_own() -> None:
    """At rates of 0.5 and 0 the score is the sum of both; the item's vector has the width of the history for each."""
    each = []
    for rates in ([0.5], [0.0], [0.5, 0.0]):
        data = world("columns", pooling={"kind": "decay", "rates": rates})
        sections = config("columns").model_dump(mode="json")
        sections["model"]["pairs"][0]["item"]["width"] = len(rates) * WIDTH
        each.append(
            scores(factors_before(Trainer(data, Config.model_validate(sections)).run().model, data, VALIDATION))
        )
    assert not np.allclose(each[0], each[1], atol=0.01)
    np.testing.assert_allclose(each[0] + each[1], each[2], rtol=1e-3, atol=1e-4)


def test_a_mean_has_the_discriminant_of_the_rate_1() -> None:
    found = []
    for pooling in ({"kind": "decay", "rates": [1.0]}, {"kind": "mean"}):
        data = world("columns", pooling=pooling)
        train = {"history_scope": "leave_batch_out"} if pooling["kind"] == "mean" else {}
        model = Trainer(data, config("columns", train=train)).run().model
        found.append(scores(factors_before(model, data, VALIDATION)))
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


def of_tags(rows: list[tuple[int, int, int, str]], tags: dict[int, str], fields: list[str]) -> tuple[Dataset, Config]:
    """A log of `rows` and items of these lists, which are halves too; and `columns` on some columns."""
    items = {"item_id": [*tags], "tags": [*tags.values()], "colour": ["rg"[item % 2] for item in tags]}
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "t", "part"], orient="row")
    schema = world("columns").schema
    schema = schema.model_copy(update={"features": tuple(f for f in schema.features if f.name != "price")})
    tables = check(None, pl.DataFrame(items), log, schema)
    sections = config("columns").model_dump(mode="json")
    sections["model"]["pairs"][0]["item"] |= {"fields": fields}
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    return data, Config.model_validate(sections)


def scores_of_tags(rows: list[tuple[int, int, int, str]], tags: dict[int, str], fields: list[str]) -> np.ndarray:
    data, chosen = of_tags(rows, tags, fields)
    return scores(factors_before(Trainer(data, chosen).run().model, data, VALIDATION))


@pytest.mark.parametrize("users", [101, 137, 211, 229, 251])
def test_a_list_that_all_items_have_adds_no_rounding(users: int) -> None:
    rng, parts = np.random.default_rng(users), ["train"] * 4 + ["validation", "test"]
    rows = [(u, int(i), t, parts[t]) for u in range(users) for t, i in enumerate(rng.choice(60, 6, replace=False))]
    same = dict.fromkeys(range(60), "a|b|c|d|e|f")
    np.testing.assert_allclose(
        scores_of_tags(rows, same, ["tags", "colour"]), scores_of_tags(rows, same, ["colour"]), atol=1e-5
    )


@pytest.mark.parametrize("single", [10, 17, 30])
def test_values_of_users_with_one_positive_tell_nothing_of_what_follows(single: int) -> None:
    """Ten items are taken by users with one row; all others have the same value, but for rounding."""
    rng, parts = np.random.default_rng(3), ["train"] * 3 + ["validation", "test"]
    rows = [(u, int(i), t, parts[t]) for u in range(200) for t, i in enumerate(rng.choice(50, 5, replace=False))]
    rows += [(200 + u, 50 + u % 10, 0, "train") for u in range(single)]
    tags = {item: "a" if item < 50 else "b" for item in range(60)}
    np.testing.assert_allclose(
        scores_of_tags(rows, tags, ["tags", "colour"]), scores_of_tags(rows, tags, ["colour"]), atol=1e-5
    )
    data, chosen = of_tags(rows, tags, ["tags"])
    with pytest.raises(TrainingError, match="finds no column that differs among the positives that follow others"):
        Trainer(data, chosen).run()


@pytest.mark.parametrize(
    ("sizes", "width", "rooms"),
    [
        ([3, 5], 8, [3, 5]),
        ([100, 3, 9], 21, [9, 3, 9]),
        ([100, 90, 3], 20, [9, 8, 3]),
        ([5, 5, 5], 2, [0, 1, 1]),
        ([], 4, []),
    ],
)
def test_small_columns_have_their_dimensions_and_large_ones_share_the_rest(
    sizes: list[int], width: int, rooms: list[int]
) -> None:
    assert shared_out(sizes, width) == rooms


def test_of_a_column_that_is_too_large_the_most_frequent_values_have_directions() -> None:
    """A column of 200 values in 60 dimensions with one of two: the large one has directions of its 60 most frequent."""
    n, width = 800, 62
    rng = np.random.default_rng(3)
    colours, shapes = np.minimum(rng.geometric(0.02, n), 200) - 1, np.arange(n) % 2
    colours[:200] = np.arange(200)
    items = pl.DataFrame({"item_id": range(n), "colour": [f"c{c}" for c in colours], "tags": [f"s{x}" for x in shapes]})
    parts = ["train"] * 4 + ["validation", "test"]
    rows = [
        (user, int(item), t, parts[t]) for user in range(300) for t, item in enumerate(rng.choice(n, 6, replace=False))
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "t", "part"], orient="row")
    schema = world("columns", pooling={"kind": "decay", "rates": [0.0]}).schema
    schema = schema.model_copy(update={"features": tuple(f for f in schema.features if f.name != "price")})
    data = build_dataset(check(None, items, log, schema), schema, SplitConfig(kind="column", column="part"))
    pair = PairConfig.model_validate({"user": {"fields": ["h"]}, "item": {"fields": ["tags", "colour"]}})
    positives = ColumnFactors().positives(data, pair)
    assert isinstance(positives, PositivesAndContent)
    found = _Directions.of(positives, width)
    assert found.places == [0, 2, width]
    codes = np.asarray(data.items.columns["colour"])
    counts = np.bincount(codes[data.train.item], minlength=codes.max() + 1)
    n_tags = len(found.rows) - len(counts)
    axes = (found.rows[n_tags:, 2:] - found.rows[n_tags:, 2:].amin(0)).numpy() > 0.5
    chosen = axes[1:].any(1)
    assert axes.sum() == chosen.sum() == width - 2
    assert counts[1:][chosen].min() >= counts[1:][~chosen].max()


def test_the_scale_of_slit_holds_under_a_regularization_far_above_the_counts() -> None:
    data = world("slit")
    found = scores(factors_before(Trainer(data, config("slit", regularization=[1e9])).run().model, data, VALIDATION))
    expected = slit_scores(data, histories_of("slit", data), ridge=1e9)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


STARTS_MODULE = "twotower.scorers"
SHARED = {
    "ease": "positives.PositiveMatrix.gram",
    "ials": "positives.PositiveMatrix.transposed",
    "columns": "columns._Directions.of",
    "slit": "slit.decayed_products",
}
"""What none of the values of a start's choices changes."""


@pytest.mark.parametrize("kind", SHARED)
def test_what_no_value_changes_is_computed_once_for_all_values_of_a_start(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = dict.fromkeys(("positives.PositiveMatrix.of", SHARED[kind]), 0)

    def count(name: str) -> None:
        made = locate(f"{STARTS_MODULE}.{name}")
        assert callable(made)

        def counted(*parts: object) -> object:
            calls[name] += 1
            return made(*parts)

        monkeypatch.setattr(f"{STARTS_MODULE}.{name}", counted)

    for name in calls:
        count(name)
    values: dict[str, Any] = {"regularization": [0.4, 0.5, 0.6]}
    found = Trainer(world(kind), config(kind, **values)).run()
    assert found.metrics["train.best_epoch"] == 0.0
    assert [*calls.values()] == [1, 1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_the_exported_towers_score_so_for_a_user_whom_training_never_saw(kind: type[Start]) -> None:
    data = world(kind.kind)
    model = Trainer(data, config(kind.kind)).run().model.eval()
    codes = np.asarray(data.items.columns["item_id"])
    liked = np.array([1, 3, 8])
    with tempfile.TemporaryDirectory() as folder:
        for side in ("user", "item"):
            export_tower(model, side, data.encoders.fields(side), Path(folder, side))
        of_history = {"lookup": np.zeros((1, 0), np.int64), "bag0": codes[liked][None].astype(np.int64)}
        user = OnnxTower(Path(folder, "user"))(of_history)
        fields = data.encoders.fields("item")
        lookups = [np.asarray(data.items.columns[f.name]) for f in fields if f.kind == "lookup"]
        of_items = {"lookup": np.stack(lookups, 1).astype(np.int64)}
        of_items |= {f"bag{n}": padded(data.items.columns[f.name]) for n, f in enumerate(fields) if f.kind == "bag"}
        items = OnnxTower(Path(folder, "item"))(of_items)
    history = (
        decayed(liked, len(codes))[None] if kind.kind in DECAYED else np.isin(np.arange(len(codes)), liked)[None] * 1.0
    )
    expected = NAIVE[kind.kind](data, history)
    np.testing.assert_allclose(user @ items.T, expected, rtol=2e-3, atol=2e-4)


def popular_log() -> Dataset:
    """Users with four random items each, popular ones more often: no item tells of another."""
    rng = np.random.default_rng(3)
    odds = -1.5 * np.log(np.arange(40) + 1.0)
    items = np.argsort(-(odds + rng.gumbel(size=(150, 40))), 1)[:, :4]
    parts = rng.permuted(np.tile(["train", "train", "validation", "test"], (150, 1)), axis=1)
    log = pl.DataFrame({"user_id": np.repeat(np.arange(150), 4), "item_id": items.ravel(), "part": parts.ravel()})
    schema = world("ials").schema
    return build_dataset(check(None, None, log, schema), schema, SplitConfig(kind="column", column="part"))


class Asked(Trainer):
    """A trainer that notes how its vectors are evaluated."""

    asked: list[EvaluationConfig | None]

    def _validation_metrics(self, scorer: Scorer, config: EvaluationConfig | None = None) -> dict[str, float]:
        self.asked.append(config)
        return super()._validation_metrics(scorer, config)


def test_values_are_compared_by_a_bounded_number_of_scores_and_the_chosen_by_all() -> None:
    data = popular_log()
    trainer = Asked(data, config("ials", regularization=[0.01, 0.1]))
    trainer.asked = []
    trainer.run()
    *searched, chosen = trainer.asked
    bounded = evaluation_of_search(trainer.recipe.evaluation, len(data.items))
    assert (searched, chosen) == ([bounded] * len(searched), None)
    assert len(searched) >= 2
    assert bounded.max_users > 0 == trainer.recipe.evaluation.max_users


def test_a_regularisation_that_removes_the_vectors_is_no_value(caplog: pytest.LogCaptureFixture) -> None:
    data = popular_log()
    with pytest.raises(
        TrainingError, match=r"regularization = 1e\+06 and unobserved = 0.2 leave nothing of the vectors"
    ):
        Trainer(data, config("ials", regularization=[1e6])).run()
    with caplog.at_level(logging.INFO, "twotower"):
        Trainer(data, config("ials", regularization=[0.2, 1e6])).run()
    assert "left out of the values that are tried: the scorer 'ials'" in caplog.text
    assert "lower regularization" not in caplog.text  # the search has chosen it
    assert "leave nothing of the vectors" in caplog.text
    chosen = [line for line in caplog.messages if line.startswith("pair 0 by ials: ")][-1]
    assert float(chosen.split("regularization = ")[1]) < 1000


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.kind)
def test_biases_begin_at_zero_where_a_pair_has_a_start(kind: type[Start]) -> None:
    data, sections = world(kind.kind), config(kind.kind).model_dump(mode="json")
    sections["model"]["bias"] = True
    biased, plain = (Trainer(data, of) for of in (Config.model_validate(sections), config(kind.kind)))
    for trainer in (biased, plain):
        trainer._begin()
    found, wanted = (scores(factors_before(trainer.model, data, VALIDATION)) for trainer in (biased, plain))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_histories_scaled_by_their_length_rank_as_their_sum() -> None:
    for pooling in ("mean", "sqrt"):
        data = world("ease", pooling={"kind": pooling})
        found = scores(factors_before(Trainer(data, config("ease")).run().model, data, TRAIN))
        x, root = matrix(data), {"mean": 1.0, "sqrt": 0.5}[pooling]
        expected = of_size_one(ease_weights(x), data, x, root)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_the_weights_of_an_ease_may_be_large() -> None:
    frame = log_of_tastes(True).with_columns(
        w=pl.Series(np.random.default_rng(0).lognormal(7, 1.2, len(log_of_tastes(True))))
    )
    schema = world("ease", weighted=True).schema
    data = build_dataset(check(None, None, frame, schema), schema, SplitConfig(kind="column", column="part"))
    found = scores(factors_before(Trainer(data, config("ease")).run().model, data, TRAIN))
    x = matrix(data)
    np.testing.assert_allclose(found, of_size_one(ease_weights(x), data, (x > 0) * 1.0), rtol=2e-2, atol=2e-3)


def test_given_values_that_float32_cannot_solve_with_lose_to_others() -> None:
    data = world("ials")
    assert Trainer(data, config("ials", unobserved=[1e38, 0.2])).run().metrics["train.best_epoch"] == 0.0
    for option, values in {"unobserved": [1e38, 1e37], "regularization": [1e-6]}.items():
        with pytest.raises(TrainingError, match=rf"'ials' \(.*{option} = .*\) has values that are not finite"):
            Trainer(data, config("ials", 1, None, **{option: values})).run()


def test_a_narrow_ease_is_the_projection_on_leading_right_singular_vectors() -> None:
    data = world("ease")
    sections = config("ease").model_dump(mode="json")
    sections["model"]["width"] = 4
    x = matrix(data)
    weights = ease_weights(x)
    _, _, vt = np.linalg.svd(x @ weights)
    found = scores(factors_before(Trainer(data, Config.model_validate(sections)).run().model, data, TRAIN))
    np.testing.assert_allclose(found, of_size_one(weights @ vt[:4].T @ vt[:4], data, x), atol=2e-3)


def test_above_the_bound_the_items_that_most_users_take_are_solved_for(caplog: pytest.LogCaptureFixture) -> None:
    rare = pl.DataFrame({"user_id": range(6), "item_id": [90 + n for n in range(6)], "part": "train"})
    schema, log = world("ease").schema, log_of_tastes(False).drop("t")
    tables = check(None, None, pl.concat([log, rare.cast(log.schema)]), schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    chosen = config("ease", max_items=ITEMS - 1, regularization=[3.0])
    with caplog.at_level(logging.INFO, "twotower"):
        found = scores(factors_before(Trainer(data, chosen).run().model, data, TRAIN))
    assert f"the {ITEMS - 1} items that most users take are solved for" in caplog.text
    x = matrix(data)
    common = np.sort(np.argsort(-x.sum(0), kind="stable")[: ITEMS - 1])
    weights = np.zeros((x.shape[1], x.shape[1]))
    weights[np.ix_(common, common)] = ease_weights(x[:, common])
    np.testing.assert_allclose(found, of_size_one(weights, data, x), atol=2e-3)
    assert not found[:, [i for i, name in enumerate(data.items.ids.to_list()) if name >= 90]].any()


@pytest.mark.parametrize(("counts", "common"), [([], 0), ([0, 0], 0), ([9, 1], 1), ([8, 1, 1], 2), ([1] * 10, 9)])
def test_common_items_have_nine_tenths_of_the_positives(counts: list[int], common: int) -> None:
    assert common_items(np.array(counts, np.int64)) == common


@pytest.mark.parametrize(
    ("kind", "message"), [("ease", "have less than 90% of the positives"), ("slit", "max_items = 3")]
)
def test_more_items_than_can_be_solved_for_are_refused(kind: str, message: str) -> None:
    with pytest.raises(TrainingError, match=rf"{message}.*; raise max_items, or leave it out of scorers"):
        Trainer(world(kind), config(kind, max_items=3)).run()


@pytest.mark.parametrize("items", [3, 9, 20])
def test_an_ease_of_users_with_one_item_each_is_refused(items: int) -> None:
    schema, catalogue = world("ease").schema, pl.DataFrame({"item_id": range(items)})
    log = pl.DataFrame({"user_id": range(9), "item_id": [i * 2 % items for i in range(9)]})
    log = log.with_columns(part=pl.Series(["train"] * 7 + ["validation", "test"]))
    data = build_dataset(check(None, catalogue, log, schema), schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(TrainingError, match="finds no user of two positive items; leave it out of scorers"):
        Trainer(data, config("ease")).run()


def test_narrow_transitions_are_the_projection_on_leading_right_singular_vectors() -> None:
    data, sections = world("transitions"), config("transitions").model_dump(mode="json")
    sections["model"]["width"] = 4
    found = scores(factors_before(Trainer(data, Config.model_validate(sections)).run().model, data, TRAIN))
    histories = (matrix(data) > 0).astype(float)
    np.testing.assert_allclose(found, transition_scores(data, histories, 4), atol=1e-3)
    assert np.abs(found - transition_scores(data, histories)).max() > 0.5, "the width matters"


@pytest.mark.parametrize(("width", "axes"), [(ITEMS - 1, False), (ITEMS, True), (WIDTH, True)])
def test_from_as_many_numbers_as_items_on_each_item_is_an_axis_of_its_own(width: int, axes: bool) -> None:
    data = world("transitions")
    positives = PositiveMatrix.of(data, np.asarray(data.items.columns["item_id"]), ITEMS + 1)
    found = TransitionFactors(span=3, lag=1.0, frequency=0.3).solve(positives, Sum(), width, 1)
    (target,) = found.targets
    assert found.source.shape == target.shape == (ITEMS + 1, width)
    assert bool(((target != 0).sum(1) == torch.tensor([0] + [1] * ITEMS)).all()) == axes
    scored = (found.source @ target.T)[1:, 1:].numpy()
    np.testing.assert_allclose(scored, transition_scores(data, np.eye(ITEMS), min(width, ITEMS)), atol=2e-3)


def test_a_narrow_slit_is_the_projection_on_the_leading_eigenvectors() -> None:
    data, sections = world("slit"), config("slit").model_dump(mode="json")
    sections["model"]["width"] = 4
    found = scores(factors_before(Trainer(data, Config.model_validate(sections)).run().model, data, VALIDATION))
    histories = histories_of("slit", data)
    np.testing.assert_allclose(found, slit_scores(data, histories, 4), atol=1e-3)
    assert np.abs(found - slit_scores(data, histories)).max() > 0.5, "the width matters"


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_slit_adds_up_over_gaps_what_every_positive_gives(rate: float) -> None:
    rng = np.random.default_rng(2)
    lengths = np.array([0, 1, 2, 40, 7])
    codes, weights = rng.integers(1, 5, lengths.sum()), rng.choice([0.5, 2.0], lengths.sum()).astype(np.float32)
    gram, products, total = np.zeros((5, 5)), np.zeros((5, 5)), 0.0
    for end, n in zip(np.cumsum(lengths), lengths, strict=True):
        sums, c = np.zeros(5), 0.0
        for row in range(end - n, end):
            gram += weights[row] * np.outer(sums, sums)
            products[:, codes[row]] += weights[row] * c * sums
            total += weights[row] * c**2
            sums, c = rate * sums + np.eye(5)[codes[row]], rate * c + 1
    found = decayed_products(PositiveSequences(codes, lengths, weights), 5, rate)
    np.testing.assert_allclose(found[0], gram, rtol=1e-6)
    np.testing.assert_allclose(found[1], products, rtol=1e-6)
    assert found[2] == pytest.approx(total)


def test_more_transitions_than_the_bound_lower_the_span_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    data = world("transitions")
    n = len(data.train)
    with caplog.at_level(logging.WARNING):
        found = Trainer(data, config("transitions", max_transitions=2 * n)).run()
    assert f"{n} positives have more than max_transitions = {2 * n} within a span of 3, so gaps up to 2" in caplog.text
    other = Trainer(data, config("transitions", span=2)).run()
    assert same(dict(found.model.state_dict()), dict(other.model.state_dict()))


def test_transitions_decay_as_the_pooling_does() -> None:
    data = world("transitions", pooling={"kind": "decay", "rates": [0.5]})
    trained = Trainer(data, config("transitions", train={"history_scope": "causal"})).run()
    weights = np.zeros((len(data.users), len(data.items)))
    for user in range(len(data.users)):
        mine = np.flatnonzero((data.pairs.user == user) & (data.parts == TRAIN))
        for age, row in enumerate(mine[np.argsort(-data.times[mine])]):
            weights[user, data.pairs.item[row]] = 0.5**age
    expected = transition_scores(data, weights / np.maximum(weights.sum(1, keepdims=True), 1e-9))
    found = scores(factors_before(trained.model, data, VALIDATION))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    "negatives",
    [{"full": True}, {"uniform": 3, "cross_batch_memory": 16}, {"uniform": 3, "hard": {"n": 2, "ranks": [2, 8]}}],
    ids=["full", "memory", "hard"],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_pair_that_is_solved_last_costs_no_step(negatives: dict[str, Any], together: bool) -> None:
    data = world("ials")
    train = {"epochs": 2, "pairs": "together" if together else "apart", "batch_size": 32}
    trainer = Trainer(data, Config.model_validate(config("ials", 2, train).model_dump() | {"negatives": negatives}))
    calls: list[int] = []
    for number in range(2):
        trainer.model.towers("user")[number].register_forward_hook(lambda *_, number=number: calls.append(number))
    before = weights(trainer)
    trainer.step(trainer.objective.sampler.epoch(0), 0)
    trainer.step(trainer.objective.sampler.epoch(0), 1)
    assert calls == [0] * 2
    moved = {name.split(".")[1] for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {"0"}


@pytest.mark.parametrize("kind", [kind for kind in FORMS if kind.choices], ids=lambda kind: kind.kind)
def test_of_several_values_the_best_on_validation_is_kept(kind: type[Start], caplog: pytest.LogCaptureFixture) -> None:
    data = world(kind.kind)
    option, tried = CHOICES[kind.kind]
    each = {}
    for value in tried:
        one = Trainer(data, config(kind.kind, 1, None, **{option: [value]}))
        one.run()
        each[value] = (one.best.score, weights(one))
    with caplog.at_level(logging.INFO, "twotower"):
        trainer = Trainer(data, config(kind.kind, 1, None, **{option: tried}))
        trainer.run()
    assert len({score for score, _ in each.values()}) > 1, "the values differ"
    lines = [line for line in caplog.messages if line.startswith(f"pair 0 by {kind.kind}: ")]
    assert len(lines) > len(tried)
    value_in = re.compile(rf"{option} = ([^,:]+)")
    scores = {value_in.findall(line)[0]: float(line.split(" = ")[-1]) for line in lines[:-1]}
    assert [*scores][: len(tried)] == [f"{value:g}" for value in tried]
    best = max(scores, key=scores.__getitem__)
    assert value_in.findall(lines[-1]) == [best]
    assert scores[best] == pytest.approx(trainer.best.score, abs=1e-4)
    if float(best) in each:
        assert same(weights(trainer), each[float(best)][1])


def test_values_beyond_that_are_too_small_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    values = Trainer(data := world("ials"), config("ials"))._closed_forms
    (given,) = config("ials", 1, None, regularization=[1e-7, 1e-3]).train.solved
    tried, positives = list[float](), given.positives(data, values.model.config.pairs[0])

    def falling(start: Start) -> float:
        tried.append(start.values[1])
        return -tried[-1] if math.isfinite(values.score(0, start, positives)) else -math.inf

    with caplog.at_level(logging.INFO, "twotower"):
        chosen = search(given, falling)
    assert min(tried) < chosen.values[1] <= 1e-7
    assert any(line.endswith("has values that are not finite") for line in caplog.messages)


def test_a_choice_of_several_values_needs_a_validation_part_and_one_value_none() -> None:
    data = world("ials")
    without = replace(data, parts=np.where(data.parts == VALIDATION, TRAIN, data.parts))
    with pytest.raises(ConfigError, match="chooses among several values of regularization on the validation part"):
        Trainer(without, config("ials", 1, {"monitor": ""}, regularization=[0.1, 0.2]))
    sections = config("ials", 1, {"monitor": ""}).model_dump(mode="json")
    sections["model"]["bias"] = True
    assert scores(factors_before(Trainer(without, Config.model_validate(sections)).run().model, without, TRAIN)).any()


def test_a_pair_that_no_scorer_has_written_is_refused() -> None:
    data, of = of_scorers({"kind": "ease"})
    sections = of.model_dump(mode="json")
    sections["model"]["pairs"][0]["item"]["layers"] = [8]
    with pytest.raises(
        ConfigError, match=r"'ease' has another pair of towers; write scorers = \[\{ kind = 'ease' \}\]"
    ):
        with_scorers(data.schema, Config.model_validate(sections))


def test_a_run_of_no_epoch_is_read_evaluated_and_published(tmp_path: Path) -> None:
    data, of = of_scorers({"kind": "ease", "regularization": [3.0]})
    run = api.fit(data, data.schema, of, folder=tmp_path / "run")
    read = api.load(tmp_path / "run")
    assert read.history == []
    assert read.metrics == run.metrics
    assert read.metrics["test.recall@5"] > 0
    bundle = api.publish(read, tmp_path / "store")
    assert len(Retriever(bundle).recommend(Request("3"), 5).items) == 5
    assert diagnose(read)
    (tmp_path / "run" / "config.toml").write_text(
        (tmp_path / "run" / "config.toml").read_text().replace("epochs = 0", "epochs = 1")
    )
    with pytest.raises(RunError, match="damaged"):
        api.load(tmp_path / "run")


def rated(liked: pl.Expr, interactions: str = "positive", of: str = "ease") -> Dataset:
    """The log of tastes with a label."""
    plain = world(of).schema
    history, item = plain.features
    features = (history.model_copy(update={"interactions": interactions}), item)
    schema = plain.model_copy(update={"label": "liked", "features": features, "positive_above": 0.0})
    log = log_of_tastes(False).with_columns(liked=liked)
    return build_dataset(check(None, None, log, schema), schema, SplitConfig(kind="column", column="part"))


def test_values_that_the_monitor_cannot_measure_are_refused() -> None:
    data = rated(pl.col("user_id") % 2 > 0)  # both classes, of every user one
    of = config("ease", 1, {"monitor": "validation.gauc"}, regularization=[1.0, 2.0])
    with pytest.raises(ConfigError, match=r"'validation.gauc' cannot be measured .* allowed: validation\."):
        Trainer(data, of).run()


def test_fault_B2_a_signal_ends_the_choice_of_values_and_a_later_call_has_the_same_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, of = of_scorers({"kind": "ease", "regularization": [1.0, 2.0, 3.0]})
    scored = list[str]()

    class Press(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            scored.extend(record.getMessage() for _ in range("regularization" in record.getMessage()))
            if "regularization = 1: " in record.getMessage():
                os.kill(os.getpid(), signal.SIGINT)

    log = logging.getLogger("twotower")
    log.addHandler(press := Press(logging.INFO))
    try:
        with (
            caplog.at_level(logging.INFO, "twotower"),
            pytest.raises(Interrupted, match=r"stopped before the first step; no checkpoint is written; go on: `fit"),
        ):
            api.fit(data, data.schema, of, folder=tmp_path / "run")
    finally:
        log.removeHandler(press)
    assert len(scored) == 1
    again = api.fit(data, data.schema, of, folder=tmp_path / "run", resume=True)
    assert again.metrics["test.recall@5"] == api.fit(data, data.schema, of).metrics["test.recall@5"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "cosine": ({"model": {"similarity": "cosine"}}, "is a plain product; set model.similarity = 'dot'"),
    "nothing": ({"train": {"solved": []}}, "train.epochs = 0 trains no towers; name a scorer"),
    "torchrec": ({"train": {"embedding_placement": "torchrec"}}, "'torchrec' has pieces"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_start_is_refused_with_the_way_out(wrong: str) -> None:
    sections, message = WRONG[wrong]
    given = config("ials").model_dump(mode="json")
    for section, values in sections.items():
        given[section] |= values
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        Trainer(world("ials"), Config.model_validate(given))


@pytest.mark.parametrize("kind", IN_ORDER)
def test_what_follows_of_users_with_one_positive_each_is_refused(kind: str) -> None:
    log = pl.DataFrame(
        {
            "user_id": range(9),
            "item_id": [1, 2, 3] * 3,
            "t": range(9),
            "part": ["train"] * 6 + ["validation", "test", "test"],
        }
    )
    schema = world(kind).schema
    tables = check(None, columns() if kind in BY_COLUMNS else None, log, schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(TrainingError, match="finds no positive that follows another of its user"):
        Trainer(data, config(kind)).run()


@pytest.mark.parametrize("kind", ["columns", "transitions"])
def test_the_size_of_weights_does_not_matter_to_what_follows(kind: str) -> None:
    data = world(kind, weighted=True)
    small = replace(data, pairs=replace(data.pairs, weight=data.pairs.weight * np.float32(1e-5)))
    part = VALIDATION if kind == "columns" else TRAIN
    found = [scores(factors_before(Trainer(d, config(kind)).run().model, d, part)) for d in (data, small)]
    assert found[0].any()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


@every_kind
def test_a_start_comes_back_from_a_config(kind: type[Start]) -> None:
    given = config(kind.kind)
    assert Config.model_validate(given.model_dump(mode="json")) == given


def test_values_that_are_not_finite_of_a_start_without_choices_have_a_way_out() -> None:
    class Broken(Neighbours):
        def solve(self, positives: PositiveMatrix, pooling: Pooling, width: int, seed: int) -> PairValues:
            found = super().solve(positives, pooling, width, seed)
            return replace(found, source=found.source * math.nan)

    trainer = Trainer(world(Neighbours.kind), config(Neighbours.kind))
    (start,) = trainer.recipe.train.solved
    broken = Broken.model_construct(**dict(start))
    with pytest.raises(TrainingError, match="has values that are not finite; leave it out of scorers$"):
        trainer._closed_forms.fill(0, broken)


GIVEN = Ials(unobserved=(0.03, 0.3), regularization=(0.004, 0.032))


def test_one_hill_has_one_leader() -> None:
    tried = list[tuple[float, ...]]()

    def score(start: Start) -> float:
        tried.append(start.values)
        return 1 / (1 + abs(math.log(tried[-1][0] / 0.09)) + abs(math.log(tried[-1][1] / 0.011)))

    chosen = search(GIVEN, score)
    assert chosen.values[0] == pytest.approx(0.09, rel=0.2)
    assert len(set(tried)) == len(tried) <= 4 + 2 + 2 * 8, "no values are tried twice"


def test_values_that_cannot_be_solved_end_the_search() -> None:
    tried = list[Start]()

    def score(start: Start) -> float:
        tried.append(start)
        return -math.inf

    assert search(GIVEN, score) in GIVEN.alternatives()
    assert len(tried) == 4


def score_at(start: Start, at: tuple[float, float] | None) -> float:
    """A validation metric that is best at one place of both options, or rises for ever."""
    a, rate = start.values
    if at is None:
        return rate
    return -math.inf if rate < 1e-4 else -abs(math.log(a / at[0])) - abs(math.log(rate / at[1]))


@pytest.mark.parametrize(
    "at",
    [
        (0.2, 0.02),  # given
        (0.011, 0.3),  # beyond one end of each
        (0.8, 1.1e-4),  # beyond the other ends; what is too small is no error
        (0.29, 0.012),  # between two
        (0.05, 0.029),  # beyond, and between
    ],
)
def test_values_beyond_the_given_ones_are_tried_while_they_are_better_and_then_those_between(
    at: tuple[float, float],
) -> None:
    chosen = chosen_by(at)
    assert chosen.values[0] == pytest.approx(at[0], rel=0.2)
    assert chosen.values[1] == pytest.approx(at[1], rel=0.2)


def test_a_search_beyond_and_between_has_an_end() -> None:
    assert 0.04 * 2**8 <= chosen_by(None).values[1] < 0.04 * 2**9


def chosen_by(at: tuple[float, float] | None) -> Start:
    given = Ials(unobserved=(0.1, 0.2, 0.4), regularization=(0.01, 0.02, 0.04))
    return search(given, lambda start: score_at(start, at))


def test_a_search_goes_on_from_two_values_that_are_as_good() -> None:
    """They are far apart on a ridge, and the best is near the one that is a little worse."""

    def on_a_ridge(start: Start) -> float:
        a, rate = (math.log(value / best) for value, best in zip(start.values, (0.169, 0.0113), strict=True))
        apart = rate + 0.6 * a
        return 1.0 - max(0.6 * apart, -0.3 * apart) - max(0.125 * a, -0.2 * a)

    chosen = search(GIVEN, on_a_ridge)
    assert chosen.values == pytest.approx((0.169, 0.0113), rel=0.1)


def test_a_search_on_level_ground_ends_there() -> None:
    """Stronger values change nothing from one on, so neither more of them nor those between are tried."""
    tried = list[float]()

    def flat(start: Start) -> float:
        tried.append(start.values[0])
        return min(0.1 + 0.01 * math.log10(tried[-1]), 0.13)

    chosen = search(Slit(regularization=(4.0, 40.0, 400.0)), flat)
    assert chosen.values[0] >= 400
    assert tried == pytest.approx([4, 40, 400, 4_000, 40_000]), "up to one that is level with the best"


def test_options_that_make_up_for_one_another_are_changed_together() -> None:
    def on_a_ridge(start: Start) -> float:
        a, rate = start.values
        return -abs(math.log(a * rate / 0.02)) - 0.1 * abs(math.log(a / 0.15))

    chosen = search(Ials(unobserved=(0.1, 0.4), regularization=(0.05, 0.2)), on_a_ridge)
    assert chosen.values[0] == pytest.approx(0.15, rel=0.1)
