"""Widths that a composed config has."""

from __future__ import annotations

import pytest

from twotower.suggestion.composition import mutual_width
from twotower.suggestion.guess import Mutual


@pytest.mark.parametrize(
    ("both", "of_a_side", "width"),
    [(1, 1, 1), (40, 50, 40), (1_000, 1_000, 1_000), (65_536, 65_536, 1_024), (60_000, 500_000, 134), (9, 1_048_576, 9),
     (1_000, 1_048_576, 64), (1_000, 1_100_000, 0)],
)  # fmt: skip
def test_the_pair_of_users_that_are_items_fits_into_memory(both: int, of_a_side: int, width: int) -> None:
    assert mutual_width(Mutual(both, of_a_side)) == width
