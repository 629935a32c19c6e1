"""The rows of the recipe are some of its pairs."""

from __future__ import annotations

import pytest

from benchmarks.lib.columns import with_pairs
from benchmarks.quality.collaborative import DECLARED, recipe


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ("ials", ["ials"]),
        ("recipe", ["ials", "ease"]),
        ("columns", ["ials", "ease", "content", "next_content", "user_content"]),
    ],
)
def test_a_row_keeps_pairs_with_their_starts(row: str, kinds: list[str]) -> None:
    kept = with_pairs(recipe()[1], DECLARED["rows"][row]["pairs"])
    assert [(start.kind, start.pair) for start in kept.train.start] == [(kind, n) for n, kind in enumerate(kinds)]
    assert len(kept.model.pairs) == len(kinds)


def test_starts_follow_their_pairs() -> None:
    _, config = recipe()
    kept = with_pairs(config, [4, 1])
    assert {start.kind: start.pair for start in kept.train.start} == {"user_content": 0, "ease": 1}
    assert kept.model.pairs == (config.model.pairs[4], config.model.pairs[1])
