"""The doctor finds an order that does not exist, and names the causes of a poor ranking in turn."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from worlds import settings

from twotower.arrays.types import Ints
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.tables import check
from twotower.diagnostics import Finding, diagnose
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.runs import Run
from twotower.suggestion.recipes import read_recipe
from twotower.train.trainer import Trainer

FEATURES = (Sequence(name="met", side="user", pooling={"kind": "decay"}), Categorical(name="item", side="item"))
SCHEMA = Schema(user_id="user", item_id="item", time="at", time_unit="order", features=FEATURES)
N_USERS, LENGTH, N_ITEMS = 300, 12, 40
TRAIN = {"history_scope": "causal", "epochs": 2, "monitor": "validation.ndcg@5", "lr": 0.003}


def world(strength: float, times: Ints | None = None, kind: str = "last") -> Dataset:
    """A log in which the next item follows from the last one with the probability `strength`."""
    rng = np.random.default_rng(0)
    item = rng.integers(N_ITEMS, size=(N_USERS, LENGTH))
    for at in range(1, LENGTH):
        follows = rng.random(N_USERS) < strength
        item[follows, at] = (item[follows, at - 1] + 7) % N_ITEMS
    when = np.arange(item.size) if times is None else times
    frame = pl.DataFrame({"user": np.repeat(np.arange(N_USERS), LENGTH), "item": item.ravel(), "at": when})
    schema = SCHEMA.model_copy(update={"duplicates": "keep"})
    split = SplitConfig.model_validate({"kind": kind})
    return build_dataset(check(None, None, frame, schema), schema, split)


def run_of(data: Dataset, split: str = "last", **train: Any) -> Run:
    negatives = {"full": True, "mask_positives": False}
    config = settings(loss={"kind": "softmax"}, negatives=negatives, train=TRAIN | train, split={"kind": split})
    done = Trainer(data, config).run()
    return Run(None, config, data, done.model.eval(), done.metrics, done.history)


def named(run: Run, name: str) -> Finding | None:
    return next((f for f in diagnose(run) if f.name == name), None)


@pytest.mark.parametrize(("strength", "severity"), [(0.02, "warning"), (0.3, "ok")])
def test_an_order_that_does_not_exist_is_found(strength: float, severity: str) -> None:
    finding = named(run_of(world(strength), epochs=1), "order")
    assert finding is not None
    assert finding.severity == severity
    assert finding.evidence["pairs"] > 1000
    assert (finding.evidence["lift"] > 1.2) is (severity == "ok")
    out = "set split.kind = 'random', train.history_scope = 'leave_batch_out' and schema.features.0.pooling = 'mean'"
    assert (out in finding.text) is (severity == "warning")


def test_many_rows_of_one_time_are_found_where_the_split_takes_the_last() -> None:
    tied = world(1.0, np.repeat(np.arange(N_USERS * LENGTH // 6), 6))
    of_means = replace(
        tied, schema=tied.schema.model_copy(update={"features": (Sequence(name="met", side="user"), FEATURES[1])})
    )
    run = run_of(of_means, history_scope="leave_batch_out", epochs=1)
    finding = named(run, "order")
    assert finding is not None
    ties = f"{finding.evidence['ties']:.0%} of the adjacent interactions of a user"
    said = f"split.kind = 'last' needs an order, and {ties} have equal times"
    assert said in finding.text
    assert finding.evidence["ties"] > 0.7
    by_time = replace(run, config=run.config.model_copy(update={"split": SplitConfig(kind="time")}))
    assert named(by_time, "order") is None


def test_the_causes_of_a_poor_ranking_come_in_their_order() -> None:
    run = run_of(world(0.0))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    rising = [{**h, "validation.ndcg@5": 0.1 * h["epoch"]} for h in run.history]
    finding = named(replace(run, history=rising), "baseline")
    assert finding is not None
    assert finding.severity != "ok"
    causes = finding.text.partition("Likely causes, most likely first: ")[2].split("; ")
    assert causes[0].startswith("an order that the log does not have (set train.history_scope = 'leave_batch_out' and")
    assert causes[1] == "too few epochs, as the last is the best (raise train.epochs, now 2)"
    assert causes[2].startswith("steps too few or too small (set train.batch_size = 0 (256 makes 12 steps an epoch)")
    falling = [{**h, "validation.ndcg@5": 1 / h["epoch"]} for h in run.history]
    finding = named(replace(run, history=falling), "baseline")
    assert finding is not None
    assert "too few epochs" not in finding.text


def of_start(regularization: float) -> Run:
    """A run of a closed form alone, on a log of tastes."""
    data = of_groups(5)
    met = Sequence(name="met", side="user", share_embedding=False, pooling="ridge")
    schema = data.schema.model_copy(update={"features": (met, FEATURES[1])})
    frame = pl.DataFrame({"user": data.pairs.user, "item": data.pairs.item})
    data = build_dataset(check(None, None, frame, schema), schema, SplitConfig())
    pair = {"user": {"fields": ["met"], "layers": []}, "item": {"fields": ["item"], "layers": []}}
    config = settings(
        model={"width": 64, "similarity": "dot", "temperature": 1.0, "bias": False, "pairs": [pair]},
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={
            "epochs": 0,
            "monitor": "validation.ndcg@5",
            "solved": [{"kind": "ials", "unobserved": [0.3], "regularization": [regularization]}],
        },
    )
    done = Trainer(data, config).run()
    return Run(None, config, data, done.model.eval(), done.metrics, done.history)


def test_small_scores_and_few_directions_of_a_closed_form_are_no_collapse() -> None:
    finding = named(of_start(0.14), "collapse")
    assert finding is not None
    assert 1e-6 < finding.evidence["logit_spread"] < 0.05, "of logits an error"
    assert finding.evidence["user_rank"] < 0.1 * 64, "of a trained model a warning"
    assert finding.severity == "ok"


def test_a_closed_form_of_zeros_is_a_collapse() -> None:
    run = of_start(0.02)
    with torch.no_grad():
        for parameter in run.model.towers("item")[0].parameters():
            parameter.zero_()
    finding = named(run, "collapse")
    assert finding is not None
    assert finding.severity == "error"
    assert finding.text.startswith("All items have nearly the same score")
    assert "scorers alone make the vectors: give other or several values" in finding.text


def test_a_closed_form_that_is_worse_than_popularity_is_told_of_its_start_and_not_of_steps() -> None:
    run = of_start(0.02)
    with torch.no_grad():
        for parameter in run.model.towers("item")[0].parameters():
            parameter.neg_()
    finding = named(run, "baseline")
    assert finding is not None
    assert finding.severity == "error"
    assert "train.lr" not in finding.text
    assert "No epoch is trained, so scorers alone make the vectors" in finding.text
    assert "The median user has 6 training positives" in finding.text


@pytest.mark.parametrize("name", ["collaborative"])
def test_nobody_is_told_to_change_what_a_recipe_has(name: str) -> None:
    """`suggest` writes these values; of others the finding names the option."""
    _, recipe = parse_config(read_recipe(name))
    run = of_start(0.02)
    with torch.no_grad():
        for parameter in run.model.towers("item")[0].parameters():
            parameter.zero_()
    chosen = run.config.train.model_copy(update={"solved": recipe.train.solved})
    chosen = chosen.model_copy(
        update={key: getattr(recipe.train, key) for key in ("epochs", "lr", "optimizer", "schedule")}
    )
    as_written = run.config.model_copy(update={"train": chosen, "loss": recipe.loss})
    other = chosen.model_copy(update={"lr": 0.5})
    for config, is_recipe in ((as_written, True), (as_written.model_copy(update={"train": other}), False)):
        finding = named(replace(run, config=config), "collapse")
        assert finding is not None
        assert finding.severity == "error"
        assert ("These are the settings of a recipe: train another one" in finding.text) == is_recipe
        assert bool(re.search(r"lower train.lr|give other or several values", finding.text)) == (not is_recipe)
        curve = zip((0.3, 0.2, 0.1), (0.2, 0.15, 0.1), strict=True)  # the loss falls, and so does the metric
        history = [
            {"epoch": n + 1.0, "train.loss": loss, config.train.monitor: value} for n, (loss, value) in enumerate(curve)
        ]
        early = named(replace(run, config=config, history=history), "peaks_early")
        assert early is not None
        assert ("lower train.lr" in early.text) == (not is_recipe)


def of_groups(groups: int, seed: int = 0) -> Dataset:
    """A log of users who take items of their own group only, out of `groups`, and a few others."""
    rng = np.random.default_rng(seed)
    n_users, n_items = 600, 20 * groups
    user = np.repeat(np.arange(n_users), 10)
    item = np.where(
        rng.random(len(user)) < 0.9, user % groups + groups * rng.integers(20, size=len(user)),
        rng.integers(n_items, size=len(user))
    )  # fmt: skip
    schema = Schema(user_id="user", item_id="item", features=(Categorical(name="user", side="user"), FEATURES[1]))
    return build_dataset(check(None, None, pl.DataFrame({"user": user, "item": item}), schema), schema, SplitConfig())
