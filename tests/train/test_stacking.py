"""Stacking finds the weights under which the labels of the validation part are most likely."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from trainers import same, weights
from worlds import settings

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.evaluation.metrics.log_loss import LogLoss
from twotower.evaluation.metrics.measured import ScoredPairs
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.values import UNKNOWN
from twotower.train.factors import factors_before
from twotower.train.stacking import fit_weights, stack
from twotower.train.trainer import Trainer

TOWERS: list[dict[str, Any]] = [
    {"user": {"layers": [8]}, "item": {"layers": [8]}},
    {"user": {"layers": [8, 4]}, "item": {"layers": [8, 4]}},
]


def config(stacking: bool = True, **sections: dict[str, Any]) -> Config:
    model = {"stacking": stacking, "pairs": TOWERS} | sections.pop("model", {})
    train = {"epochs": 3, "lr": 0.05} | sections.pop("train", {})
    return settings(model=model, train=train, **sections)


def drawn(factors: list[float], bias: float, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    terms = rng.normal(size=(n, len(factors)))
    labels = (rng.random(n) < 1 / (1 + np.exp(-(terms @ np.array(factors) + bias)))).astype(np.float64)
    return terms, labels


def test_the_factors_that_drew_the_labels_are_found() -> None:
    terms, labels = drawn([0.5, 2.0, 0.0], -1.0, 40_000)
    found, bias = fit_weights(terms, labels, np.ones(len(labels)), np.ones(3), 0.0)
    assert found == pytest.approx([0.5, 2.0, 0.0], abs=0.06)
    assert bias == pytest.approx(-1.0, abs=0.06)
    assert min(found) >= 0


def test_what_points_the_wrong_way_gets_0_and_none_is_below() -> None:
    terms, labels = drawn([1.0, -0.7], 0.0, 20_000)
    found, _ = fit_weights(terms, labels, np.ones(len(labels)), np.ones(2), 0.0)
    assert found[0] == pytest.approx(1.0, abs=0.1)
    assert 0 <= found[1] < 0.01


def test_few_labels_move_a_weight_little_and_a_weight_of_0_may_rise() -> None:
    terms, labels = drawn([3.0, 3.0], 0.0, 4)
    found, _ = fit_weights(terms, labels, np.ones(4), np.array([1.0, 1.0]), 0.0)
    assert found == pytest.approx([1.0, 1.0], abs=0.5)
    terms, labels = drawn([1.0, 1.0], 0.0, 20_000)
    found, _ = fit_weights(terms, labels, np.ones(len(labels)), np.array([0.0, 1.0]), 0.0)
    assert found == pytest.approx([1.0, 1.0], abs=0.1)


def test_without_a_bias_of_the_model_the_level_is_left_to_the_terms() -> None:
    terms, labels = drawn([1.0, 0.0], -2.5, 20_000)
    terms[:, 1] = -2.5 + 0.1 * terms[:, 1]  # the level of a log of few positives
    found, bias = fit_weights(terms, labels, np.ones(len(labels)), np.ones(2), None)
    assert bias == 0
    assert found == pytest.approx([1.0, 1.0], abs=0.1)


def test_a_pair_counts_as_often_as_its_weight_says() -> None:
    terms, labels = drawn([1.0, 0.3], 0.2, 200)
    weight = np.random.default_rng(1).integers(0, 4, len(labels))
    found, bias = fit_weights(terms, labels, weight.astype(np.float64), np.ones(2), 0.0)
    repeated = np.repeat(np.arange(len(labels)), weight)
    again, bias_again = fit_weights(terms[repeated], labels[repeated], np.ones(len(repeated)), np.ones(2), 0.0)
    assert [*found, bias] == pytest.approx([*again, bias_again], abs=1e-4)


def log_loss_of(trainer: Trainer, data: Dataset) -> float:
    scores = factors_before(trainer.model, data, VALIDATION).part_scores(data, VALIDATION)
    return float(LogLoss().value(ScoredPairs.of(scores, data.pairs_of(VALIDATION), False)))


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_weights_and_the_global_bias_differ_and_the_log_loss_falls(
    everything_data: Dataset, bias: bool
) -> None:
    plain, stacked = (Trainer(everything_data, config(flag, model={"bias": bias})) for flag in (False, True))
    for trainer in (plain, stacked):
        trainer.run()
    found = weights(stacked)
    terms = found.pop("term_weights")
    assert len(terms) == (4 if bias else 2)
    assert (terms - 1).abs().max() > 0.05
    assert (terms >= 0).all()
    before = weights(plain)
    assert not bias or not torch.equal(found["global_bias"], before["global_bias"])
    if bias:
        priors = [found.pop(f"{side}_prior.values") for side in ("user", "item")]
        assert all(prior.abs().max() > 0 for prior in priors)
    for one in (found, before):
        one.pop("global_bias", None)
    assert same(found, before)
    assert log_loss_of(stacked, everything_data) < log_loss_of(plain, everything_data)
    a, b = (factors_before(t.model, everything_data, VALIDATION) for t in (plain, stacked))
    columns = torch.cat([terms[:1].expand(8), terms[1:2].expand(b.users.shape[1] - 8 - 2 * bias)])
    torch.testing.assert_close(b.users[:, : len(columns)], a.users[:, : len(columns)] * columns)
    assert torch.equal(a.items[:, : len(columns)], b.items[:, : len(columns)])


def popular(n_users: int = 120, n_items: int = 40) -> pl.DataFrame:
    """Likes that depend on how often an item is shown and on the user, which few rows of each tell."""
    rng = np.random.default_rng(0)
    kind = rng.normal(size=n_users)
    shown = rng.choice(n_items, (n_users, 10), p=np.arange(1, n_items + 1) / (n_items * (n_items + 1) / 2))
    odds = 0.12 * (shown - 0.7 * n_items) + kind[:, None]
    liked = rng.random(shown.shape) < 1 / (1 + np.exp(-odds))
    user = np.repeat(np.arange(n_users), 10)
    return pl.DataFrame({"user_id": user, "item_id": shown.ravel(), "liked": liked.ravel().astype(int)}).unique(
        ["user_id", "item_id"], maintain_order=True
    )


def test_baselines_count_as_far_as_they_help(caplog: pytest.LogCaptureFixture) -> None:
    schema = Schema.model_validate({"label": "liked", "positive_above": 0, "title": ""})
    run = {
        flag: api.fit(
            (None, None, popular()), schema, settings(model={"stacking": flag}, train={"epochs": 8, "lr": 0.3})
        )
        for flag in (False, True)
    }
    data, model = run[True].dataset, run[True].model
    with caplog.at_level(logging.INFO, "twotower"):
        Trainer(data, run[True].config).run()
    found = re.search(r"popularity (\d\.\d\d), means of users \d", caplog.text)
    assert found
    assert float(found[1]) > 0.1
    counted, codes = data.item_positive_counts, np.asarray(data.items.columns["item_id"])
    assert np.corrcoef(model.item_prior.values.numpy()[codes], np.log1p(counted))[0, 1] > 0.9
    assert run[True].metrics["test.log_loss"] < run[False].metrics["test.log_loss"]


def test_an_unknown_id_has_the_prior_of_the_mean_and_a_side_without_ids_none(caplog: pytest.LogCaptureFixture) -> None:
    users = pl.DataFrame({"user_id": range(120)}).with_columns(club=pl.col("user_id") % 3)
    features = (Categorical(name="club", side="user"), Categorical(name="item_id", side="item"))
    schema = Schema(label="liked", title="", features=features)
    with caplog.at_level(logging.INFO, "twotower"):
        run = api.fit((users, None, popular()), schema, config())
    assert "means of items" in caplog.text
    assert "means of users" not in caplog.text
    assert len(run.model.user_prior.values) == 0
    values = run.model.item_prior.values
    codes = run.dataset.items.columns["item_id"]
    assert isinstance(codes, np.ndarray)
    assert len(values) == 1 + codes.max()
    assert values[UNKNOWN] == 0
    assert values.min() < 0 < values.max(), "an unknown item is neither the least nor the most popular"


def of_tastes(n_users: int) -> Dataset:
    """Users are shown ten of forty items, and like most of the ten items of their taste."""
    rng = np.random.default_rng(0)
    shown = np.array([rng.choice(40, 10, replace=False) for _ in range(n_users)])
    liked = rng.random(shown.shape) < np.where(shown % 4 == np.arange(n_users)[:, None] % 4, 0.9, 0.1)
    user = np.repeat(np.arange(n_users), 10)
    frame = pl.DataFrame({"user_id": user, "item_id": shown.ravel(), "liked": liked.ravel().astype(int)})
    history = {"name": "h", "side": "user", "share_embedding": False, "pooling": "ridge", "interactions": "positive"}
    features = (
        Categorical(name="user_id", side="user"),
        Sequence.model_validate(history),
        Categorical(name="item_id", side="item"),
    )
    schema = Schema(label="liked", title="", features=features)
    return build_dataset(check(None, None, frame, schema), schema, SplitConfig())


@pytest.mark.parametrize(("n_users", "monitor"), [(60, "auc"), (300, "log_loss")])
def test_a_closed_form_has_its_weight_of_the_labels(
    n_users: int, monitor: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Few rows of validation, or a worse metric by the weight 1, take nothing from it."""
    item = {"fields": ["item_id"], "layers": []}
    model = {
        "similarity": "dot", "temperature": 1.0, "bias": True,
        "pairs": [{"user": {"fields": [name], "layers": []}, "item": item} for name in ("user_id", "h")],
    }  # fmt: skip
    form = {"kind": "ials", "unobserved": [0.3], "regularization": [0.008]}
    trainer = Trainer(
        of_tastes(n_users), config(model=model, train={"monitor": f"validation.{monitor}", "solved": [form]})
    )
    with caplog.at_level(logging.INFO, "twotower"):
        trainer.run()
    assert trainer.model.towers("item")[1].embeddings.rows_of("item_id").any()
    found = trainer.model.term_weights
    assert abs(float(found[1]) - 1) > 0.05
    assert "log(1 + count)" not in caplog.text, "popularity is a term of stacking"


