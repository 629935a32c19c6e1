"""Each diagnosis against a model that is broken on purpose; and a sound one without findings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import waves
from context_worlds import flat, hourly, hourly_schema
from disk_worlds import on_disk_and_in_memory
from model_worlds import pair_of, weight_of
from torch import nn
from waves import trending
from worlds import (
    CHECKERBOARD_SCHEMA,
    EVERYTHING_SCHEMA,
    ID_FEATURES,
    REPLAYED_SCHEMA,
    checkerboard,
    everything,
    replayed,
    settings,
)

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import check
from twotower.diagnostics import Finding, diagnose, diagnosis
from twotower.diagnostics.interactions import _shared_pairs, drift, false_negatives
from twotower.features.categorical import Categorical
from twotower.features.feature import Feature
from twotower.features.multi_hot import MultiHot
from twotower.features.numeric import Numeric
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.model.towers import Tower
from twotower.model.two_tower import TwoTower
from twotower.runs import Run
from twotower.train.defaults import with_defaults
from twotower.train.trainer import Trainer

ENOUGH: dict[str, object] = {"epochs": 12, "batch_size": 128, "lr": 0.03, "device": "cpu"}
RANKED = ENOUGH | {"monitor": "validation.ndcg@5"}
COLD: dict[str, object] = {"bias": False, "temperature": 1.0, "learn_temperature": False}


def trained(data: Dataset, **sections: dict[str, object]) -> Run:
    config = settings(**({"train": ENOUGH} | sections))
    done = Trainer(data, config).run()
    return Run(None, with_defaults(config, data), data, done.model.eval(), done.metrics, done.history)


def untrained(data: Dataset, observed: float = math.nan, **sections: Any) -> Run:
    config = with_defaults(settings(**sections), data)
    torch.manual_seed(0)
    users, items = (data.encoders.fields(side) for side in SIDES)
    model = TwoTower(config.model, users, items, config.terms_for(users, items))
    history = [] if math.isnan(observed) else [{"epoch": 1, "train.loss": observed}]
    return Run(None, config, data, model.eval(), {}, history)


def world(
    schema: Schema, users: pl.DataFrame | None, items: pl.DataFrame | None, actions: pl.DataFrame, **split: Any
) -> Dataset:
    return build_dataset(check(users, items, actions, schema), schema, Config().split.model_copy(update=split))


def with_features(*features: Feature, **columns: list[Any]) -> Dataset:
    """The checkerboard with more features of items."""
    users, items, actions = checkerboard()
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*ID_FEATURES, *features)})
    return world(schema, users, items.with_columns(**{k: pl.Series(v) for k, v in columns.items()}), actions)


def with_weights(sound: Run, change: Callable[[TwoTower], None]) -> Run:
    model = copy.deepcopy(sound.model)
    with torch.no_grad():
        change(model)
    return replace(sound, model=model)


def named(findings: list[Finding], name: str) -> Finding:
    found = [f for f in findings if f.name == name]
    assert len(found) == 1, (name, findings)
    return found[0]


def errors(findings: list[Finding]) -> set[str]:
    return {f.name for f in findings if f.severity == "error"}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return world(CHECKERBOARD_SCHEMA, *checkerboard())


@pytest.fixture(scope="module")
def sound(data: Dataset) -> Run:
    return trained(data)


# ---- health


def test_a_sound_run_has_no_errors(sound: Run) -> None:
    found = diagnose(sound)
    assert errors(found) == set()
    for name in ("history", "split", "baseline", "unused_feature"):
        assert named(found, name).severity == "ok"
    # Parity is one axis, and the doctor says so.
    assert " dimensions. If the data should have more" in named(found, "collapse").text


@pytest.mark.parametrize(
    "sections",
    [
        {
            "train": RANKED,
            "loss": {"kind": "softmax"},
            "negatives": {"cross_batch_memory": 64, "disliked": 2, "popularity": 8},
        },
        {"train": RANKED, "loss": {"kind": "softmax"}, "negatives": {"hard": {"n": 1, "ranks": [10, 20]}}},
    ],
)
def test_nor_have_other_sound_settings(data: Dataset, sections: dict[str, dict[str, object]]) -> None:
    assert errors(diagnose(trained(data, **sections))) == set()


def test_the_model_is_left_as_it_was(sound: Run) -> None:
    before = {n: p.clone() for n, p in sound.model.named_parameters()}
    sound.model.train()
    diagnose(sound)
    assert sound.model.training
    sound.model.eval()
    assert all(torch.equal(before[n], p) for n, p in sound.model.named_parameters())
    assert diagnose(sound) == diagnose(sound)


# ---- a: the floor of the loss


def test_a_warm_cosine_has_a_floor_under_its_loss(data: Dataset) -> None:
    found = diagnose(trained(data, model=COLD))
    assert errors(found) == {"loss_floor"}
    finding = named(found, "loss_floor")
    assert finding.evidence["floor"] == pytest.approx(0.3133, abs=1e-4)
    assert "cannot bring the loss below 0.313" in finding.text
    assert "model.temperature = 0.1" in finding.text


def test_a_softmax_of_a_warm_cosine_over_a_batch_of_256_cannot_go_below_357() -> None:
    n = np.arange(400)
    ids = {"user_id": n, "item_id": n}
    one_each = world(
        Schema(features=ID_FEATURES), pl.DataFrame({"user_id": n}), pl.DataFrame({"item_id": n}), pl.DataFrame(ids)
    )
    broken = untrained(
        one_each, 4.0, model=COLD, loss={"kind": "softmax", "log_q": False}, train=RANKED | {"batch_size": 256}
    )
    finding = named(diagnose(broken), "loss_floor")
    assert finding.evidence["floor"] == pytest.approx(math.log1p(255 * math.exp(-2)), abs=1e-4)
    assert finding.evidence["floor"] == pytest.approx(3.57, abs=5e-3)
    assert finding.evidence["constant_loss"] == pytest.approx(math.log(256), abs=1e-4)
    assert finding.severity == "error"


@pytest.mark.parametrize("kind", ["softmax", "gbce", "bpr"])
def test_the_floor_of_every_loss_is_what_the_best_cosines_give(data: Dataset, kind: str) -> None:
    """Vectors of one axis solve the checkerboard; no training gets below the floor."""
    sections: dict[str, dict[str, object]] = {
        "train": RANKED | {"epochs": 30}, "model": COLD, "loss": {"kind": kind},
        "negatives": {"in_batch": False, "uniform": 12},
    }  # fmt: skip
    broken = trained(data, **sections)
    found = diagnose(broken)
    assert named(found, "loss_floor").severity != "ok"
    floor = named(found, "loss_floor").evidence["floor"]
    assert 0.98 * floor < min(h["train.loss"] for h in broken.history)
    if kind == "bpr":
        assert floor == pytest.approx(math.log1p(math.exp(-2)), abs=1e-4)
    if kind == "gbce":  # too warm to start at all
        assert "collapse" in errors(found)


@pytest.mark.parametrize("model", [COLD | {"bias": True}, COLD | {"similarity": "dot"}])
def test_biases_and_dot_products_have_no_floor(data: Dataset, model: dict[str, object]) -> None:
    assert "loss_floor" not in {f.name for f in diagnose(untrained(data, 0.4, model=model))}


# ---- b: collapse


@pytest.mark.parametrize("side", ["user", "item"])
def test_collapsed_vectors(data: Dataset, side: str) -> None:
    broken = with_weights(trained(data, model={"bias": False}), lambda m: _blind(getattr(pair_of(m), side)))
    found = diagnose(broken)
    assert "collapse" in errors(found)
    assert errors(found) <= {"collapse", "baseline"}
    finding = named(found, "collapse")
    assert finding.evidence[f"{side}_cosine"] == pytest.approx(1, abs=1e-4)
    assert finding.evidence[f"{side}_rank"] < 1.01 or finding.evidence["personal"] < 1e-3
    assert ("All users have nearly the same ranking" if side == "user" else "same score") in finding.text


def test_small_scores_that_rank_well_are_no_collapse(data: Dataset) -> None:
    def little(m: TwoTower) -> None:
        last = pair_of(m).item.head.layer
        assert isinstance(last, nn.Linear)
        last.weight.mul_(1e-4)
        last.bias.zero_()

    run = with_weights(trained(data, model={"bias": False, "similarity": "dot"}), little)
    k = run.config.evaluation.k[0]
    for low, severity in ((0.5, "warning"), (0.1, "error")):
        metrics = run.metrics | {f"test.ndcg@{k}": 0.6, f"test.ndcg@{k}.low": low, f"baseline.popularity.ndcg@{k}": 0.3}
        finding = named(diagnose(replace(run, metrics=metrics)), "collapse")
        assert (finding.severity, "nearly the same score" in finding.text) == (severity, True)
        assert ("Train longer" in finding.text) is (severity == "warning")


def _blind(tower: Tower) -> None:
    """The last layer gives its bias whatever comes in."""
    last = tower.head.layer
    assert isinstance(last, nn.Linear)
    last.weight.zero_()
    last.bias.fill_(0.3)


def test_the_columns_of_the_biases_are_no_collapse(sound: Run) -> None:
    def far(m: TwoTower) -> None:
        m.global_bias.fill_(100.0)  # nearly all of every user vector's length

    found = named(diagnose(with_weights(sound, far)), "collapse")
    assert found.severity != "error"
    assert found.evidence["user_cosine"] == pytest.approx(
        named(diagnose(sound), "collapse").evidence["user_cosine"], abs=1e-4
    )


# ---- c: baselines


def _contrary(m: TwoTower) -> None:
    """What a user likes comes last."""
    last = m.towers("user")[0].head.layer
    assert isinstance(last, nn.Linear)
    last.weight[:-1].neg_()
    last.bias[:-1].neg_()


def test_a_model_of_pairs_worse_than_popularity(sound: Run) -> None:
    found = diagnose(with_weights(sound, _contrary))
    assert errors(found) == {"baseline"}
    text = named(found, "baseline").text
    assert "The model has 0.0000, a difference of -0." in text
    assert ": popularity is ahead. Likely causes, most likely first: " in text
    assert "a loss of pairs" not in text, "it is not to retrieve"


def test_a_model_worse_than_popularity(data: Dataset) -> None:
    found = diagnose(with_weights(trained(data, train=RANKED, loss={"kind": "softmax"}), _contrary))
    assert errors(found) == {"baseline"}
    assert "by ndcg@5, the monitored metric, is popularity" in named(found, "baseline").text


def test_the_metrics_of_a_run_are_not_measured_again(sound: Run) -> None:
    measured = {"test.auc": 0.8, "baseline.popularity.auc": 0.7, "baseline.bias.auc": 0.6}
    for auc, severity in ((0.8, "ok"), (0.65, "error")):
        found = named(diagnose(replace(sound, metrics=sound.metrics | measured | {"test.auc": auc})), "baseline")
        assert (found.severity, f"The model has {auc:.4f}" in found.text) == (severity, True)
    above = measured | {"test.auc": 0.75, "baseline.bias.auc": 0.9}
    assert named(diagnose(replace(sound, metrics=sound.metrics | above)), "baseline").severity == "warning"


# ---- d: false negatives


@pytest.mark.parametrize(
    ("loss", "mask", "scope", "found"),
    [
        ("softmax", False, "leave_batch_out", True), ("softmax", True, "leave_batch_out", False),
        ("softmax", False, "causal", False), ("bce", False, "leave_batch_out", False),
    ],
)  # fmt: skip
def test_candidates_that_the_user_likes_when_the_mask_is_off(loss: str, mask: bool, scope: str, found: bool) -> None:
    data = world(REPLAYED_SCHEMA, None, None, replayed(), kind="last")
    negatives: dict[str, object] = {"mask_positives": mask} | ({} if loss == "softmax" else {"random": 1})
    run = untrained(data, loss={"kind": loss}, negatives=negatives, train={"history_scope": scope})
    findings = [*false_negatives(diagnosis.DiagnosisContext(run))]
    assert ["negatives.mask_positives = true" in f.text for f in findings] == [True] * found


# ---- e: leakage


def test_a_pair_in_two_parts(sound: Run) -> None:
    data = sound.dataset
    again = np.flatnonzero(data.parts == TEST)[:60]
    rows = np.concatenate([np.arange(len(data.parts)), again])
    pairs = Pairs(data.pairs.user[rows], data.pairs.item[rows], data.pairs.positive[rows])
    parts = np.concatenate([data.parts, np.full(len(again), TRAIN, np.int8)])
    found = diagnose(replace(sound, dataset=replace(data, pairs=pairs, parts=parts, times=data.times[rows])))
    assert errors(found) == {"shared_pairs"}
    assert "60 of 240 test pairs are in the train part too" in named(found, "shared_pairs").text
    assert named(found, "shared_pairs").evidence["share"] == 0.25
    schema = data.schema.model_copy(update={"duplicates": "keep"})
    kept = replace(data, schema=schema, pairs=pairs, parts=parts, times=data.times[rows])
    told = named(diagnose(replace(sound, dataset=kept)), "shared_pairs")
    assert told.severity == "warning"
    assert "too, as schema.duplicates = 'keep' allows: rankings leave them out" in told.text
    broken = diagnosis.DiagnosisContext(replace(sound, dataset=replace(data, pairs=pairs, parts=parts)))
    assert list(_shared_pairs(broken, block=7)) == [named(found, "shared_pairs")]


def test_a_sample_of_the_interactions_has_their_context() -> None:
    data = world(hourly_schema(), *hourly())
    sampled = diagnosis.DiagnosisContext(untrained(data), max_pairs=len(data.pairs) // 3).sampled
    kept = np.isin(data.pairs.user, sampled.pairs.user)
    assert 0 < len(sampled.pairs) < len(data.pairs)
    for name in data.context:
        assert np.array_equal(flat(sampled, name), flat(data, name)[kept]), name


def test_what_is_popular_changes_and_the_model_does_not_know() -> None:
    softmax: dict[str, Any] = {"loss": {"kind": "softmax"}}
    data = waves.world()
    found = [*drift(diagnosis.DiagnosisContext(untrained(data, **softmax)))]
    assert [(f.severity, f.name) for f in found] == [("warning", "drift")]
    assert "{ kind = 'trending' } to scorers" in found[0].text
    assert found[0].evidence["lift"] > 1.5
    unmeasured = waves.world(validation=0.0)
    (without,) = drift(diagnosis.DiagnosisContext(untrained(unmeasured, **softmax)))
    assert "fitted to a validation part, which split.validation gives" in without.text
    reads = untrained(data, scorers=["trending"], **softmax)
    (told,) = drift(diagnosis.DiagnosisContext(reads))
    assert told.severity == "ok"
    assert "adds nothing, as validation gave it the weight 0" in told.text
    with torch.no_grad():
        trending(reads.model).numbers.fill_(0.5)
    (told,) = drift(diagnosis.DiagnosisContext(reads))
    assert (told.severity, "and the model reads it" in told.text) == ("ok", True)
    assert not [*drift(diagnosis.DiagnosisContext(untrained(data)))], "a loss of labels"
    assert not [*drift(diagnosis.DiagnosisContext(untrained(waves.world(0.0), **softmax)))]


def test_a_statistic_beside_a_sequence() -> None:
    data = world(EVERYTHING_SCHEMA, *everything())
    finding = named(diagnose(untrained(data)), "statistic_beside_sequence")
    assert finding.severity == "warning"
    assert "'shown'" in finding.text
    assert "'liked'" in finding.text


@pytest.mark.parametrize("feature", ["number", "bucket", "words"])
def test_a_feature_that_tells_the_label(feature: str) -> None:
    """All users like the odd items, and a feature knows which are odd."""
    users, items, actions = checkerboard()
    actions = actions.with_columns(liked=pl.col("item_id") % 2)
    odd = np.arange(30) % 2
    kinds: dict[str, tuple[Feature, list[Any]]] = {
        "number": (Numeric(name="x", side="item"), [1.0 - o for o in odd]),  # the wrong way round tells as much
        "bucket": (Numeric(name="x", side="item", buckets=4), [float(o + i / 100) for i, o in enumerate(odd)]),
        "words": (MultiHot(name="x", side="item"), [["a", "odd"] if o else ["a"] for o in odd]),
    }
    added, values = kinds[feature]
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*ID_FEATURES, added)})
    found = diagnose(trained(world(schema, users, items.with_columns(x=pl.Series(values)), actions)))
    # Nothing is left to personal taste, and biases know the odd items too.
    assert errors(found) - {"baseline", "collapse"} == {"leaking_feature"}
    assert "The item feature 'x' alone predicts the label" in named(found, "leaking_feature").text
    assert named(found, "leaking_feature").evidence["auc"] >= 0.99


def test_a_feature_that_tells_nothing_is_fine() -> None:
    data = with_features(Numeric(name="x", side="item"), x=[float(i % 7) for i in range(30)])
    assert named(diagnose(untrained(data)), "leaking_feature").severity == "ok"


@pytest.mark.parametrize("versioned", [True, False])
def test_a_feature_that_leaks_only_in_its_newest_version_is_fine_with_versions(versioned: bool) -> None:
    """Users are marked by what they liked after they liked it."""
    _, items, actions = checkerboard()
    start = 1_600_000_000
    actions = actions.with_columns(liked=pl.col("user_id") % 2, at=pl.col("at") + start)
    marks = [
        (u, mark, start + at) for u in range(40) for mark, at in (("new", 0), ("liker" if u % 2 else "hater", 5_000))
    ]
    marked = pl.DataFrame(marks, schema=["user_id", "mark", "since"], orient="row")
    features = (*ID_FEATURES, Categorical(name="mark", side="user"))
    options = {"features": features, "time_unit": "s", "valid_from": "since" if versioned else ""}
    schema = CHECKERBOARD_SCHEMA.model_copy(update=options)
    found = named(diagnose(untrained(world(schema, marked, items, actions))), "leaking_feature")
    assert found.severity == ("ok" if versioned else "error")


# ---- f: dead features


def unused(findings: list[Finding]) -> dict[str, str]:
    return {f.text.split("'")[1]: f.text for f in findings if f.name == "unused_feature" and f.severity == "warning"}


def test_columns_that_tell_nothing() -> None:
    data = with_features(
        Categorical(name="same", side="item"),
        Numeric(name="flat", side="item"),
        Categorical(name="rare", side="item", min_count=10_000),
        MultiHot(name="empty", side="item"),
        Categorical(name="alive", side="item"),
        same=["x"] * 30, flat=[3.0] * 30, rare=list("abc") * 10, empty=[[]] * 30, alive=list("ab") * 15,
    )  # fmt: skip
    found = diagnose(trained(data))
    assert errors(found) - {"leaking_feature"} == set()
    texts = unused(found)
    assert set(texts) == {"same", "flat", "rare", "empty"}
    assert "same value in every row" in texts["same"]
    assert "same value in every row" in texts["flat"]
    assert "unknown in every row" in texts["rare"]
    assert "min_count" in texts["rare"]
    assert "is empty in every row" in texts["empty"]


def test_features_without_effect() -> None:
    data = with_features(
        Categorical(name="zero", side="item"), Numeric(name="cut", side="item"), Categorical(name="alone", side="item"),
        zero=list("abc") * 10, cut=[float(i) for i in range(30)], alone=list("abcde") * 6,
    )  # fmt: skip
    reads = {"layers": [8], "fields": ["item_id", "zero", "cut"]}
    model: dict[str, object] = {"bias": False, "pairs": [{"user": {"layers": [8]}, "item": reads}]}

    def cut(m: TwoTower) -> None:
        embeddings = m.towers("item")[0].embeddings
        embeddings.rows_of("zero").zero_()
        for projection in embeddings.projections.values():
            weight_of(projection).zero_()

    found = diagnose(with_weights(trained(data, model=model), cut))
    texts = unused(found)
    assert set(texts) == {"zero", "cut", "alone"}
    assert "embeddings of about zero" in texts["zero"]
    assert "train.embedding_weight_decay" in texts["zero"]
    assert "has no effect" in texts["cut"]
    assert "is read by no tower" in texts["alone"]
    assert "model.pairs.0.item.fields" in texts["alone"]


def test_a_collapsed_model_says_nothing_about_its_features(sound: Run) -> None:
    def nothing(m: TwoTower) -> None:
        for parameter in m.parameters():
            parameter.zero_()

    found = diagnose(with_weights(sound, nothing))
    assert "collapse" in errors(found)
    assert unused(found) == {}


# ---- g: the history


def with_history(sound: Run, losses: list[float], values: list[float] | None = None, **config: Any) -> list[Finding]:
    history = [{"epoch": i + 1, "train.loss": x} for i, x in enumerate(losses)]
    for entry, value in zip(history, values or [], strict=False):
        entry["validation.auc"] = value
    return diagnose(replace(sound, history=history, **config))


def test_a_loss_that_rises(sound: Run) -> None:
    found = with_history(sound, [0.7, 0.8, 1.9])
    assert errors(found) == {"loss_rises"}
    assert "train.lr" in named(found, "loss_rises").text


def test_a_loss_that_does_not_fall(sound: Run) -> None:
    found = with_history(sound, [0.6935, 0.6934, 0.6936])
    assert errors(found) == {"loss_flat"}
    assert "does not learn" in named(found, "loss_flat").text
    assert named(found, "loss_flat").evidence["constant_loss"] == pytest.approx(math.log(2), abs=2e-3)
    # Learned in the first epoch: no illness.
    assert named(with_history(sound, [0.1, 0.1, 0.1]), "loss_flat").severity == "warning"


def test_a_filling_memory_may_raise_the_loss_of_the_second_epoch(data: Dataset) -> None:
    broken = untrained(data, train=RANKED, loss={"kind": "softmax"}, negatives={"cross_batch_memory": 64})
    assert not {"loss_rises", "loss_flat"} & {f.name for f in with_history(broken, [2.0, 3.0, 2.5])}
    assert "loss_rises" in errors(with_history(broken, [2.0, 3.0, 3.5]))


def test_validation_that_still_rises(sound: Run) -> None:
    finding = named(with_history(sound, [0.7, 0.6, 0.5], [0.6, 0.65, 0.7]), "still_rising")
    assert finding.severity == "warning"
    assert "raise train.epochs (now 12)" in finding.text
    assert "still_rising" not in {f.name for f in with_history(sound, [0.7, 0.6, 0.5], [0.6, 0.7, 0.7001])}


def test_validation_that_never_improves(sound: Run) -> None:
    finding = named(with_history(sound, [0.7, 0.6, 0.5], [0.7, 0.65, 0.6]), "peaks_early")
    assert finding.severity == "warning"
    assert "best at its first value (epoch 1)" in finding.text
    assert "lower train.lr" in finding.text


@pytest.mark.parametrize(("batch", "few"), [(512, True), (16, False)])
def test_a_model_that_has_not_learned_yet_takes_more_or_larger_steps(sound: Run, batch: int, few: bool) -> None:
    train = sound.config.train.model_copy(update={"batch_size": batch})
    config = sound.config.model_copy(update={"train": train})
    for losses, name in (([0.6935, 0.6934, 0.6936], "loss_flat"), ([0.695, 0.694, 0.693], "peaks_early")):
        text = named(with_history(sound, losses, [0.7, 0.65, 0.6], config=config), name).text
        assert "raise train.lr (now " in text
        assert "lower train.lr" not in text
        assert ("set train.batch_size = 0 (512 makes 2 steps an epoch) or raise" in text) == few


def test_a_log_loss_is_better_when_it_is_lower(data: Dataset) -> None:
    log_loss = untrained(data, train={"monitor": "validation.log_loss"})
    history = [{"epoch": i + 1, "train.loss": 0.5 - i / 10, "validation.log_loss": 0.7 - i / 10} for i in range(3)]
    names = {f.name for f in diagnose(replace(log_loss, history=history))}
    assert "still_rising" in names
    assert "peaks_early" not in names


def test_weights_that_are_not_finite(sound: Run) -> None:
    def spoil(m: TwoTower) -> None:
        m.global_bias.fill_(math.nan)

    found = diagnose(with_weights(sound, spoil))
    assert errors(found) == {"not_finite"}


# ---- runs of every kind


def test_a_run_without_a_test_part(sound: Run) -> None:
    """What `DSSMTrainable` leaves behind."""
    parts = np.where(sound.dataset.parts == TEST, 1, sound.dataset.parts)
    found = diagnose(replace(sound, dataset=replace(sound.dataset, parts=parts)))
    assert errors(found) == set()
    assert not {"baseline", "leaking_feature"} & {f.name for f in found}


def test_large_sides_are_sampled(sound: Run) -> None:
    rows = np.arange(100, 150)
    few = diagnosis.sample(rows, 7)
    assert len(few) == 7
    assert few.tolist() == sorted(set(few.tolist()) & set(rows.tolist()))
    assert diagnosis.sample(rows, 50) is rows
    found = diagnose(sound, max_rows=10)
    assert errors(found) == set()


@pytest.mark.parametrize("split", ["last", "time", "random"])
def test_the_findings_of_prepared_data_are_those_of_memory(tmp_path: Path, split: str) -> None:
    found = []
    for data in on_disk_and_in_memory(tmp_path / "world", split):
        found.append(diagnose(untrained(data, 0.7, split={"kind": split})))
    assert [(f.name, f.severity) for f in found[0]] == [(f.name, f.severity) for f in found[1]]
    for ours, theirs in zip(*found, strict=True):
        assert ours.evidence == pytest.approx(theirs.evidence, rel=1e-5, abs=1e-9)
