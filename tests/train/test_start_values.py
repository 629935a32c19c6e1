"""Pairs that are weighed beside those that start before them; the search for a start's own values is tested with the
starts."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from worlds import settings

from twotower import api
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check
from twotower.diagnostics import diagnose
from twotower.errors import ConfigError, Interrupted, TrainingError
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.features.values import UNKNOWN
from twotower.model.pooling.decay import Decay
from twotower.train.factors import factors_before
from twotower.train.part_weights import part_weights
from twotower.train.progress import Callback, EpochRecord
from twotower.train.starts.ials import Ials
from twotower.train.starts.search import search
from twotower.train.starts.start import Start
from twotower.train.trainer import Trainer

ITEMS, GROUP = 60, 3


def log(others: float, validates: bool = True, share: float = 0.0) -> Dataset:
    """Users take two of the three items of each of four groups, and `others` further ones of chance for each of these.
    A `share` of train validates where no part is given."""
    rng, rows = np.random.default_rng(5), list[tuple[int, int]]()
    for user in range(200):
        groups = rng.choice(ITEMS // GROUP, 4, replace=False)
        taken = {int(GROUP * g + i) for g in groups for i in rng.choice(GROUP, 2, replace=False)}
        rows += [(user, item) for item in sorted(taken | {*rng.choice(ITEMS, int(8 * others)).tolist()})]
    part = rng.choice(["train", "validation" if validates else "train", "test"], len(rows), p=[0.7, 0.2, 0.1])
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row").with_columns(part=pl.Series(part))
    history: dict[str, Any] = {"side": "user", "share_embedding": False}
    schema = Schema(
        features=(
            Sequence(name="one", pooling={"kind": "ridge", "steps": 30}, **history),
            Sequence(name="two", pooling="sum", **history),
            Categorical(name="item_id", side="item"),
        )
    )
    return build_dataset(
        check(None, None, frame, schema),
        schema,
        SplitConfig(kind="column", column="part", validation=0.1 if validates else share),
    )


def config(blend: list[float] | None, bias: bool = True, **second: Any) -> Config:
    """`ials` of few directions, and `ease` of all."""
    item = {"fields": ["item_id"], "layers": []}
    pairs = [
        {"user": {"fields": ["one"], "layers": []}, "item": item},
        {"user": {"fields": ["two"], "layers": [], "width": ITEMS}, "item": item | {"width": ITEMS}},
    ]
    starts: list[dict[str, Any]] = [
        {"kind": "ials", "popularity": [2.0 if bias else 0.0]},
        {"kind": "ease", "pair": 1} | second,
    ]
    if blend is not None:
        starts[1]["blend"] = blend
    return settings(
        model={"width": 2, "similarity": "dot", "bias": bias, "temperature": 1.0, "pairs": pairs},
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        train={"epochs": 0, "start": starts, "monitor": "validation.ndcg@5", "device": "cpu"},
    )


def scores(data: Dataset, chosen: Config) -> np.ndarray:
    """The scores of all users and items, without a bias of the users, which no ranking sees."""
    found: Factors = factors_before(Trainer(data, chosen).run().model.eval(), data, VALIDATION)
    if chosen.model.bias:
        found.users[:, -2] = 0
    return (found.users @ found.items.T).double().numpy()


@pytest.mark.parametrize("bias", [False, True])
def test_at_one_both_have_the_same_root_mean_square(bias: bool) -> None:
    data = log(1.0)
    alone, once, half = (scores(data, config([weight], bias)) for weight in (0.0, 1.0, 0.5))
    own = scores(data, config(None, bias)) - alone  # of the scale 1
    beside = once - alone
    assert math.sqrt((beside**2).mean()) == pytest.approx(math.sqrt((alone**2).mean()), rel=1e-3)
    np.testing.assert_allclose(half - alone, beside / 2, atol=1e-4)
    np.testing.assert_allclose(beside * math.sqrt((own**2).mean() / (beside**2).mean()), own, atol=1e-3)


def test_the_weight_that_is_best_on_validation_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    data, given = log(1.0), [0.0, 0.1, 1.0, 10.0]
    each = {}
    for weight in given:
        one = Trainer(data, config([weight]))
        one.run()
        each[weight] = one.best.score
    with caplog.at_level(logging.INFO, "twotower"):
        trainer = Trainer(data, config(given))
        trainer.run()
    assert each[0.0] < max(each.values()) <= trainer.best.score + 1e-9
    asked = [line.split("blend = ")[1].split(": ") for line in caplog.messages if "added to those before it" in line]
    tried = {float(weight): float(metric.split(" = ")[1]) for weight, metric in asked}
    assert [*tried][: len(given)] == given, "then those beside the best"
    assert len(tried) > len(given)
    assert {w: tried[w] for w in given} == {w: pytest.approx(score, abs=1e-4) for w, score in each.items()}
    (last,) = [line for line in caplog.messages if line.startswith("start of pair 1 by ease: ") and "blend" in line]
    assert last.endswith(f", blend = {max(tried, key=lambda w: tried[w]):g}")


def test_a_pair_that_only_disturbs_adds_nothing() -> None:
    class Disturbed(Trainer):
        """A trainer whose metric falls with all that is added to the first pair."""

        def _validation_metrics(self, scorer: Any, config: Any = None) -> dict[str, float]:
            return {"validation.ndcg@5": 1 / (1 + float(scorer.items.norm()))}

    data = log(0.0)
    trainer = Disturbed(data, config([0.0, 1.0]))
    trainer.run()
    found = trainer.model.item_vectors(trainer.objective.items.take(np.arange(ITEMS)))
    assert not found[:, 2:-2].any()


def changed(first: dict[str, Any], second: dict[str, Any]) -> Config:
    """The config with other options of both starts."""
    sections = config([1.0]).model_dump(mode="json")
    starts = sections["train"]["start"]
    sections["train"]["start"] = [starts[0] | first, starts[1] | second]
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({}, {"scale": 2.0}, "has scale = 2 and blend, which chooses the factor; leave out one of them"),
        ({}, {"blend": [1001.0]}, "1001"),
        ({"blend": [1.0]}, {}, "has blend, a weight of its pair, and popularity, which belongs to all pairs"),
        (
            {"blend": [1.0], "popularity": [0.0]},
            {},
            "has blend, a weight against earlier starts, and is the first start before the first step; leave it out",
        ),
    ],
)
def test_what_blend_does_not_go_with_is_told(first: dict[str, Any], second: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        changed(first, second)


def single(n: int = 30) -> Dataset:
    """Users with one positive in each part, of whom EASE learns nothing."""
    rows = [
        (user, (user + place) % 6, part)
        for user in range(n)
        for place, part in enumerate(("train", "validation", "test"))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "part"], orient="row")
    schema = log(0.0).schema
    return build_dataset(check(None, None, frame, schema), schema, SplitConfig(kind="column", column="part"))


def test_a_pair_for_which_nothing_can_be_solved_adds_nothing_if_it_may(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingError, match="finds no user of two positive items"):
        Trainer(single(), config([0.5, 1.0])).run()
    with caplog.at_level(logging.INFO, "twotower"):
        trainer = Trainer(single(), config([0.0, 1.0]))
        trainer.run()
    items = trainer.model.item_vectors(trainer.objective.items.take(np.arange(6)))
    assert not items[:, 2:-2].any()
    assert any("finds no user of two positive items" in line for line in caplog.messages)
    assert "blend = 0 (it adds nothing" in caplog.messages[-2]


def test_a_metric_that_cannot_be_measured_is_told() -> None:
    parts = ("train", "train", "train", "validation", "test")
    rows = [
        (user, (user + n) % 6, int(part != "validation"), part) for user in range(30) for n, part in enumerate(parts)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "liked", "part"], orient="row")
    schema = log(0.0).schema
    histories = (f.model_copy(update={"interactions": "positive"}) for f in schema.features[:2])
    schema = schema.model_copy(update={"label": "liked", "features": (*histories, schema.features[2])})
    data = build_dataset(check(None, None, frame, schema), schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(ConfigError, match=r"validation\.ndcg@5"):
        Trainer(data, config([0.0, 1.0])).run()


def test_several_weights_need_a_validation_part() -> None:
    with pytest.raises(ConfigError, match="chooses among several values of blend on the validation part"):
        Trainer(log(1.0, validates=False), config([0.0, 1.0]))
    Trainer(log(1.0, validates=False), config([0.5])).run()


def beside_trained(pairs: str, place: int, blend: list[float] | None, epochs: int = 3, **train: Any) -> Config:
    """One or two pairs that are trained, and with `blend` a pair number `place` that starts by `ials` and is weighed
    after the last epoch."""
    item = {"fields": ["item_id"], "layers": []}
    trained = {"user": {"fields": ["two"], "layers": [], "width": 1}, "item": item | {"width": 1}}
    others = [trained] * (1 if pairs == "together" else 2)
    starts = list[dict[str, Any]]()
    if blend is not None:
        others.insert(place, {"user": {"fields": ["one"], "layers": []}, "item": item})
        starts.append({"kind": "ials", "pair": place, "learn": False, "blend": blend, "regularization": [0.001]})
    return settings(
        model={"width": 8, "similarity": "dot", "bias": pairs == "together", "temperature": 1.0, "pairs": others},
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        split={"kind": "column", "column": "part"},
        train={
            "epochs": epochs,
            "lr": 0.05,
            "batch_size": 64,
            "pairs": pairs,
            "start": starts,
            "monitor": "validation.ndcg@5",
        }
        | {"device": "cpu"}
        | train,
    )


def chosen_alone() -> Config:
    """The pair that is weighed last, as if it were alone."""
    alone = config(None, bias=False).model_dump(mode="json")
    alone["model"] |= {
        "width": 8,
        "pairs": [{"user": {"fields": ["one"], "layers": []}, "item": {"fields": ["item_id"], "layers": []}}],
    }
    alone["train"]["start"] = [{"kind": "ials", "regularization": [0.001]}]
    return Config.model_validate(alone)


def solved(data: Dataset) -> np.ndarray:
    """The scores of the pair that is weighed last, as if it were alone."""
    return scores(data, chosen_alone())


@pytest.mark.parametrize(("pairs", "place"), [("together", 0), ("together", 1), ("apart", 0), ("apart", 2)])
def test_a_pair_beside_trained_ones_is_weighed_after_the_last_epoch(
    pairs: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    data, given = log(1.0), [0.0, 0.3, 1.0]
    trained, once = (scores(data, beside_trained(pairs, place, [weight])) for weight in (0.0, 1.0))
    own, beside = solved(data), once - trained
    assert math.sqrt((beside**2).mean()) == pytest.approx(math.sqrt((trained**2).mean()), rel=1e-3)
    np.testing.assert_allclose(beside * math.sqrt((own**2).mean() / (beside**2).mean()), own, atol=2e-3)
    with caplog.at_level(logging.INFO, "twotower"):
        trainer = Trainer(data, beside_trained(pairs, place, given))
        done = trainer.run()
    asked = [line.split("blend = ")[1].split(": ") for line in caplog.messages if "added to the trained ones" in line]
    tried = {float(weight): float(metric.split(" = ")[1]) for weight, metric in asked}
    assert [*tried][: len(given)] == given
    assert tried[0.0] == pytest.approx(trainer.best.score, abs=1e-4)
    best = max(tried, key=lambda w: tried[w])
    assert tried[best] > tried[0.0]
    assert f", blend = {best:g}" in "".join(caplog.messages)
    found: Factors = factors_before(done.model.eval(), data, VALIDATION)
    if pairs == "together":
        found.users[:, -2] = 0
    final = (found.users @ found.items.T).double().numpy()
    np.testing.assert_allclose(final - trained, beside * best, atol=1e-3)
    if place:  # the others begin by the numbers that they would draw without it
        without = Trainer(data, beside_trained(pairs, place, None)).run()
        for mine, theirs in zip(done.history, without.history, strict=True):
            assert mine["validation.ndcg@5"] == theirs["validation.ndcg@5"]
            assert mine["train.loss"] == theirs["train.loss"]


def test_a_search_that_is_not_fine_ends_a_round_earlier() -> None:
    tried = list[Ials]()

    def score(start: Start) -> float:
        assert isinstance(start, Ials)
        tried.append(start)
        return -(math.log(start.unobserved[0] / 0.02) ** 2) - math.log(start.regularization[0] / 0.007) ** 2

    given = Ials(unobserved=(0.03, 0.3), regularization=(0.004, 0.032))
    coarse = search(given, score, is_fine=False)
    first = len(tried)
    fine = search(given, score)
    assert len(tried) - first > first
    assert score(given.alternatives()[0]) < score(coarse) < score(fine)


def test_metrics_of_validation_are_of_the_model_with_what_is_weighed_last() -> None:
    data = log(1.0)
    run = api.fit(data, data.schema, beside_trained("together", 1, [0.0, 0.3, 1.0]))
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

    told = logging.getLogger("twotower")
    told.setLevel(logging.INFO)
    told.addHandler(press := Press(logging.INFO))
    try:
        with pytest.raises(Interrupted, match=r"stopped after the last step; a checkpoint is written; go on: `fit"):
            api.fit(data, data.schema, chosen, folder=folder)
    finally:
        told.removeHandler(press)
        told.setLevel(logging.NOTSET)


@pytest.mark.parametrize(("text", "blend"), [("blend = 0.3: ", [0.0, 0.3, 1.0]), ("by ials: ", [1.0])])
def test_fault_B2_a_signal_ends_the_weighing_after_the_last_epoch_and_a_later_call_goes_on(
    text: str, blend: list[float], tmp_path: Path
) -> None:
    data, of = log(1.0), beside_trained("apart", 2, blend)
    interrupted_at(text, data, of, tmp_path / "run")
    stopped = api.load(tmp_path / "run")
    assert stopped.unfinished.endswith("; train.start weighs pair 2 after the last")
    assert not any("has no effect" in finding.text for finding in diagnose(stopped))
    again = api.fit(data, data.schema, of, folder=tmp_path / "run", resume=True)
    once = api.fit(data, data.schema, of)
    for (name, mine), theirs in zip(again.model.named_parameters(), once.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    "changed",
    [{"start": {"blend": [], "scale": 0.5}}, {"start": {"blend": [], "learn": True}, "epochs": 4}],
)
def test_a_checkpoint_of_a_pair_that_is_weighed_last_is_none_of_one_that_starts_first(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    data, of = log(1.0), beside_trained("apart", 2, [1.0])
    interrupted_at("by ials: ", data, of, tmp_path / "run")
    sections = of.model_dump(mode="json")
    sections["train"]["start"][0] |= changed["start"]
    sections["train"]["epochs"] = changed.get("epochs", 3)
    told = "the checkpoint is of a training that gives them after the last; leave its blend"
    with pytest.raises(TrainingError, match=told):
        api.fit(data, data.schema, Config.model_validate(sections), folder=tmp_path / "run", resume=True, override=True)


def test_what_is_fitted_afterwards_sees_the_pair_that_is_weighed_last() -> None:
    trainer = Trainer(log(1.0), beside_trained("apart", 2, [1.0]))
    assert trainer.factors().items.shape[1] == 2
    trainer.run()
    assert trainer.factors().items.shape[1] == 2 + 8


def test_a_signal_during_the_last_validation_starts_no_weighing() -> None:
    class Press(Callback):
        def on_epoch_end(self, history: list[EpochRecord]) -> None:
            if len(history) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(log(1.0), beside_trained("apart", 2, [0.0, 1.0]), callback=Press())
    with pytest.raises(Interrupted, match="stopped after the last step; no checkpoint is written"):
        trainer.run()
    assert not trainer.model.item_vectors(trainer.objective.items.take(np.arange(ITEMS)))[:, 2:].any()


def test_a_pair_for_which_nothing_can_be_solved_costs_no_training(caplog: pytest.LogCaptureFixture) -> None:
    of = beside_trained("apart", 2, [1.0]).model_dump(mode="json")
    of["model"]["pairs"][2] = {"user": {"fields": ["two"], "layers": []}, "item": {"fields": ["item_id"], "layers": []}}
    of["train"]["start"] = [{"kind": "ease", "pair": 2, "learn": False, "blend": [1.0]}]
    trainer = Trainer(single(), Config.model_validate(of))
    trainer.run()
    items = trainer.model.item_vectors(trainer.objective.items.take(np.arange(6)))
    assert items[:, :2].any()
    assert not items[:, 2:].any()
    (told,) = [record for record in caplog.records if "finds no user of two positive items" in record.getMessage()]
    assert told.levelno == logging.WARNING


def test_the_unit_is_of_what_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """A bias of the users, which a loss of labels trains, is in every score of theirs."""
    data = log(1.0)
    sections = beside_trained("together", 1, [1.0]).model_dump(mode="json")
    sections |= {"loss": {"kind": "bce"}, "negatives": {"random": 3}}
    with caplog.at_level(logging.WARNING, "twotower"):
        trainer = Trainer(data, Config.model_validate(sections))
    assert (
        "the weight of train.start (blend) is fitted to validation.ndcg@5: the logits are no longer log-odds"
        in caplog.text
    )
    found: Factors = factors_before(trainer.run().model.eval(), data, VALIDATION)
    own, others = trainer.model.parts_of_pairs()[1], torch.ones(found.users.shape[1], dtype=torch.bool)
    others[own] = False
    assert found.users[:, -2].abs().max() > 0.05
    others[-2] = False
    mine, theirs = (found.users[:, of] @ found.items[:, of].T for of in (own, others))
    assert float(mine.square().mean()) == pytest.approx(float(theirs.square().mean()), rel=1e-3)


def test_what_is_weighed_last_needs_a_score_that_no_context_changes() -> None:
    data = log(1.0)
    rows = [
        (user, (user + n) % 6, n, part)
        for user in range(9)
        for n, part in enumerate(("train", "train", "validation", "test"))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "hour", "part"], orient="row")
    schema = data.schema.model_copy(
        update={"features": (*data.schema.features, Categorical(name="hour", side="context"))}
    )
    with_context = build_dataset(check(None, None, frame, schema), schema, SplitConfig(kind="column", column="part"))
    with pytest.raises(
        ConfigError, match="a weight relative to trained pairs, and their vectors depend on the context; give scale"
    ):
        Trainer(with_context, beside_trained("apart", 2, [1.0]))


def test_a_first_blend_that_learns_names_the_way_out() -> None:
    sections = beside_trained("apart", 2, [1.0]).model_dump(mode="json")
    sections["train"]["start"][0]["learn"] = True
    with pytest.raises(ValueError, match="or set learn = false, which weights it against the trained pairs"):
        Config.model_validate(sections)


def courses(users: int, stage: str | None = "by number") -> Dataset:
    """Users take a course of each of six stages in turn; sizes tell nothing. Both columns may have one value, or
    none."""
    told = stage == "by number"
    rng, rows = np.random.default_rng(7), list[tuple[int, int, int]]()
    stages, sizes = np.arange(ITEMS) % 6, rng.permutation(ITEMS) % 4
    for user in range(users):
        first = int(rng.integers(6))
        rows += [(user, int(rng.choice(np.flatnonzero(stages == (first + place) % 6))), place) for place in range(6)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "t"], orient="row")
    columns = {"stage": [f"s{n}" for n in stages], "size": [f"z{n}" for n in sizes]}
    items = pl.DataFrame({"item_id": range(ITEMS), **columns} if told else {"item_id": range(ITEMS)})
    if not told:
        items = items.with_columns(pl.lit(stage, pl.String).alias(name) for name in columns)
    history: dict[str, Any] = {"side": "user", "share_embedding": False}
    schema = Schema(
        features=(
            Sequence(name="one", pooling={"kind": "decay", "rates": [0.5]}, **history),
            Sequence(name="two", pooling={"kind": "decay", "rates": [0.0, 1.0]}, **history),
            *(Categorical(name=name, side="item") for name in ("item_id", "stage", "size")),
        ),
        time="t",
        time_unit="order",
    )
    return build_dataset(check(None, items, frame, schema), schema, SplitConfig(kind="last"))


def by_columns(blend: list[float]) -> Config:
    """`slit`, and beside it the columns of the next item."""
    columns = {"fields": ["stage", "size"], "layers": [], "join": "sum", "activation": "Identity", "width": 40}
    pairs = [
        {"user": {"fields": ["one"], "layers": []}, "item": {"fields": ["item_id"], "layers": []}},
        {"user": {"fields": ["two"], "layers": [], "width": 20}, "item": columns},
    ]
    starts = [
        {"kind": "slit", "regularization": [10.0]},
        {"kind": "next_content", "pair": 1, "blend": blend},
    ]
    return settings(
        model={"width": 2, "similarity": "dot", "bias": False, "temperature": 1.0, "pairs": pairs},
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        train={
            "epochs": 0, "start": starts, "monitor": "validation.ndcg@5", "device": "cpu", "history_scope": "causal",
        },
    )  # fmt: skip


def test_columns_that_tell_what_comes_next_weigh_most_and_find_more(caplog: pytest.LogCaptureFixture) -> None:
    data, found = courses(300), []
    for blend in ([0.0], [0.0, 1.0]):
        with caplog.at_level(logging.INFO, "twotower"):
            trained = Trainer(data, by_columns(blend)).run()
        found.append(evaluate_part(factors_before(trained.model, data, TEST), data, TEST, EvaluationConfig(k=[5])))
    (told,) = {line for line in caplog.messages if "weighed by validation" in line}
    spreads = re.findall(r"(\w+ \(rate \d\)) (-?\d+\.\d\d)", told.rpartition(": ")[2])
    assert [name for name, _ in spreads] == [f"{name} (rate {rate})" for name in ("stage", "size") for rate in (0, 1)]
    assert float(spreads[0][1]) > 4 * max(abs(float(text)) for _, text in spreads[2:])
    before, after = (one["ndcg@5"] for one in found)
    assert after > 1.2 * before


def test_few_rows_of_validation_leave_all_columns_one_weight(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "twotower"):
        trained = Trainer(courses(40), by_columns([1.0])).run()
    assert not any("weighed by validation" in line for line in caplog.messages)
    assert any("its columns weigh alike, as validation does not tell" in line for line in caplog.messages)
    found = factors_before(trained.model, courses(40), VALIDATION)
    slit, columns = (found.users[:, part] @ found.items[:, part].T for part in (slice(0, 2), slice(2, None)))
    assert float(columns.square().mean() / slit.square().mean()) == pytest.approx(1.0, rel=1e-3)


def with_equal_values(solved: Factors, data: Dataset, chosen: Config) -> Factors:
    """The vectors, and beside them those of the last pair by the map of equal values alone."""
    start = chosen.train.start[1]
    values = start.solve(start.positives(data, chosen.model), Decay(rates=(0.0, 1.0)), 20, 1)
    codes = [torch.from_numpy(np.asarray(data.items.columns[name])).long() for name in ("stage", "size")]
    rows = [table.clone() for table in values.alternative]
    for table in rows:
        table[UNKNOWN] = 0.0
    items = sum(table[code] for table, code in zip(rows, codes, strict=True))
    assert isinstance(items, torch.Tensor)
    return replace(
        solved,
        users=torch.cat([solved.users, solved.users[:, 2:42]], 1),
        items=torch.cat([solved.items, items], 1),
    )


def test_one_is_the_sum_of_both_maps_of_each_column_and_rate_with_the_factors_that_validation_fits() -> None:
    data, unweighed = courses(300), by_columns([1.0]).model_dump(mode="json")
    del unweighed["train"]["start"][1]["blend"]
    solved, weighed = (
        factors_before(Trainer(data, chosen).run().model, data, VALIDATION)
        for chosen in (Config.model_validate(unweighed), by_columns([1.0]))
    )
    torch.testing.assert_close(weighed.users, solved.users)
    torch.testing.assert_close(weighed.items[:, :2], solved.items[:, :2])
    by_field = {6: slice(0, 6), 4: slice(6, 10)}  # values of stages and sizes, at the first rate
    parts = [
        torch.arange(2 + 20 * rate + own.start, 2 + 20 * rate + own.stop)
        for own in by_field.values()
        for rate in (0, 1)
    ]
    assert all(solved.items[:, part].any(1).all() for part in parts)
    both = with_equal_values(solved, data, by_columns([1.0]))
    equal = [part - 2 + solved.items.shape[1] for part in parts]
    expected = part_weights(both, [*parts, *equal], data, by_columns([1.0]).train.seed)
    assert expected is not None
    assert len({round(factor, 3) for factor in expected.factors}) > len(parts)
    for number, part in enumerate(parts):
        one, other = expected.factors[number], expected.factors[len(parts) + number]
        found = one * both.items[:, part] + other * both.items[:, equal[number]]
        torch.testing.assert_close(weighed.items[:, part], found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_popularity_that_is_fitted_beside_columns_is_a_bias_of_the_items(weight: float) -> None:
    data, found = courses(300), []
    for blend in (None, [weight]):
        sections = by_columns([1.0]).model_dump(mode="json")
        sections["model"]["bias"] = True
        sections["train"]["start"][1]["blend"] = blend or []
        model = Trainer(data, Config.model_validate(sections)).run().model
        found.append((factors_before(model, data, VALIDATION), model.item_bias.rows_of("item_id").detach()[:, 0]))
    (solved, before), (_, after) = found
    assert not before.any()
    counts = np.bincount(data.pairs.item[data.parts == TRAIN], minlength=len(data.items))
    popular = torch.from_numpy(np.log1p(counts)).float()
    plain = replace(
        solved, users=torch.cat([solved.users[:, :-2], 0 * solved.users[:, -2:-1], solved.users[:, -1:]], 1)
    )
    parts = [torch.arange(2 + 20 * rate + a, 2 + 20 * rate + b) for a, b in ((0, 6), (6, 10)) for rate in (0, 1)]
    both = with_equal_values(plain, data, by_columns([1.0]))
    equal = [part - 2 + plain.items.shape[1] for part in parts]
    expected = part_weights(both, [*parts, *equal], data, 1, None, popular)
    assert expected is not None
    codes = np.asarray(data.items.columns["item_id"])
    assert abs(expected.factors[-1]) > 0.01
    torch.testing.assert_close(
        after[torch.from_numpy(codes).long()],
        weight * expected.factors[-1] * popular * torch.from_numpy(codes > 0),
        rtol=1e-3,
        atol=1e-4,
    )
    assert after[0] == 0.0


@pytest.mark.parametrize("of_id", [{"min_count": 25}, {"hash_buckets": 8}, None])
def test_popularity_that_no_bias_can_hold_is_not_fitted(
    of_id: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation is measured with the model that is kept, also where items have no code, or share one, or none of them
    has a feature."""
    data = courses(300)
    features = [f for f in data.schema.features if f.name != "item_id"]
    if of_id is not None:
        features.append(Categorical(name="item_id", side="item", **of_id))
    schema = data.schema.model_copy(update={"features": tuple(features)})
    items = data.items.frame
    rows = pl.DataFrame({"user_id": data.users.ids[data.pairs.user], "item_id": data.items.ids[data.pairs.item]})
    rows = rows.with_columns(t=pl.Series(data.times))
    changed = build_dataset(check(None, items, rows, schema), schema, SplitConfig(kind="last"))
    sections = by_columns([0.3, 1.0]).model_dump(mode="json")
    sections["model"]["bias"] = True
    sections["model"]["pairs"][0]["item"] = {
        "fields": ["stage", "size"],
        "layers": [],
        "join": "sum",
        "activation": "Identity",
    }
    sections["model"]["pairs"][0]["user"]["width"] = 10
    sections["model"]["pairs"][0]["item"]["width"] = 10
    sections["train"]["start"][0] = {"kind": "next_content"}
    with caplog.at_level(logging.INFO, "twotower"):
        trainer = Trainer(changed, Config.model_validate(sections))
        trainer.run()
    found = [re.search(r"pair 1 .*, added to .*: blend = ([\d.]+): .* = ([\d.]+)$", line) for line in caplog.messages]
    tried = {one[1]: float(one[2]) for one in found if one}
    (chosen,) = (
        line.rpartition(" = ")[2] for line in caplog.messages if "pair 1 by next_content: regularization" in line
    )
    (kept,) = (float(line.rpartition(" = ")[2]) for line in caplog.messages if line.startswith("started in"))
    assert kept == pytest.approx(tried[chosen], abs=2e-4)


