"""The bias of cold items begins where what users of validation took is most likely, and ends where the metric is best;
nothing else of the model changes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from trainers import weights
from worlds import settings

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.evaluation.factors import Factors
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.values import UNKNOWN
from twotower.train.factors import factors_before
from twotower.train.mix import Mix, climbed, cold_items
from twotower.train.recipe import Recipe
from twotower.train.trainer import Trainer

N_USERS, N_ITEMS, N_TAGS = 160, 60, 4
SCHEMA = Schema(
    title="",
    features=(
        Sequence(name="h", side="user"),
        Categorical(name="item_id", side="item"),
        Categorical(name="tag", side="item"),
    ),
)


@pytest.mark.parametrize(("at", "found"), [(1.1, 1.125), (-0.4, -0.375), (4.3, 4.25), (0.0, 0.0)])
def test_a_climb_ends_where_the_score_is_highest(at: float, found: float) -> None:
    assert climbed(lambda bias: -abs(bias - at), 0.5, 1.0) == pytest.approx(found)
    assert climbed(lambda bias: -abs(bias - at * 40), 20.0, 40.0) == pytest.approx(found * 40)


def log_of_tags() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items with a tag, and users of one tag who take most of its items. Every fifth item is in the validation and test
    part alone."""
    rng = np.random.default_rng(0)
    tag = np.arange(N_ITEMS) % N_TAGS
    takes = rng.random((N_USERS, N_ITEMS)) < np.where(tag == np.arange(N_USERS)[:, None] % N_TAGS, 0.7, 0.05)
    user, item = np.nonzero(takes)
    new = item % 5 == 0
    part = np.where(rng.random(len(user)) < 0.5, "validation", "test")
    part = np.where(new, part, np.where(rng.random(len(user)) < 0.2, part, "train"))
    actions = pl.DataFrame({"user_id": user, "item_id": item, "part": part})
    return pl.DataFrame({"item_id": range(N_ITEMS), "tag": tag}), actions


def world() -> Dataset:
    items, actions = log_of_tags()
    return build_dataset(check(None, items, actions, SCHEMA), SCHEMA, SplitConfig(kind="column", column="part"))


def config(fitted: bool = True, **model: Any) -> Config:
    return settings(
        model={
            "cold_item_bias": fitted, "similarity": "dot", "bias": False, "temperature": 1.0, "unknown_rate": 0.0,
            "width": 8,
            "pairs": [{"user": {"layers": []}, "item": {"join": "sum", "layers": []}}],
        } | model,
        loss={"kind": "softmax"},
        negatives={"full": {"cold": False}},
        train={"epochs": 6, "lr": 0.05, "batch_size": 64, "monitor": "validation.recall@5", "device": "cpu"},
        evaluation={"k": [5]},
        split={"kind": "column", "column": "part"},
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_cold_items_are_found_among_all_and_warm_ones_rank_as_before(bias: bool) -> None:
    data = world()
    plain, fitted = (Trainer(data, config(flag, bias=bias)) for flag in (False, True))
    for trainer in (plain, fitted):
        trainer.run()
    found = weights(fitted)
    values = found.pop("cold_items.values")
    assert values[UNKNOWN] > 0
    assert not values[UNKNOWN + 1 :].any()
    assert found.keys() == weights(plain).keys()
    for name, weight in weights(plain).items():  # sums of products with two more numbers round otherwise
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-4)
    before, after = (factors_before(t.model, data, VALIDATION) for t in (plain, fitted))
    cold = torch.from_numpy(data.item_counts == 0)
    moved = (after.users @ after.items.T) - (before.users @ before.items.T)
    expected = torch.where(cold, values[UNKNOWN], 0.0)
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-4, rtol=1e-4)
    assert fitted._score(fitted._scorer()) > plain._score(plain._scorer()) + 0.05


def test_a_run_keeps_the_bias_and_measures_with_it(tmp_path: Path) -> None:
    data = world()
    run = api.fit(data, SCHEMA, config(), folder=tmp_path / "run")
    loaded = runs.load(tmp_path / "run")
    assert torch.equal(loaded.model.cold_items.values, run.model.cold_items.values)
    plain = api.fit(data, SCHEMA, config(False))
    for part in ("validation", "test"):
        assert run.metrics[f"{part}.recall@5"] > plain.metrics[f"{part}.recall@5"] + 0.05
    assert run.metrics["test.recall@5.cold_item"] > plain.metrics["test.recall@5.cold_item"] + 0.05
    assert run.metrics["test.recall@5.cold_item_alone"] == plain.metrics["test.recall@5.cold_item_alone"]


