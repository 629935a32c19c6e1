"""Metrics of users and items with versions, against loops; and the leak that the newest rows have."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from version_worlds import CHANGING_SCHEMA, CITY_SCHEMA, N_CITIES, changing, leaking_city, moving_city
from worlds import settings

import twotower
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.metrics.diversity import Diversity
from twotower.evaluation.metrics.measured import RankedItems
from twotower.evaluation.moments import VersionFactors
from twotower.evaluation.part_evaluation import PartEvaluation, evaluate_part
from twotower.evaluation.slices import MISSING
from twotower.model.inputs.side_tensors import SideTensors
from twotower.runs import Run
from twotower.scorers.recent_popularity import PopularityTerms
from twotower.scorers.trending import RecentScores

SPLITS = {"random": SplitConfig(), "time": SplitConfig(kind="time"), "last": SplitConfig(kind="last")}


@cache
def data(split: str = "random") -> Dataset:
    """Read only."""
    return build_dataset(check(*changing(), CHANGING_SCHEMA), CHANGING_SCHEMA, SPLITS[split])


def random_versions(of: Dataset, seed: int = 0, width: int = 4) -> Factors:
    """A random vector for each version."""
    rng = np.random.default_rng(seed)
    n = [len(side.by_version()) for side in (of.users, of.items)]
    return Factors(*(torch.from_numpy(rng.normal(size=(k, width)).astype(np.float32)) for k in n))


def version(of: Dataset, side: Any, row: int, time: int) -> int:
    """The version that holds at a time, by a search through the table."""
    frame = of.side(side).versions.frame  # type: ignore[union-attr]
    own = frame.with_row_index("at").filter((pl.col("__row") == row) & (pl.col("__since") <= time))
    return int(own["at"][-1])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", [VALIDATION, TEST])
def test_pairs_are_scored_by_the_versions_of_their_time(split: str, part: int) -> None:
    of = data(split)
    every = random_versions(of)
    found = VersionFactors.of_part(every, of, part).part_scores(of, part)
    pairs, times = of.pairs_of(part), of.times_of(part)
    for at in range(0, len(pairs), 11):
        user, item = (
            version(of, "user", int(pairs.user[at]), int(times[at])),
            version(of, "item", int(pairs.item[at]), int(times[at])),
        )
        assert found[at] == pytest.approx(float(every.users[user] @ every.items[item]), rel=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_a_user_ranks_the_catalogue_of_the_time_of_its_first_pair(split: str) -> None:
    """Also where its items have changed since the part began."""
    of = data(split)
    every = random_versions(of)
    factors = VersionFactors.of_part(every, of, TEST)
    users, times = np.unique(of.test.user)[::5].astype(np.int64), of.times_of(TEST)
    scores = factors.catalogue_scores(users)
    changed = set()
    for at, user in enumerate(users.tolist()):
        time = int(times[of.test.user == user].min())
        items = [version(of, "item", item, time) for item in range(len(of.items))]
        changed.add(tuple(items))
        expected = every.users[version(of, "user", user, time)] @ every.items[items].T
        torch.testing.assert_close(scores[at], expected, rtol=1e-5, atol=1e-6)
    assert len(changed) > 1
    ranked = PartEvaluation.from_factors(factors, of, TEST, EvaluationConfig(k=(5,), bootstrap=0))
    of_user = dict(zip(ranked.users.tolist(), ranked.rankings.best.tolist(), strict=True))
    for user, of_one in zip(users.tolist(), scores, strict=True):
        if user in of_user:
            seen = of.pairs.item[(of.pairs.user == user) & (of.parts != TEST)].astype(np.int64)
            of_one[torch.from_numpy(seen)] = -torch.inf
            assert of_one.topk(5).indices.tolist() == of_user[user]


def test_one_vector_each_is_never_later_than_the_part() -> None:
    of = data("time")
    every = random_versions(of)
    found = VersionFactors.of_part(every, of, TEST)
    assert isinstance(found, VersionFactors)
    at_once, times = found.at_once(), of.times_of(TEST)
    for item in range(0, len(of.items), 7):
        assert torch.equal(at_once.items[item], every.items[version(of, "item", item, int(times.min()))])
    user = int(of.test.user[5])
    first = int(times[of.test.user == user].min())
    assert torch.equal(at_once.users[user], every.users[version(of, "user", user, first)])


@pytest.mark.parametrize("part", [VALIDATION, TEST])
def test_slices_and_diversity_read_no_later_version(part: int) -> None:
    """A user is of the city that it has when it is asked, and items have the tags of the first row of the part."""
    of = data("time")
    tags = Diversity(column="tags")
    config = EvaluationConfig(k=(5,), bootstrap=0, slices=("city",), slice_min_users=1, metrics=(tags,))
    found = PartEvaluation.from_factors(VersionFactors.of_part(random_versions(of), of, part), of, part, config)
    times, users = of.times_of(part), of.pairs_of(part).user
    cities = Counter[str]()
    for user in found.users.tolist():
        frame = of.users.versions.frame  # type: ignore[union-attr]
        cities[frame["city"][version(of, "user", user, int(times[users == user].min()))] or MISSING] += 1
    measured = found.slices()
    assert {name: measured[f"users.city={name}"] for name in cities} == cities
    newest = Counter(of.users.frame["city"][user] or MISSING for user in found.users.tolist())
    assert newest != cities, "the newest versions are other ones"
    held = of.items.versions.frame[[version(of, "item", item, int(times.min())) for item in range(len(of.items))]]  # type: ignore[union-attr]
    as_asked = replace(of, items=replace(of.items, frame=held, versions=None))
    expected = tags.values(replace(found.rankings, items=RankedItems.of(as_asked)))
    assert found.metrics()["diversity@5"] == pytest.approx(expected.mean())
    today = replace(of, items=replace(of.items, versions=None))
    later = tags.values(replace(found.rankings, items=RankedItems.of(today)))
    assert later.mean() != pytest.approx(expected.mean(), rel=1e-3)


def test_without_versions_vectors_are_as_they_are(everything_data: Dataset) -> None:
    factors = Factors(torch.ones(60, 2), torch.ones(40, 2))
    assert VersionFactors.of_part(factors, everything_data, TEST) is factors


def test_a_part_without_pairs_has_vectors() -> None:
    of = build_dataset(check(*changing(), CHANGING_SCHEMA), CHANGING_SCHEMA, SplitConfig(kind="time", validation=0))
    assert len(VersionFactors.of_part(random_versions(of), of, VALIDATION).part_scores(of, VALIDATION)) == 0


def trained(tables: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame], versioned: bool, loss: str) -> Run:
    """A model of the tables, with versions, or with the newest row of each user."""
    users, items, log = tables
    schema = CITY_SCHEMA
    if not versioned:
        users, schema = users.sort("since").drop("since"), schema.model_copy(update={"valid_from": ""})
    config = settings(
        train={"epochs": 12, "batch_size": 64, "lr": 0.1, "monitor": "validation.recall@5"}, loss={"kind": loss},
        split={"kind": "last"}, negatives={"random": 4} if loss == "bce" else {"uniform": 20},
    )  # fmt: skip
    return twotower.fit((users, items, log), schema, config)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_the_leak_of_a_snapshot_is_gone_with_versions(loss: str) -> None:
    """The newest city of a user betrays earlier purchases; the city at the time of a click does not."""
    snapshot, versions = (trained(leaking_city(), versioned, loss).metrics for versioned in (False, True))
    assert snapshot["test.recall@5"] > 0.95, "a score that no served model can have"
    assert versions["test.recall@5"] < 2.2 / N_CITIES, "about one in six"
    assert versions["validation.recall@5"] < 2.2 / N_CITIES


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_a_user_that_moves_is_understood_with_versions_alone(loss: str) -> None:
    snapshot, versions = (trained(moving_city(), versioned, loss).metrics for versioned in (False, True))
    assert versions["test.recall@5"] > 0.95
    assert snapshot["test.recall@5"] < 0.5


def test_what_is_measured_is_what_the_model_says_of_the_versions() -> None:
    """Metrics are those of the towers on the rows of the time, vectors those of the newest rows."""
    run = trained(moving_city(), True, "softmax")
    of = run.dataset
    again = evaluate_part(run.factors_during(TEST), of, TEST, run.config.evaluation)
    assert again["recall@5"] == run.metrics["test.recall@5"]
    newest = SideTensors(of.users, of.encoders.fields("user"))
    torch.testing.assert_close(
        run.factors().users, run.model.user_vectors(newest.take(np.arange(len(of.users)))).detach()
    )
    assert evaluate_part(run.factors(), of, TEST, run.config.evaluation)["recall@5"] < 0.5
    without = replace(of.users, versions=None)
    assert len(SideTensors(without.by_version(), of.encoders.fields("user")).take(np.arange(3)).lookup) == 3


def test_recent_popularity_is_of_items_whatever_their_versions() -> None:
    of = data("time")
    held = np.random.default_rng(1).random(len(of.items)).astype(np.float32)
    recent = RecentScores.of_part(of, TEST, PopularityTerms(30.0, 0.5), held)
    every = random_versions(of)
    plain, found = (
        VersionFactors.of_part(Factors(every.users, every.items, added=x), of, TEST) for x in ((), (recent,))
    )
    assert isinstance(found, VersionFactors)
    users = np.unique(of.test.user).astype(np.int64)
    added = recent.added_to(torch.zeros(len(users), len(of.items)), users)
    assert added.abs().max() > 0.5
    torch.testing.assert_close(found.catalogue_scores(users) - plain.catalogue_scores(users), added, rtol=0, atol=1e-5)
    of_pairs = found.part_scores(of, TEST) - plain.part_scores(of, TEST)
    np.testing.assert_allclose(of_pairs, recent.of_pairs(of.test.user, of.test.item), atol=1e-5)
    assert found.at_once().added == (recent,)


def test_own_scores_are_of_users_and_items_whatever_their_versions() -> None:
    dataset, rng = data("time"), np.random.default_rng(0)
    dense = (rng.random((len(dataset.users), len(dataset.items))) < 0.2).astype(np.float32)
    users, items = np.nonzero(dense)
    offsets = np.r_[0, np.cumsum(np.bincount(users, minlength=len(dense)))]
    own = SparseScores(offsets, items, dense[users, items], len(dataset.items))
    sides = [
        torch.from_numpy(rng.standard_normal((len(s.by_version()), 3)).astype(np.float32))
        for s in (dataset.users, dataset.items)
    ]
    plain, found = (VersionFactors.of_part(Factors(*sides, added=x), dataset, TEST) for x in ((), (own,)))
    asked, pairs = np.arange(len(dense)), dataset.test
    added = (found.catalogue_scores(asked) - plain.catalogue_scores(asked)).numpy()
    np.testing.assert_allclose(added, dense, atol=1e-5)
    of_pairs = found.part_scores(dataset, TEST) - plain.part_scores(dataset, TEST)
    np.testing.assert_allclose(of_pairs, dense[pairs.user, pairs.item], atol=1e-5)
    assert isinstance(found, VersionFactors)
    assert isinstance(plain, VersionFactors)
    np.testing.assert_allclose(
        found.at_once().catalogue_scores(asked) - plain.at_once().catalogue_scores(asked), dense, atol=1e-5
    )
