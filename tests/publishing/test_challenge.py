"""A model takes the place of the one before only if it is not worse on rows that neither has learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.cli.app import run_command
from twotower.errors import BundleError
from twotower.features.schema import Schema
from twotower.publishing.challenge import MIN_USERS, Beat, judge
from twotower.runs import Run

RNG = np.random.default_rng(0)


def test_a_verdict_is_read_from_the_interval() -> None:
    old = RNG.random(400)
    for shift, spread, verdict in (
        (0.1, 0.1, "better"),
        (-0.1, 0.1, "worse"),
        (0.0, 0.01, "not worse"),
        (0.0, 0.2, "cannot tell"),
    ):
        noise = RNG.normal(0, spread, 400)
        found = judge(old, old + shift + noise - noise.mean(), "ndcg@10", "a")
        assert found.verdict == verdict
        assert found.interval[0] <= found.values[1] - found.values[0] <= found.interval[1]
        assert bool(found.shortfall) == (verdict == "worse")
        strict = found.model_copy(update={"strict": True})
        assert bool(strict.shortfall) == (verdict in ("worse", "cannot tell"))
    few = judge(old[: MIN_USERS - 1], old[: MIN_USERS - 1] - 0.5, "ndcg@10", "a")
    assert few.verdict == "cannot tell"


def test_a_metric_that_is_to_be_low_is_judged_the_other_way_round() -> None:
    old = RNG.random(400)
    found = judge(old, old + 0.1, "rank@10", "a", rising=False)
    assert found.verdict == "worse"
    assert found.interval == pytest.approx((0.1, 0.1))


def test_the_number_of_users_that_could_tell_is_enough_four_times_of_five() -> None:
    old = np.full(300, 0.5)
    needed = judge(old, old + RNG.normal(0, 0.1, 300), "ndcg@10", "a").could_tell
    assert 600 < needed < 1_000  # (2.8 x 0.1 / 0.01)^2 = 784
    told = [
        judge(np.full(needed, 0.5), 0.49 + RNG.normal(0, 0.1, needed), "ndcg@10", "a").verdict == "worse"
        for _ in range(40)
    ]
    assert 24 <= sum(told) <= 39


def test_of_two_equal_models_one_is_called_worse_about_once_in_forty() -> None:
    named = 0
    for _ in range(200):
        old, new = RNG.random((2, 60))
        named += judge(old, new, "ndcg@10", "a").verdict == "worse"
    assert named <= 13  # 5 expected; 13 or more once in a thousand


# ---- stores


def fitted(folder: Path, log: pl.DataFrame, **train: object) -> Run:
    config = settings(train={"epochs": 12, **train}, split={"kind": "time", "test": 0.2, "validation": 0.1})
    return api.fit((None, None, log), CHECKERBOARD_SCHEMA, config, folder=folder)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Run]:
    """A good run of the first three quarters of a log, and of all of it a good one and one of shuffled labels."""
    folder, log = tmp_path_factory.mktemp("days"), checkerboard(80)[2].sort("at")
    shuffled = log.with_columns(liked=pl.when(pl.col("at") < 1_900).then(pl.col("liked").shuffle(1)).otherwise("liked"))
    return (
        fitted(folder / "old", log.head(1_800)),
        fitted(folder / "new", log, refit=True),
        fitted(folder / "bad", shuffled),
    )


def test_a_worse_model_is_refused_and_a_good_one_takes_the_place(days: tuple[Run, Run, Run], tmp_path: Path) -> None:
    old, new, bad = days
    first = api.publish(old, tmp_path / "store", beat=Beat())
    assert first.manifest.challenge is None
    with pytest.raises(
        BundleError, match=rf"not published, CURRENT stays {first.id}: worse: ndcg@5 0\.\d+, of {first.id}"
    ) as e:
        api.publish(bad, tmp_path / "store", beat=Beat())
    assert e.value.reason == "challenge"
    store = api.retriever(tmp_path / "store").bundle.folder.parents[1]
    lines = [json.loads(line) for line in (store / "HISTORY.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["publish", "refused"]
    assert lines[1]["reason"].startswith("worse: ndcg@5")
    forced = api.publish(bad, tmp_path / "store", beat=Beat(metric="recall@5"), force=True)
    assert forced.manifest.forced
    assert forced.manifest.challenge is not None
    assert forced.manifest.challenge.metric == "recall@5"
    again = api.publish(new, tmp_path / "store", beat=Beat(first.id, "ndcg@5"))
    found = again.manifest.challenge
    assert found is not None
    assert (found.champion, found.verdict) == (first.id, "better")
    assert found.values[1] > found.values[0]
    # Only rows after those that the champion has learned count.
    test = new.dataset.test.user[
        (new.dataset.times_of(2) > (first.manifest.learned.until or 0)) & new.dataset.test.positive
    ]
    assert found.users == len(np.unique(test))
    # The model that was compared is the one before its refit, and the one of all rows is published.
    assert again.manifest.learned.rows == len(new.dataset.pairs)


def test_without_rows_that_both_lack_nothing_is_published(days: tuple[Run, Run, Run], tmp_path: Path) -> None:
    old, new, _ = days
    api.publish(new, tmp_path / "store")
    with pytest.raises(BundleError, match="no positive of the test part is newer than the rows that .* knows"):
        api.publish(old, tmp_path / "store", beat=Beat())


def test_a_log_without_times_and_a_wrong_metric_are_refused(days: tuple[Run, Run, Run], tmp_path: Path) -> None:
    schema = Schema.model_validate(CHECKERBOARD_SCHEMA.model_dump() | {"time": "", "time_unit": "s"})
    run = api.fit((None, None, checkerboard()[2]), schema, settings(), folder=tmp_path / "run")
    api.publish(run, tmp_path / "store")
    with pytest.raises(BundleError, match="a log without times does not tell which rows both models lack"):
        api.publish(run, tmp_path / "store", beat=Beat())
    api.publish(days[0], tmp_path / "timed")
    with pytest.raises(BundleError, match=r"no metric 'ndcg@7'.*allowed: .*ndcg@5"):
        api.publish(days[1], tmp_path / "timed", beat=Beat(metric="ndcg@7"))


def test_options_of_the_command(days: tuple[Run, Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["publish", str(days[1].folder), "--store", str(tmp_path / "store")]
    for more, said in (
        (["--strict"], "--strict goes with --beat"),
        (["--metric", "ndcg@5"], "--metric goes with --beat"),
    ):
        assert run_command([*words, *more]) == 2
        assert said in capsys.readouterr().err
    api.publish(days[0], tmp_path / "store")
    capsys.readouterr()
    assert run_command([*words, "--beat", "current", "--strict"]) == 0
    assert "better: ndcg@5" in capsys.readouterr().out
    assert run_command(["publish", str(days[2].folder), "--store", str(tmp_path / "store"), "--beat", "none"]) == 2
