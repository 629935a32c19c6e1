"""The search for the values of a closed form, by scores whose best place is known."""

from __future__ import annotations

import math

import pytest

from twotower.scorers import Ials, Start
from twotower.scorers.search import search

GIVEN = Ials(unobserved=(0.03, 0.3), regularization=(0.004, 0.032))


def test_one_hill_has_one_leader() -> None:
    tried = list[tuple[float, ...]]()

    def score(start: Start) -> float:
        tried.append(start.values)
        return 1 / (1 + abs(math.log(tried[-1][0] / 0.09)) + abs(math.log(tried[-1][1] / 0.011)))

    chosen = search(GIVEN, score)
    assert chosen.values[0] == pytest.approx(0.09, rel=0.2)
    assert len(set(tried)) == len(tried) <= 4 + 2 + 2 * 8, "no values are tried twice"


def test_values_that_cannot_be_solved_end_the_search() -> None:
    tried = list[Start]()

    def score(start: Start) -> float:
        tried.append(start)
        return -math.inf

    assert search(GIVEN, score) in GIVEN.alternatives()
    assert len(tried) == 4


def score_at(start: Start, at: tuple[float, float] | None) -> float:
    """A validation metric that is best at one place of both options, or rises for ever."""
    a, rate = start.values
    if at is None:
        return rate
    return -math.inf if rate < 1e-4 else -abs(math.log(a / at[0])) - abs(math.log(rate / at[1]))


@pytest.mark.parametrize(
    "at",
    [
        (0.2, 0.02),  # given
        (0.011, 0.3),  # beyond one end of each
        (0.8, 1.1e-4),  # beyond the other ends; what is too small is no error
        (0.29, 0.012),  # between two
        (0.05, 0.029),  # beyond, and between
    ],
)
def test_values_beyond_the_given_ones_are_tried_while_they_are_better_and_then_those_between(
    at: tuple[float, float],
) -> None:
    chosen = chosen_by(at)
    assert chosen.values[0] == pytest.approx(at[0], rel=0.2)
    assert chosen.values[1] == pytest.approx(at[1], rel=0.2)


def test_a_search_beyond_and_between_has_an_end() -> None:
    assert 0.04 * 2**8 <= chosen_by(None).values[1] < 0.04 * 2**9


def chosen_by(at: tuple[float, float] | None) -> Start:
    given = Ials(unobserved=(0.1, 0.2, 0.4), regularization=(0.01, 0.02, 0.04))
    return search(given, lambda start: score_at(start, at))


def test_options_that_make_up_for_one_another_are_changed_together() -> None:
    def on_a_ridge(start: Start) -> float:
        a, rate = start.values
        return -abs(math.log(a * rate / 0.02)) - 0.1 * abs(math.log(a / 0.15))

    chosen = search(Ials(unobserved=(0.1, 0.4), regularization=(0.05, 0.2)), on_a_ridge)
    assert chosen.values[0] == pytest.approx(0.15, rel=0.1)
