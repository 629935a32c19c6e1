"""Closed forms of pairs: strengths that are best by the pair alone, what a mix adds of them, interruption and resume,
and values solved again on all of train. The search itself is tested with the starts, the weights in test_mix.py."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closed_form_worlds import COLUMN, GROUPS, ITEMS, courses, groups
from worlds import settings

from twotower import api
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.diagnostics import diagnose
from twotower.errors import ConfigError, Interrupted
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.train.closed_forms import MAX_SCORES, MIN_USERS, evaluation_of_search
from twotower.train.factors import factors_before
from twotower.train.progress import Callback, EpochRecord
from twotower.train.trainer import Trainer

PAIRS = {"trained": ("two", 1), "ials": ("one", 8), "ease": ("two", ITEMS)}
"""History and width of a pair of `groups` by its kind."""
VALUES: dict[str, dict[str, Any]] = {
    "ials": {"unobserved": [0.3], "regularization": [0.001]},
    "ease": {"regularization": [400.0]},
}


def config(*kinds: str, pairs: str = "together", values: dict[str, Any] | None = None, **train: Any) -> Config:
    """Pairs that are trained, and closed forms after them; these alone have no epochs."""
    epochs = 3 if "trained" in kinds else 0
    forms = [
        {"kind": kind, "width": PAIRS[kind][1]} | VALUES[kind] | (values or {}) for kind in kinds if kind != "trained"
    ]
    towers = [
        {
            "user": {"fields": [history], "layers": [], "width": width},
            "item": {"fields": ["item_id"], "layers": [], "width": width},
        }
        for history, width in (PAIRS[kind] for kind in kinds)
    ]
    return settings(
        model={"similarity": "dot", "bias": False, "temperature": 1.0, "pairs": towers},
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        split={"kind": "column", "column": "part"},
        train={
            "epochs": epochs, "lr": 0.05, "batch_size": 64, "pairs": pairs, "solved": forms, "device": "cpu",
            "monitor": "validation.ndcg@5",
        } | train,
    )  # fmt: skip


APART = config("trained", "trained", "ials", pairs="apart")


def scores(found: Factors, part: slice) -> torch.Tensor:
    return found.users[:, part] @ found.items[:, part].T


def items_of(trainer: Trainer) -> torch.Tensor:
    return trainer.model.item_vectors(trainer.objective.items.take(np.arange(len(trainer.dataset.items))))


def single(n: int = 60) -> Dataset:
    """Users with one positive in each part, of whom EASE learns nothing."""
    parts = ("train", "validation", "test")
    rows = [(user, (user + place) % 6, part) for user in range(n) for place, part in enumerate(parts)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "part"], orient="row")
    return build_dataset(check(None, None, frame, GROUPS), GROUPS, COLUMN)


def test_strengths_are_those_that_are_best_by_the_pair_alone() -> None:
    data, chosen = groups(), list[str]()
    for kinds in (("ease",), ("trained", "ease")):
        trainer = Trainer(data, config(*kinds, values={"regularization": [0.5, 50.0, 50_000.0]}))
        trainer.run()
        chosen.append(trainer.solved[0][0].start.describe())
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("given", [[0.001], [0.001, 0.01]])
def test_a_metric_that_cannot_be_measured_is_named(given: list[float]) -> None:
    parts = ("train", "train", "train", "validation", "test")
    rows = [
        (user, (user + n) % 6, int(part != "validation"), part) for user in range(30) for n, part in enumerate(parts)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "liked", "part"], orient="row")
    histories = (f.model_copy(update={"interactions": "positive"}) for f in GROUPS.features[:2])
    schema = GROUPS.model_copy(update={"label": "liked", "features": (*histories, GROUPS.features[2])})
    data = build_dataset(check(None, None, frame, schema), schema, COLUMN)
    with pytest.raises(ConfigError, match=r"validation\.ndcg@5"):
        Trainer(data, config("ials", values={"regularization": given})).run()


@pytest.mark.parametrize("kinds", [("trained", "ials"), ("trained", "trained", "ials")])
def test_a_pair_has_its_weighted_values_and_the_others_are_trained_as_without_it(kinds: tuple[str, ...]) -> None:
    data, place, pairs = groups(), kinds.index("ials"), "together" if len(kinds) == 2 else "apart"
    trainer = Trainer(data, config(*kinds, pairs=pairs))
    done = trainer.run()
    ((_, weight),) = trainer.solved
    assert weight > 0
    found, alone = (
        factors_before(model.eval(), data, VALIDATION)
        for model in (done.model, Trainer(data, config("ials")).run().model)
    )
    own = done.model.parts_of_pairs()[place]
    torch.testing.assert_close(scores(found, own), weight * scores(alone, slice(None)), rtol=1e-3, atol=1e-3)
    without = Trainer(data, config(*kinds[:-1], pairs=pairs)).run()  # which draws the same numbers
    for mine, theirs in zip(done.history, without.history, strict=True):
        assert mine["validation.ndcg@5"] == theirs["validation.ndcg@5"]
        assert mine["train.loss"] == theirs["train.loss"]
    others = factors_before(without.model.eval(), data, VALIDATION)
    assert torch.equal(found.items[:, : own.start], others.items)


def test_metrics_of_validation_are_of_the_model_with_the_closed_form() -> None:
    data = groups()
    run = api.fit(data, data.schema, config("trained", "ials"))
    last = max(epoch["validation.ndcg@5"] for epoch in run.history)
    assert run.metrics["validation.ndcg@5"] > last
    found = evaluate_part(run.factors_during(VALIDATION), run.dataset, VALIDATION, run.config.evaluation)
    assert run.metrics["validation.ndcg@5"] == found["ndcg@5"]


def interrupted_at(text: str, data: Dataset, chosen: Config, folder: Path) -> None:
    """Train into a folder, and send SIGINT when a line with this text is logged."""

    class Press(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                os.kill(os.getpid(), signal.SIGINT)

    logger = logging.getLogger("twotower")
    logger.setLevel(logging.INFO)
    logger.addHandler(press := Press(logging.INFO))
    try:
        with pytest.raises(Interrupted, match=r"stopped after the last step; a checkpoint is written; go on: `fit"):
            api.fit(data, data.schema, chosen, folder=folder)
    finally:
        logger.removeHandler(press)
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("text", ["pair 2 by ials: ", "mix, in standard deviations"])
def test_fault_B2_a_signal_ends_the_closed_forms_after_the_last_epoch_and_a_later_call_goes_on(
    text: str, tmp_path: Path
) -> None:
    data = groups()
    interrupted_at(text, data, APART, tmp_path / "run")
    stopped = api.load(tmp_path / "run")
    assert stopped.unfinished.endswith("; the mix weights pair 2 after the last")
    assert not any("has no effect" in finding.text for finding in diagnose(stopped))
    again = api.fit(data, data.schema, APART, folder=tmp_path / "run", resume=True)
    once = api.fit(data, data.schema, APART)
    for (name, mine), theirs in zip(again.model.named_parameters(), once.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_what_is_fitted_afterwards_sees_the_pair_that_is_solved_last() -> None:
    trainer = Trainer(groups(), APART)
    assert trainer.factors().items.shape[1] == 2
    trainer.run()
    assert trainer.factors().items.shape[1] == 2 + 8


def test_a_signal_during_the_last_validation_solves_no_closed_form() -> None:
    class Press(Callback):
        def on_epoch_end(self, history: list[EpochRecord]) -> None:
            if len(history) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(groups(), APART, callback=Press())
    with pytest.raises(Interrupted, match="stopped after the last step; no checkpoint is written"):
        trainer.run()
    assert not items_of(trainer)[:, 2:].any()


def test_a_pair_for_which_nothing_can_be_solved_costs_no_training(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(single(), config("trained", "trained", "ease", pairs="apart"))
    trainer.run()
    items = items_of(trainer)
    assert items[:, :2].any()
    assert not items[:, 2:].any()
    (told,) = [record for record in caplog.records if "finds no user of two positive items" in record.getMessage()]
    assert told.levelno == logging.WARNING


def by_columns(*kinds: str, **model: Any) -> Config:
    """`slit`, and the columns of the next item, of `courses`."""
    towers = {
        "slit": {
            "user": {"fields": ["one"], "layers": [], "width": 2},
            "item": {"fields": ["item_id"], "layers": [], "width": 2},
        },
        "columns": {
            "user": {"fields": ["two"], "layers": [], "width": 20},
            "item": {
                "fields": ["stage", "size"], "layers": [], "join": "sum", "activation": "Identity", "width": 40,
            },
        },
    }  # fmt: skip
    kinds = kinds or ("slit", "columns")
    values = {"slit": {"regularization": [10.0]}, "columns": {}}
    return settings(
        model={"similarity": "dot", "bias": False, "temperature": 1.0, "pairs": [towers[kind] for kind in kinds]}
        | model,
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        train={
            "epochs": 0, "solved": [{"kind": kind} | values[kind] for kind in kinds],
            "monitor": "validation.ndcg@5", "device": "cpu", "history_scope": "causal",
        },
    )  # fmt: skip


def test_columns_that_tell_what_comes_next_find_more() -> None:
    data, found = courses(300), list[float]()
    for chosen in (by_columns("slit"), by_columns()):
        trainer = Trainer(data, chosen)
        model = trainer.run().model
        found.append(
            evaluate_part(factors_before(model, data, TEST), data, TEST, EvaluationConfig(k=(5,), bootstrap=0))[
                "ndcg@5"
            ]
        )
    assert found[1] > 1.2 * found[0]


@pytest.mark.parametrize("values", [None, "all"])
def test_columns_that_are_the_same_for_all_items_add_nothing(
    values: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    data = courses(300, stage=values)
    trained = Trainer(data, by_columns()).run()
    assert "finds no column of several values at the items of the positives" in caplog.text
    found = factors_before(trained.model, data, VALIDATION)
    assert found.items[:, :2].any()
    assert not found.items[:, 2:].any()


@pytest.mark.parametrize(
    "kinds", [("slit", "columns"), ("columns", "slit"), ("columns",), ("ials", "ease"), ("trained", "ease")]
)
def test_values_solved_again_from_the_same_rows_are_as_they_were(kinds: tuple[str, ...]) -> None:
    of_columns = "columns" in kinds
    data = courses(300) if of_columns else groups()
    trainer = Trainer(data, by_columns(*kinds, bias=True) if of_columns else config(*kinds))
    before = {name: weight.clone() for name, weight in trainer.run().model.state_dict().items()}
    for form, weight in trainer.solved:
        trainer._closed_forms.solve_again(form, data, weight)
    for name, found in trainer.model.state_dict().items():
        torch.testing.assert_close(found, before[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kinds", [("ials", "ease"), ("trained", "ease")])
def test_what_validation_chooses_is_solved_again_on_all_of_train(
    kinds: tuple[str, str], messages: list[str], tmp_path: Path
) -> None:
    """The closed forms are those of a split without validation by the chosen values; the metrics of validation are of
    before."""
    whole, data = (groups(share, validates=False, users=400, zipf=1.0) for share in (0.0, 0.1))
    assert (len(data.train) + len(data.validation), len(whole.validation)) == (len(whole.train), 0)
    chosen = config(*kinds)
    done = Trainer(data, chosen).run()
    assert (
        f"closed forms are solved again on all {len(whole.train):,} training rows, with the chosen values and weights"
        in messages
    )
    found = factors_before(done.model.eval(), data, TEST)
    again = evaluate_part(found, data, VALIDATION, EvaluationConfig(k=(5,), bootstrap=0))["ndcg@5"]
    before = done.metrics["validation.ndcg@5"]
    # `ials` has the rows of validation itself now; the row of an item in EASE never holds the item.
    assert again > before if kinds[0] == "ials" else again != before
    run = api.fit(data, data.schema, chosen.model_copy(update={"split": COLUMN}), folder=tmp_path / "run")
    assert run.config.split.from_train == "random"
    assert run.metrics["validation.ndcg@5"] == before
    assert api.evaluate(api.load(tmp_path / "run")) == {n: v for n, v in run.metrics.items() if "train." not in n}
    for kind, part in zip(kinds, done.model.parts_of_pairs(), strict=True):
        if kind == "trained":
            continue
        alone = Trainer(whole, config(kind)).run().model
        solved = scores(factors_before(alone.eval(), whole, TEST), slice(None)).double().ravel()
        own = scores(found, part).double().ravel()
        factor = float(own @ solved / (solved @ solved))
        assert factor > 0
        torch.testing.assert_close(own, factor * solved, rtol=0, atol=2e-3 * float(own.abs().max()))


@pytest.mark.parametrize(
    ("own", "n_items", "users"),
    [
        (0, 1000, MAX_SCORES // 1000),
        (50, 1000, 50),
        (0, 2 * MAX_SCORES, MIN_USERS),
        (10**7, 10**6, MAX_SCORES // 10**6),
    ],
)
def test_a_comparison_has_a_bounded_number_of_scores(own: int, n_items: int, users: int) -> None:
    config = EvaluationConfig(max_users=own, k=(7,))
    assert evaluation_of_search(config, n_items) == config.model_copy(update={"max_users": users})
