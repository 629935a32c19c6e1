"""Columns and what is popular, weighed together: choices drawn by known weights, and a model that has them."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from waves import N_ITEMS, SCHEMA, waves
from worlds import settings

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.recent_popularity import PopularityTerms, RecentPopularity
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.train.choices import MIN_ROWS
from twotower.train.factors import factors_during
from twotower.train.joint_fit import JointFit, PairForm, joint_fit
from twotower.train.recent_popularity import half_lives_of
from twotower.train.starts.next_content import NextContent
from twotower.train.starts.pair import PairPart
from twotower.train.trainer import Trainer

USERS, ITEMS, ROWS = 4000, 60, 2
WEIGHTS = [1.5, -0.5, 0.0]
PARTS = [torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([5])]


def drawn(terms: PopularityTerms, has_new: bool = True, untaken: int = 0) -> tuple[Factors, Dataset]:
    """Vectors, and two rows of each user at random, then one by the scores under known weights. New items come one by
    one, or are there from the start, but for the first ones, which nobody takes."""
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    found = Factors(*(torch.randn(n, 6, generator=generator) for n in (USERS, ITEMS)))
    n = USERS * ROWS
    at = np.arange(n)
    there = (1 + at * (ITEMS - 1) // n) if has_new else np.full(n, ITEMS)
    favourites = (at // 200 * 7) % there  # one in three rows is of an item that is popular for a time
    items = np.where(rng.random(n) < 0.35, favourites, rng.integers(0, there))
    if not has_new:
        items[:ITEMS] = np.arange(ITEMS)
        items = np.maximum(items, untaken)
    users = rng.permutation(np.repeat(np.arange(USERS), ROWS))
    asked = rng.integers(n // 4, n, USERS) if has_new else rng.integers(ITEMS + 1, n, USERS)
    popular = RecentPopularity(items.astype(np.int32), 2 * at, None, ITEMS).scores(2 * asked - 1, terms)
    of_items = found.items.clone()
    for part, weight in zip(PARTS, WEIGHTS, strict=True):
        of_items[:, part] *= weight
    odds = (found.users @ of_items.T).double().numpy() + popular + rng.gumbel(size=(USERS, ITEMS))
    odds[users, items] = odds[:, :untaken] = -np.inf
    frame = pl.DataFrame(
        {
            "user_id": [*users, *range(USERS), 0],
            "item_id": [*items, *odds.argmax(1), 0],
            "at": [*(2 * at), *(2 * asked - 1), 2 * n],
            "part": ["train"] * n + ["validation"] * USERS + ["test"],
        }
    )
    ids = Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")
    schema = Schema(features=ids, duplicates="keep", time="at", time_unit="order")
    tables = check(None, pl.DataFrame({"item_id": np.arange(ITEMS)}), frame, schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    assert data.users.ids.to_list() == [*range(USERS)]
    return found, data


def fitted(found: Factors, data: Dataset, half_life: float) -> JointFit | None:
    parts = [PairPart(f"column {n}", "rate 1", part) for n, part in enumerate(PARTS)]
    forms = [
        PairForm(NextContent.model_validate({"pair": 1}), [], parts[:1], PARTS[:1]),
        PairForm(NextContent.model_validate({"pair": 2}), [], parts[1:], PARTS[1:]),
    ]
    users, items = data.validation.user.astype(np.int64), data.validation.item.astype(np.int64)

    def likelihood(scorer: Factors) -> float:
        scores = scorer.catalogue_scores(users).double().log_softmax(1)
        return float(scores[torch.arange(len(items)), torch.from_numpy(items)].mean())

    return joint_fit(found, forms, data, 1, half_life, likelihood, DistributedContext(), bias=False)


@pytest.mark.parametrize(
    ("total", "age", "new"), [(-1.0, -0.5, -0.4), (0.5, -0.8, 0.2), (-0.7, 0.5, 0.0), (0.0, -0.6, -0.6)]
)
def test_weights_are_those_by_which_users_take(total: float, age: float, new: float) -> None:
    half_life = half_lives_of(USERS * ROWS)[4]
    found, data = drawn(PopularityTerms(half_life, 2.0, total, age, new))
    joint = fitted(found, data, half_lives_of(USERS * ROWS)[2])
    assert joint is not None
    assert joint.weights.factors == pytest.approx(WEIGHTS, abs=0.2)
    assert joint.terms.half_life == half_life
    assert joint.terms[1:] == pytest.approx((2.0, total, age, new), abs=0.35)
    others = (found.users[:, :2] @ found.items[:, :2].T).std()
    for part, factor, spread in zip(PARTS, joint.weights.factors, joint.weights.spreads, strict=True):
        scores = found.users[:, part] @ (factor * found.items[:, part]).T
        assert abs(spread) == pytest.approx(float(scores.std() / others), rel=0.1, abs=0.02)


def test_where_no_item_is_new_such_ones_gain_by_no_age() -> None:
    half_life = half_lives_of(USERS * ROWS)[4]
    for age in (-0.8, 0.8):
        joint = fitted(*drawn(PopularityTerms(half_life, 2.0, 0.0, age, -3.0), has_new=False), half_life)
        assert joint is not None
        assert joint.terms.age == pytest.approx(age, abs=0.3)
        assert joint.terms.new == min(joint.terms.age, 0.0)


@pytest.mark.parametrize("of_test", [False, True])
def test_items_that_nobody_took_yet_are_not_held_behind_all(of_test: bool) -> None:
    """Some are in the catalogue and in no row, or in the test part alone; what users took of others tells nothing of
    them."""
    half_life = half_lives_of(USERS * ROWS)[4]
    found, data = drawn(PopularityTerms(half_life, 2.0, 0.0, -0.8), has_new=False, untaken=0 if of_test else 4)
    if of_test:
        data = replace(data, parts=np.where(data.pairs.item < 4, TEST, data.parts))
    joint = fitted(found, data, half_life)
    assert joint is not None
    assert joint.terms.age == pytest.approx(-0.8, abs=0.3)
    assert joint.terms.new == joint.terms.age
    known = RecentPopularity.before(data, VALIDATION)
    popular = known.scores_at_end(joint.terms)
    assert not known.have_rows_at_end[:4].any()
    assert popular[:4] == pytest.approx(popular[0])
    assert popular[0] > popular[4:].min() - 2.0


@pytest.mark.parametrize("age", [0.8, -0.3])
def test_few_users_who_take_new_items_change_no_weight(age: float) -> None:
    half_life = half_lives_of(USERS * ROWS)[4]
    found, data = drawn(PopularityTerms(half_life, 2.0, 0.0, age), has_new=False, untaken=4)
    rows = np.flatnonzero(data.parts == VALIDATION)[: MIN_ROWS - 1]
    items = data.pairs.item.copy()
    items[rows] = np.arange(len(rows)) % 4
    joints = [fitted(found, one, half_life) for one in (data, replace(data, pairs=replace(data.pairs, item=items)))]
    assert joints[0] is not None
    assert joints[1] is not None
    assert joints[1].terms == pytest.approx(joints[0].terms, abs=0.15)


def test_biases_of_users_change_no_weight() -> None:
    half_life = half_lives_of(USERS * ROWS)[4]
    found, data = drawn(PopularityTerms(half_life, 2.0, -0.5))
    users, items = (torch.cat([one, torch.zeros(len(one), 2)], 1) for one in (found.users, found.items))
    users[:, -1], items[:, -2] = 1.0, 1.0
    biased = users.clone()
    biased[:, -2] = 100 * torch.randn(len(users), generator=torch.Generator().manual_seed(3))
    joints = [
        joint_fit(Factors(one, items), (), data, 1, half_life, lambda _: 0.0, DistributedContext(), bias=True)
        for one in (users, biased)
    ]
    assert joints[0] is not None
    assert joints[1] is not None
    assert joints[0].terms == joints[1].terms
    torch.testing.assert_close(joints[1].scorer.users, biased)


def test_too_few_rows_tell_nothing() -> None:
    half_life = half_lives_of(USERS * ROWS)[4]
    found, data = drawn(PopularityTerms(half_life, 2.0))
    parts = data.parts.copy()
    parts[np.flatnonzero(parts == VALIDATION)[:-40]] = 0
    assert fitted(found, replace(data, parts=parts), half_life) is None


@cache
def colours_data() -> Dataset:
    """Waves of items of three colours, of which a user takes one."""
    columns = Sequence(name="tastes", side="user", share_embedding=False, pooling="mean")
    colour = Categorical(name="colour", side="item")
    schema = SCHEMA.model_copy(update={"features": (*SCHEMA.features, columns, colour)})
    log = waves(n_users=800).filter((pl.col("user_id") + pl.col("item_id")) % 3 != 0)
    items = pl.DataFrame({"item_id": range(N_ITEMS), "colour": [f"c{i % 3}" for i in range(N_ITEMS)]})
    return build_dataset(check(None, items, log, schema), schema, SplitConfig(kind="last"))


def colours(bias: bool = False) -> tuple[Dataset, Config]:
    """Such waves, and a trained pair beside one of colours."""
    item: dict[str, Any] = {"layers": [], "width": 8}
    pairs = [
        {"user": {"fields": ["taken"], "layers": [], "width": 8}, "item": item | {"fields": ["item_id"]}},
        {
            "user": {"fields": ["tastes"], "layers": [], "width": 8},
            "item": item | {"fields": ["colour"], "activation": "Identity", "join": "sum"},
        },
    ]
    chosen = settings(
        model={"recent_popularity": True, "bias": bias, "similarity": "dot", "temperature": 1.0, "unknown_rate": 0.0,
            "pairs": pairs},
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={
            "epochs": 1, "batch_size": 256, "lr": 0.02, "monitor": "validation.ndcg@5", "device": "cpu",
            "pairs": "together" if bias else "apart",
            "start": [{"kind": "next_content", "pair": 1, "learn": False, "blend": [0.0, 1.0]}],
        },
        evaluation={"k": [5], "bootstrap": 0},
    )  # fmt: skip
    return copy.deepcopy(colours_data()), chosen


def weighed(data: Dataset, chosen: Config) -> tuple[Trainer, JointFit]:
    trainer = Trainer(data, chosen)
    trainer._measured_pairs = [0]
    joint = trainer._weigh_last()
    assert joint is not None
    return trainer, joint


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_has_the_scores_of_the_fit(bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    data, chosen = colours(bias)
    trainer, joint = weighed(data, chosen)
    with caplog.at_level(logging.INFO, "twotower"):
        written = trainer._last_fits.fit(trainer._validation_scores, joint)
    assert any("weighed together" in line and "colour (rate 1)" in line for line in caplog.messages)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    assert trainer._values is not None
    trainer._values.solve_again(data, written)
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.model.recent_popularity.terms == pytest.approx(joint.terms, rel=1e-5)
    users = np.unique(data.validation.user).astype(np.int64)
    found = factors_during(trainer.model.eval(), data, VALIDATION).catalogue_scores(users)
    wanted = joint.scorer.catalogue_scores(users)
    torch.testing.assert_close(found - found.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True), rtol=1e-3,
        atol=1e-3)  # fmt: skip


def test_without_columns_what_is_popular_has_the_weights_of_the_fit(caplog: pytest.LogCaptureFixture) -> None:
    data, chosen = colours()
    sections = chosen.model_dump(mode="json", exclude_defaults=True)
    sections["model"]["pairs"] = sections["model"]["pairs"][:1]
    del sections["train"]["start"], sections["train"]["pairs"]
    trainer = Trainer(data, settings(**sections))
    found = trainer._scorer()
    assert isinstance(found, Factors)
    with caplog.at_level(logging.INFO, "twotower"):
        trainer._last_fits.fit(trainer._validation_scores)
    assert any(line.endswith("by the weights before, which they replace") for line in caplog.messages)
    assert not any("columns" in line for line in caplog.messages)
    terms = trainer.model.recent_popularity.terms
    joint = joint_fit(found, (), data, chosen.train.seed, terms.half_life, lambda _: 0.0, DistributedContext(), False)
    assert joint is not None
    assert terms == pytest.approx(joint.terms, rel=1e-3)


@pytest.mark.parametrize("blend", [[0.0], [0.5]])
def test_a_weight_that_is_given_stays(blend: list[float]) -> None:
    data, chosen = colours()
    sections = chosen.model_dump(mode="json", exclude_defaults=True)
    sections["train"]["start"][0]["blend"] = blend
    trainer = Trainer(data, settings(**sections))
    trainer._measured_pairs = [0]
    assert trainer._weigh_last() is None
    rows = trainer.model.towers("item")[1].embeddings.rows_of("colour")
    assert bool(rows.any()) == bool(blend[0])


@pytest.mark.parametrize("bias", [False, True])
def test_a_fit_that_finds_less_is_left(bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    trainer, joint = weighed(*colours(bias))
    before, models = copy.deepcopy(trainer.model.state_dict()), []
    less = replace(joint, scorer=replace(joint.scorer, users=-joint.scorer.users, recent=None))
    for is_given in (False, True):
        trainer.model.load_state_dict(before)
        with caplog.at_level(logging.INFO, "twotower"):
            trainer._last_fits.fit(trainer._validation_scores, less if is_given else None)
        models.append(copy.deepcopy(trainer.model.state_dict()))
    assert any("columns" in line and line.endswith("which stay") for line in caplog.messages)
    assert models[0]["recent_popularity.numbers"].tolist() != pytest.approx(joint.terms)
    for name, weight in models[0].items():
        assert torch.equal(models[1][name], weight)