def test_the_unit_of_the_weights_does_not_matter(everything_data: Dataset) -> None:
    trainer = Trainer(everything_data, config())
    trainer.run()
    drawn = np.random.default_rng(0).integers(1, 4, len(everything_data.pairs)).astype(np.float32)
    found = []
    for unit in (1e-4, 1.0, 1e4):
        data = replace(everything_data, pairs=replace(everything_data.pairs, weight=drawn * np.float32(unit)))
        trainer.model.term_weights.fill_(1.0)
        stack(trainer.model, trainer._validation_scores, data, trainer.context)
        found.append(torch.cat([trainer.model.term_weights, trainer.model.item_prior.values]).clone())
    assert (found[1][:-1] - 1).abs().max() > 0.05
    for other in (found[0], found[2]):  # the strength of the ridge means is a sum of weights
        torch.testing.assert_close(other[:4], found[1][:4], atol=0.2, rtol=0.2)


def test_a_run_keeps_its_weights_and_measures_validation_with_them(everything_data: Dataset, tmp_path: Path) -> None:
    run = api.fit(everything_data, everything_data.schema, config(), folder=tmp_path / "run")
    loaded = runs.load(tmp_path / "run")
    assert torch.equal(loaded.model.term_weights, run.model.term_weights)
    assert not torch.equal(loaded.model.term_weights, torch.ones(4))
    assert api.evaluate(loaded)["test.auc"] == pytest.approx(run.metrics["test.auc"], abs=1e-6)
    best = next(e for e in run.history if e["epoch"] == run.metrics["train.best_epoch"])
    assert run.metrics["validation.log_loss"] < best["validation.log_loss"]