@pytest.mark.parametrize("values", [None, "all"])
def test_columns_that_are_the_same_for_all_items_add_nothing(
    values: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """With columns of one value, or of none, the pair has the weight 0; without a weight that may be 0 it is
    refused."""
    data, message = courses(300, stage=values), "finds no column of several values at the items of the positives"
    with caplog.at_level(logging.INFO, "twotower"):
        trained = Trainer(data, by_columns([0.0, 1.0])).run()
    assert any(message in line for line in caplog.messages)
    assert not factors_before(trained.model, data, VALIDATION).items[:, 2:].any()
    with pytest.raises(TrainingError, match=message):
        Trainer(data, by_columns([1.0])).run()


def test_of_many_positives_those_of_drawn_users_compare_the_values_of_ials(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    tastes, n_users, n_items = rng.normal(size=(2, 3)), 8000, 900
    likes = rng.normal(size=(n_users, 2)) @ tastes @ rng.normal(size=(3, n_items)) + rng.normal(size=(n_users, n_items))
    user, item = np.nonzero(likes > np.quantile(likes, 0.3, axis=1, keepdims=True))
    part = rng.choice(["train", "validation", "test"], len(user), p=[0.96, 0.02, 0.02])
    schema = Schema(
        features=(
            Sequence(name="one", side="user", share_embedding=False, pooling="ridge"),
            Categorical(name="item_id", side="item"),
        )
    )
    frame = pl.DataFrame({"user_id": user, "item_id": item, "part": part})
    data = build_dataset(check(None, None, frame, schema), schema, SplitConfig(kind="column", column="part"))
    chosen = config(None)
    sections = chosen.model_dump(mode="json")
    sections["model"]["pairs"] = sections["model"]["pairs"][:1]
    sections["train"]["start"] = [{"kind": "ials", "sweeps": 2, "regularization": [0.001, 0.1], "popularity": [0.0]}]
    trainer = Trainer(data, Config.model_validate(sections))
    values = trainer._start_values()
    with caplog.at_level(logging.INFO, "twotower"):
        found = values.best(trainer.recipe.train.start[0])
    (told,) = (line for line in caplog.messages if "compare its values" in line)
    assert re.search(r"ials: 3,999,\d{3} of 4,[78]\d\d,\d{3} positives, those of users who are drawn", told), told
    caplog.clear()
    with caplog.at_level(logging.INFO, "twotower"):
        values.fill(found)
        sections["train"]["start"] = [found.model_dump(mode="json")]
        other = Trainer(data, Config.model_validate(sections))
        other.run()
    assert not any("compare its values" in line for line in caplog.messages)
    mine, theirs = trainer.model.state_dict(), other.model.state_dict()
    tables = [name for name in mine if name.startswith("pairs.0.")]
    assert any(mine[name].dim() == 2 and mine[name].any() for name in tables)
    for name in tables:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("what", ["one value", "weighed", "columns", "biases", "beside trained ones"])
def test_starts_that_are_solved_again_from_the_same_rows_are_as_they_were(what: str) -> None:
    data = courses(300) if what in ("columns", "biases") else log(1.0)
    chosen = {"columns": by_columns([0.0, 1.0]), "one value": config(None)}.get(what, config([0.3, 1.0]))
    if what == "biases":
        sections = by_columns([0.5, 1.0]).model_dump(mode="json")
        chosen = Config.model_validate(sections | {"model": sections["model"] | {"bias": True}})
    if what == "beside trained ones":
        chosen = beside_trained("together", 1, [0.3, 1.0], 1)
    trainer = Trainer(data, chosen)
    before = {name: weight.clone() for name, weight in trainer.run().model.state_dict().items()}
    assert trainer._values is not None
    trainer._values.solve_again(data, {})
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("epochs", [0, 2])
def test_what_validation_chooses_is_solved_again_on_all_of_train(
    epochs: int, messages: list[str], tmp_path: Path
) -> None:
    """The starts are those of a split without validation by the chosen values; the metrics of validation are of
    before."""
    whole, data = log(1.0, validates=False), log(1.0, validates=False, share=0.1)
    assert (len(data.train) + len(data.validation), len(whole.validation)) == (len(whole.train), 0)
    chosen = beside_trained("together", 1, [0.3, 1.0], epochs) if epochs else config([0.3, 1.0])
    trainer = Trainer(data, chosen)
    done = trainer.run()
    assert (
        f"closed forms are solved again on all {len(whole.train):,} training rows, with the chosen values and weights"
        in messages
    )
    found = factors_before(done.model.eval(), data, TEST)
    again = evaluate_part(found, data, VALIDATION, EvaluationConfig(k=[5]))["ndcg@5"]
    assert again > (before := done.metrics["validation.ndcg@5"])
    split = SplitConfig(kind="column", column="part")
    run = api.fit(data, data.schema, chosen.model_copy(update={"split": split}), folder=tmp_path / "run")
    assert run.config.split.from_train == "random"
    assert run.metrics["validation.ndcg@5"] == before
    assert api.evaluate(api.load(tmp_path / "run")) == {n: v for n, v in run.metrics.items() if "train." not in n}
    alone = Trainer(whole, config(None, bias=False) if not epochs else chosen_alone()).run().model
    other = factors_before(alone.eval(), whole, TEST)
    own, solved = (
        (one.users[:, part] @ one.items[:, part].T).double().numpy().ravel()
        for one, part in (
            (found, done.model.parts_of_pairs([0, 1])[1]),
            (other, alone.parts_of_pairs([0, 1][: 2 - bool(epochs)])[-1]),
        )
    )
    factor = own @ solved / (solved @ solved)
    assert factor > 0
    np.testing.assert_allclose(own, factor * solved, atol=2e-3 * np.abs(own).max())