def test_the_bias_is_fitted_to_the_scores_with_a_closed_form(messages: list[str]) -> None:
    tastes = Sequence.model_validate({"name": "tastes", "side": "user", "share_embedding": False, "pooling": "ridge"})
    schema = SCHEMA.model_copy(update={"features": (*SCHEMA.features, tastes)})
    chosen = config()
    pairs = [
        {"user": {"fields": ["h"], "layers": []}, "item": {"fields": ["item_id", "tag"], "join": "sum", "layers": []}},
        {"user": {"fields": ["tastes"], "layers": []}, "item": {"fields": ["item_id"], "layers": []}},
    ]
    form = {"kind": "ials", "unobserved": [0.3], "regularization": [0.008]}
    model, train = chosen.model.model_dump() | {"pairs": pairs}, chosen.train.model_dump() | {"solved": [form]}
    items, actions = log_of_tags()
    data = build_dataset(check(None, items, actions, schema), schema, SplitConfig(kind="column", column="part"))
    trainer = Trainer(data, Config.model_validate(chosen.model_dump() | {"model": model, "train": train}))
    trainer.run()
    assert any(line.startswith("mix, in standard deviations of the first scores: ials ") for line in messages)
    bias, values = float(trainer.model.cold_items.values[UNKNOWN]), trainer.model.cold_items.values
    scores = list[float]()
    for value in (bias, bias - 1, bias + 1, 0.0):
        with torch.no_grad():
            values[UNKNOWN] = value
        scores.append(trainer._score(trainer._scorer()))
    assert bias > 0
    assert scores[0] > scores[3] + 0.05
    assert scores[0] == max(scores)


@pytest.mark.parametrize("fitted", [True, False])
def test_cold_items_change_no_weight_of_known_ones_if_they_have_a_bias(
    fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold items are taken more often than their popularity, which is 0, lets expect."""
    rng, n_train, n = np.random.default_rng(0), 3000, 2000
    cold = np.arange(N_ITEMS) % 5 == 0
    shares = np.where(cold, 0, rng.pareto(1.0, N_ITEMS) + 0.1)
    taken = rng.choice(N_ITEMS, n_train, p=shares / shares.sum())
    users, items = (rng.normal(size=(k, 3)).astype(np.float32) for k in (n, N_ITEMS))
    odds = users @ items.T + 0.7 * np.log1p(np.bincount(taken, minlength=N_ITEMS)) + 2.5 * cold
    chosen = (odds + rng.gumbel(size=odds.shape)).argmax(1)
    frame = pl.DataFrame(
        {
            "user_id": np.concatenate([n + np.arange(n_train), np.arange(n), [0]]),
            "item_id": np.concatenate([taken, chosen, [1]]),
            "part": ["train"] * n_train + ["validation"] * n + ["test"],
        }
    )
    tables = check(None, pl.DataFrame({"item_id": range(N_ITEMS), "tag": 0}), frame, SCHEMA)
    data = build_dataset(tables, SCHEMA, SplitConfig(kind="column", column="part"))
    rows = [table.ids.cast(pl.Int64).to_numpy() for table in (data.users, data.items)]
    first = Factors(torch.from_numpy(users[rows[0] % n]), torch.from_numpy(items[rows[1]]))
    trainer = Trainer(data, config(fitted, bias=True))
    monkeypatch.setattr(Recipe, "weights_popularity", True)
    found = Mix(trainer.model, data, trainer.recipe, trainer.context).fit(first, [])
    assert found
    assert (found.popularity == pytest.approx(0.7, abs=0.1)) == fitted


@pytest.mark.parametrize(
    ("kind", "are_there"),
    [("column", False), ("files", False), ("time", False), ("last", False), ("user_ratio", False), ("random", True),
        ("user_random", True)],
)  # fmt: skip
def test_items_of_the_test_part_alone_are_there_on_validation_if_the_split_is_in_no_order(
    kind: str, are_there: bool
) -> None:
    items, actions = log_of_tags()
    later = pl.DataFrame(
        {"item_id": [N_ITEMS, N_ITEMS + 1], "tag": [0, 1]}
    )  # the first is taken in the test part, the second never
    of_later = pl.DataFrame({"user_id": [0, 4], "item_id": [N_ITEMS] * 2, "part": ["test"] * 2})
    tables = check(None, pl.concat([items, later]), pl.concat([actions, of_later]), SCHEMA)
    data = build_dataset(tables, SCHEMA, SplitConfig(kind="column", column="part"))
    data = replace(
        data, split=SplitConfig.model_validate({"kind": kind} | ({"column": "part"} if kind == "column" else {}))
    )
    raised = set(np.flatnonzero(cold_items(data)).tolist())
    assert raised == {*range(0, N_ITEMS, 5), N_ITEMS + 1} | ({N_ITEMS} if are_there else set())


def test_too_few_cold_positives_change_nothing_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    data = world()
    cold = (data.item_counts == 0)[data.pairs.item] & (data.parts == VALIDATION)
    few = replace(data, parts=np.where(cold & (np.cumsum(cold) > 49), TEST, data.parts))
    trainer = Trainer(few, config())
    with caplog.at_level(logging.WARNING, "twotower"):
        trainer.run()
    assert (
        "the bias stays 0: items that training lacks have 49 of the 50 validation positives that are needed"
        in caplog.text
    )
    assert not trainer.model.cold_items.values.any()


def test_what_cannot_be_fitted_is_refused_before_the_first_step() -> None:
    data = world()
    without = replace(data, parts=np.where(data.parts == VALIDATION, TRAIN, data.parts))
    with pytest.raises(ConfigError, match=r"and the split has none; set model.cold_item_bias = false"):
        Trainer(without, config())
    items, actions = log_of_tags()
    schema = SCHEMA.model_copy(update={"features": tuple(f for f in SCHEMA.features if f.name != "item_id")})
    data = build_dataset(check(None, items, actions, schema), schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(
        ConfigError,
        match="no feature of the items is their id without hash_buckets; add one, or set model.cold_item_bias = false",
    ):
        Trainer(data, config())