def test_a_training_that_goes_on_from_its_last_checkpoint_has_the_same_weights(
    everything_data: Dataset, tmp_path: Path
) -> None:
    first = Trainer(everything_data, config(), tmp_path)
    first.run()
    again = Trainer(everything_data, config(), tmp_path)
    assert again.resume()
    again.run()
    assert same(weights(first), weights(again))


def test_labels_of_one_class_change_nothing_and_are_told(
    everything_data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    disliked = (everything_data.parts == VALIDATION) & ~everything_data.pairs.positive
    data = replace(everything_data, parts=np.where(disliked, TRAIN, everything_data.parts))
    trainer = Trainer(data, config(train={"monitor": "validation.recall@5"}))
    with caplog.at_level(logging.WARNING, "twotower"):
        trainer.run()
    assert "holds labels of one class" in caplog.text
    assert torch.equal(trainer.model.term_weights, torch.ones(4))


def test_what_cannot_be_fitted_is_refused_before_the_first_step(everything_data: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"loss.kind = 'softmax' is not one of labels; set model.stacking = false"):
        Trainer(everything_data, config(loss={"kind": "softmax"}, negatives={"full": True}))
    without = replace(
        everything_data, parts=np.where(everything_data.parts == VALIDATION, TRAIN, everything_data.parts)
    )
    with pytest.raises(ConfigError, match=r"the split has none; set model.stacking = false"):
        Trainer(without, config())
