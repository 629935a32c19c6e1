"""Thresholds of labels by their values, and columns that may be labels."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from twotower.suggestion.thresholds import MAX_STEPS, may_be_labels, no_rating, threshold, why_threshold

MANY = [float(value) for value in range(MAX_STEPS + 1)]


@pytest.mark.parametrize(
    ("values", "above", "why"),
    [
        ([0, 1], 0.0, "two values: 1 is a positive, 0 a negative"),
        ([4, 5, 4], 4.0, "two values"),
        ([True, False], 0.0, "two values"),
        ([1, 2, 3, 4, 5], 3.0, "the middle of 1 to 5"),
        ([1.0, 1.25, 1.5], 1.25, "the second largest of 1 to 1.5"),
        ([1, 2, 10], 2.0, "the second largest of 1 to 10, whose middle is above it"),
        ([0.5 * half for half in range(1, 11)], 3.0, "the middle of 0.5 to 5, rounded up"),
        ([0.0, 0.5, 1.0], 0.5, "the middle of 0 to 1"),
        ([-3, 0, 10], 0.0, "what is above 0"),
        ([-1.0, *MANY], 0.0, "what is above 0"),
        ([*MANY[:-1], *[4.0] * 9], 10.0, "the middle of 0 to 19, rounded up"),
        ([*MANY, *[4.0] * 30], 4.0, "the median of 21 distinct values from 0 to 20"),
        ([*MANY, *[19.0] * 30], 19.0, "the median of 21 distinct values from 0 to 20"),
        ([*MANY, *[20.0] * 30], 19.0, "of 21 distinct values the largest, 20, is half of the rows or nearly so"),
        ([None, 1.0, np.nan, 2.0, np.inf], 1.0, "two values: 2 is a positive"),
        ([None, None], 0.0, "it has no values"),
    ],
)
def test_a_threshold_follows_the_values(values: list[float | None], above: float, why: str) -> None:
    series = pl.Series(values)
    assert threshold(series) == above
    assert why in why_threshold(series)


@pytest.mark.parametrize(
    ("rows", "apart"),
    [
        ({-1: 400, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, -1.0),
        ({0: 1500, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, 0.0),
        ({0: 1500, 0.5: 20, 1: 10, 2: 50, 3.5: 300, 4: 900}, 0.0),
        ({-0.0: 1500, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, 0.0),
        ({0: 1470, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, None),
        ({-1: 80, 1: 20, 2: 50, 3: 300, 4: 900, 5: 250}, -1.0),
        ({-1: 79, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, None),
        ({-1: 70, 1: 5, 2: 50, 3: 300, 4: 900, 5: 200}, None),
        ({0: 9000, 1: 900, 2: 300, 3: 90, 4: 30, 5: 10}, None),
        ({0: 9000, 1: 20, 2: 300, 3: 90, 4: 500}, None),
        ({0: 300, 1: 20, 2: 15, 3: 15, 4: 15, 5: 60, 6: 50, 7: 90, 8: 200, 9: 180, 10: 250}, None),
        ({-2: 1, -1: 400, 1: 20, 2: 50, 3: 300, 4: 900, 5: 200}, None),
        ({1: 9000, 2: 20, 3: 50, 4: 300, 5: 900, 6: 10}, None),
        ({-1: 9000, 0: 20, 1: 50, 2: 300, 3: 900, 4: 50}, None),
        ({-1: 9000, **dict.fromkeys(range(1, MAX_STEPS + 1), 9), MAX_STEPS: 10}, -1.0),
        ({-1: 9000, **dict.fromkeys(range(1, MAX_STEPS + 2), 9), MAX_STEPS: 10}, None),
        ({}, None),
    ],
)
def test_a_label_apart_from_a_scale_stands_for_no_rating(rows: dict[float, int], apart: float | None) -> None:
    assert no_rating(pl.Series("rows", [float(v) for v, n in rows.items() for _ in range(n)], pl.Float64)) == apart


def test_a_label_for_no_rating_is_no_step_of_the_scale() -> None:
    ratings = pl.Series([1, *[2] * 5, *[3] * 30, *[4] * 40, *[5] * 20, *[None] * 3])
    unrated = pl.Series([-1] * 50)
    assert no_rating(pl.concat([ratings, unrated])) == -1
    assert threshold(pl.concat([ratings, unrated])) == threshold(ratings) == 3
    assert why_threshold(pl.concat([unrated, ratings])) == "the middle of 1 to 5, beside -1 for no rating"


def test_labels_are_finite_numbers_that_vary_for_users_and_items() -> None:
    user, item = np.divmod(np.arange(12), 4)
    frame = pl.DataFrame(
        {
            "user": user, "item": item, "name": ["a", "b"] * 6, "of_user": user * 2, "of_item": item + 0.5, "one": 1,
            "gap": [None, *range(11)], "endless": [np.inf, *[0.5, 1.5] * 5, 1.0], "taken": user * item,
            "liked": user == item, "seconds": np.arange(12) % 5,
        }
    )  # fmt: skip
    assert may_be_labels(frame, ["user", "item", "taken"], ["user", "item"]) == ["liked", "seconds"]
