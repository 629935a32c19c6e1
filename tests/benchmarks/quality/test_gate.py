"""The users of a case are those of a power calculation, and the log has the weeks that its faults leave out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.quality.gate import METRIC, TEST_FROM, WEEK, Effect, made_log, named, shuffled, trained, week_old
from twotower.publishing.challenge import judge

RNG = np.random.default_rng(0)


def test_a_fault_is_named_by_the_calculated_users_and_rarely_by_a_quarter() -> None:
    effect = Effect(-0.05, 0.2)
    n = effect.users()
    assert n == 294  # ((1.96 + 2.326) 0.2 / 0.05)^2
    assert effect.chance(n) == pytest.approx(0.99, abs=0.001)

    def found(users: int) -> int:
        old = np.full(users, 0.5)
        verdicts = [judge(old, old + RNG.normal(-0.05, 0.2, users), METRIC, "a").verdict for _ in range(40)]
        return verdicts.count("worse")

    assert found(n) >= 37
    assert found(n // 4) <= 34
    with pytest.raises(ValueError, match=r"does no harm: the mean difference is \+0\.0100"):
        Effect(0.01, 0.2).users()


def test_equal_models_are_rarely_named_though_one_is_better_for_each_user() -> None:
    old, new = np.full(500, 0.5), np.full(500, 0.4)
    assert named(20, (old, new), 500, 1) == 20
    assert named(20, (old, new), 500, 1, exchange=True) <= 3


def test_faults_of_the_log_leave_the_test_as_it_is(tmp_path: Path) -> None:
    log = made_log(300, 200, 1)
    test = log.filter(pl.col("part") == "test")
    assert (test["at"] >= TEST_FROM).all()
    assert len(test) == log.filter(pl.col("at") >= TEST_FROM).height
    assert not log.select("user_id", "item_id").is_duplicated().any()
    other = shuffled(log, 1)
    assert other.filter(pl.col("part") == "test").equals(test)
    assert other["liked"].sum() == log["liked"].sum()
    assert not other.equals(log)
    run = trained(log, tmp_path / "run", 1)
    old = week_old(run, tmp_path / "old").dataset
    assert len(old.test) == len(run.dataset.test) == len(test)
    before = log.filter(pl.col("at") < TEST_FROM - WEEK)
    assert len(old.pairs) == len(before) + len(test)
