"""Widths that a composed config has."""

from __future__ import annotations

import pytest

from twotower.suggestion.composition import mutual_width


@pytest.mark.parametrize(
    ("both", "width"),
    [(1, 1), (40, 40), (1_000, 1_000), (65_536, 1_024), (500_000, 134), (1_048_576, 64), (1_100_000, 0)],
)
def test_the_pair_of_users_that_are_items_fits_into_memory(both: int, width: int) -> None:
    assert mutual_width(both) == width
