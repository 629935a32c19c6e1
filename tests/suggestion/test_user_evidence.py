"""Evidence that columns of users tell what they take, in worlds where it is known."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from suggestion_worlds import with_columns

from twotower.arrays.types import Ints
from twotower.suggestion.user_evidence import (
    MIN_USER_LIFT,
    UserEvidence,
    column_codes,
    user_evidence,
)

RNG = np.random.default_rng(0)
A, B, NOISE = (RNG.integers(k, size=2_000) for k in (2, 5, 6))
"""Columns of users by code: two that decide, and one that does not."""
USERS = np.repeat(np.arange(2_000), 3)


def taken(noise: float = 0.0, by: Ints = A + 2 * B, n: int = 10) -> Ints:
    """Return items of rows: one of ten that belong to the user's value of `by` alone, or any of all."""
    own = 10 * by[USERS] + RNG.integers(10, size=len(USERS))
    return np.where(RNG.random(len(USERS)) < noise, RNG.integers(10 * n, size=len(USERS)), own)


def test_a_column_that_decides_has_as_many_times_the_agreement_as_it_has_values() -> None:
    found = user_evidence(USERS, taken(by=B), [("b", B), ("noise", NOISE)])
    assert found.columns == ("b",)
    assert found.exists
    assert found.lift == pytest.approx(5, rel=0.1)


def test_columns_that_decide_together_are_looked_at_together() -> None:
    found = user_evidence(USERS, taken(), [("noise", NOISE), ("a", A), ("b", B)])
    assert found.columns == ("b", "a")
    assert found.lift == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_columns_of_chance_tell_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = rng.zipf(1.3, size=len(USERS)) % 500
    found = user_evidence(USERS, items, [("a", rng.permutation(A)), ("b", rng.permutation(B)), ("noise", NOISE)])
    assert not found.exists
    assert found.lift < 1.1


def test_no_columns_no_rows_and_one_row_tell_nothing() -> None:
    none = np.zeros(0, np.int64)
    assert user_evidence(USERS, taken(), []) == UserEvidence()
    assert not user_evidence(none, none, [("a", none)]).exists
    assert not user_evidence(np.zeros(1, np.int64), np.zeros(1, np.int64), [("a", A[:1])]).exists
    assert "no columns of one value to look at" in str(UserEvidence())
    assert "no column of the users tells" in str(user_evidence(USERS, taken(1.0), [("noise", NOISE)]))


def test_rows_that_repeat_a_pair_count_once() -> None:
    items = taken(0.5)
    again = np.tile(np.arange(len(USERS)), 4)
    assert user_evidence(USERS[again], items[again], [("b", B)]) == user_evidence(USERS, items, [("b", B)])


def test_more_noise_is_less_lift() -> None:
    lifts = [user_evidence(USERS, taken(noise), [("a", A), ("b", B)]).lift for noise in (0.0, 0.3, 0.6, 0.9)]
    assert lifts == sorted(lifts, reverse=True)
    assert lifts[0] > MIN_USER_LIFT > lifts[-1]


def test_pairs_of_one_user_are_left_out() -> None:
    users = np.repeat(np.arange(40), 10)  # each of ten items of its group, of which it has none twice
    items = np.concatenate([RNG.permutation(10) + 10 * (user % 4) for user in range(40)])
    assert user_evidence(users, items, [("group", np.arange(40) % 4)]).lift == pytest.approx(4, rel=0.15)


def test_a_value_needs_rows_alone_and_together() -> None:
    items = taken(by=B)
    fine = 400 * B + np.arange(2_000) % 400  # a column that tells no more than the one that it refines
    assert user_evidence(USERS, items, [("fine", fine)]).columns == ()
    assert user_evidence(USERS, items, [("fine", fine), ("b", B)]).columns == ("b",)
    half = 40 * B + np.arange(2_000) % 40
    found = user_evidence(USERS, taken(0.3), [("half", half), ("a", A)])
    assert found.columns == ("half",)
    assert found.beside == ("a",), "200 values have 20 rows each, and 400 have not"
    assert set(found.names) == {"half", "a"}


def test_a_column_that_repeats_another_adds_nothing() -> None:
    found = user_evidence(USERS, taken(0.5, by=B), [("b", B), ("again", (B + 1) % 5), ("noise", NOISE)])
    assert found.columns == ("b",)
    assert found.beside == ()


def test_missing_values_are_no_value() -> None:
    items = taken(by=B)
    some = np.where(np.arange(2_000) % 3 > 0, B, -1)
    assert user_evidence(USERS, items, [("b", some)]).lift == pytest.approx(5, rel=0.1)
    few = np.where(np.arange(2_000) % 3 == 0, B, -1)
    assert user_evidence(USERS, items, [("b", few)]).columns == ()
    both = user_evidence(USERS, taken(), [("a", np.where(np.arange(2_000) % 5 > 0, A, -1)), ("b", some)])
    assert both.lift == pytest.approx(10, rel=0.2)


def test_users_of_many_rows_count_no_more_than_others() -> None:
    rng = np.random.default_rng(1)
    value = rng.integers(2, size=1_000)
    many = np.repeat(np.arange(10), 300)
    users = np.r_[np.repeat(np.arange(1_000), 2), many]
    items = np.r_[rng.integers(400, size=2_000), np.tile(np.arange(300), 10)]
    value[:10] = 0
    assert user_evidence(users, items, [("value", value)]).lift < MIN_USER_LIFT


def test_of_many_rows_some_users_are_looked_at() -> None:
    items = taken(0.5)
    whole = user_evidence(USERS, items, [("a", A)])
    part = user_evidence(USERS, items, [("a", A)], max_rows=2_000)
    assert part.lift == pytest.approx(whole.lift, rel=0.2)
    assert part.lift != whole.lift


def test_codes_tell_values_apart_and_numbers_by_ranges() -> None:
    assert column_codes(pl.Series(["b", None, "a", "b"])).tolist() == [1, -1, 0, 1]
    assert column_codes(pl.Series([None, 1.0, 2.0, 3.0, 4.0]), 2).tolist() == [-1, 0, 0, 1, 1]
    assert column_codes(pl.Series([None] * 8 + [1.0, np.nan, 2.0, np.inf]), 2).tolist() == [-1] * 8 + [0, -1, 1, -1]
    assert len(set(column_codes(pl.Series(np.arange(1000.0)), 16).tolist())) == 16
    assert len(set(column_codes(pl.Series([5.0] * 10), 16).tolist())) == 1


def test_the_made_log_has_the_lift_of_its_making() -> None:
    log, users = with_columns(1.0)
    found = user_evidence(
        log["user_id"].to_numpy(), log["item_id"].to_numpy(), [(c, column_codes(users[c])) for c in ("city", "shoe")]
    )
    assert found.columns == ("city",)
    assert found.lift == pytest.approx(4, rel=0.1)
