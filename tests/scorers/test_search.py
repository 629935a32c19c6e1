"""The search for the values of a start, by scores whose best place is known."""

from __future__ import annotations

import math

import pytest

from twotower.evaluation.config import EvaluationConfig
from twotower.scorers import Ials, Start
from twotower.scorers.search import MAX_SCORES, MIN_USERS, evaluation_of_search, search

GIVEN = Ials(unobserved=(0.03, 0.3), regularization=(0.004, 0.032))


def test_the_search_goes_on_from_two_that_are_as_good() -> None:
    at, tried = (0.169, 0.0113), list[tuple[float, float]]()

    def score(start: Start) -> float:
        """Two hills, whose lower one has a point that is a little better than the nearest one of the higher."""
        a, rate = start.value_of("unobserved"), start.value_of("regularization")
        tried.append((a, rate))
        da, dr = math.log(a / at[0]), math.log(rate / at[1])
        high = 0.2345 - (0.02 * da if da > 0 else -0.0064 * da) - (0.03 * dr if dr > 0 else -0.02 * dr)
        low = 0.2312 - 0.04 * abs(math.log(a / 0.95)) - 0.04 * abs(math.log(rate / 0.004))
        return max(high, low)

    chosen = search(GIVEN, score)
    assert chosen.value_of("unobserved") == pytest.approx(at[0], rel=0.05)
    assert chosen.value_of("regularization") == pytest.approx(at[1], rel=0.05)
    assert len(set(tried)) == len(tried), "no values are tried twice"


def test_one_hill_has_one_leader() -> None:
    tried = list[tuple[float, float]]()

    def score(start: Start) -> float:
        tried.append((start.value_of("unobserved"), start.value_of("regularization")))
        return 1 / (1 + abs(math.log(tried[-1][0] / 0.09)) + abs(math.log(tried[-1][1] / 0.011)))

    chosen = search(GIVEN, score)
    assert chosen.value_of("unobserved") == pytest.approx(0.09, rel=0.2)
    assert len(tried) <= 4 + 2 * 8 + 2


def test_values_that_cannot_be_solved_end_the_search() -> None:
    tried = list[Start]()

    def score(start: Start) -> float:
        tried.append(start)
        return -math.inf

    assert search(GIVEN, score) in GIVEN.alternatives()
    assert len(tried) == 4


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
