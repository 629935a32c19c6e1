"""The counters of what follows what, by hand, and which interactions they count."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from benchmarks.quality.baselines import pctm, ranked, rules
from benchmarks.quality.films import Films

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
FILMS = Films.of(np.repeat([1, 2], [5, 4]), np.array([10, 20, 30, 40, 50, 10, 30, 20, 40]))
"""Train parts 10 20 30 and 10 30: 10 to 20 and 30 (gap 2, then 1), 20 to 30."""


def test_sequential_rules_are_shares_of_what_follows_and_the_latest_count_most() -> None:
    ((settings, score),) = rules(FILMS, span=2, lags=[1.0], smooth=[0.5], recent=[1.0])
    scores = score("validation").catalogue_scores(np.arange(2))
    after_10, after_20 = {20: 1 / 3, 30: 1.5 / 3}, {30: 1 / 1.5}
    # Nothing follows 30, the latest of both; the weights 1 and 1/2 are shares of their sum.
    assert scores[0].tolist() == pytest.approx([0, 0, after_20[30] / 3, 0, 0])
    assert scores[1].tolist() == pytest.approx([0, after_10[20] / 3, after_10[30] / 3, 0, 0])
    assert settings["smooth"] == 0.5
    rank, width = ranked(FILMS, score, "validation")
    assert (rank.tolist(), width) == ([2, 1], None), "a target comes after items of an equal score"


def test_pctm_adds_logarithms_and_a_multiple_of_log_popularity() -> None:
    ((_, score),) = pctm(FILMS, 1, lags=[1.0], pseudo=[0.5], rates=[0.5], popular=[-1.0])
    scores = score("test").catalogue_scores(np.arange(2))
    share = [3 / 10, 2 / 10, 3 / 10, 1 / 10, 1 / 10]
    assert scores[1].tolist() == pytest.approx([log(3) * (n == 2) - log(s) for n, s in enumerate(share)])


def test_the_items_of_validation_are_counted_for_the_test_alone_and_where_a_row_says_so() -> None:
    found = {}
    for too in (False, True):
        ((_, score),) = rules(FILMS, 2, [1.0], [0.0], [1.0], validation_too=too)
        found[too] = {part: score(part).catalogue_scores(np.arange(2))[0].tolist() for part in ("validation", "test")}
    assert found[True]["validation"] == found[False]["validation"]
    assert found[False]["test"] == [0, 0, 0, 0, 0], "nothing follows 30 and 40 in the train parts"
    # 40 follows 30 in the validation part of the first user, 20 in that of the second.
    assert found[True]["test"] == pytest.approx([0, 1 / 6, 0, 1 / 6, 0])
