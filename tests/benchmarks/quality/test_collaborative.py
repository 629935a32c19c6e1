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
        ("columns", ["ials", "ease", "columns"]),
    ],
)
def test_a_row_keeps_pairs_with_their_starts(row: str, kinds: list[str]) -> None:
    kept = with_pairs(recipe()[1], DECLARED["rows"][row]["pairs"])
    assert [(n, form.kind) for n, form in kept.solved.items()] == [*enumerate(kinds)]
    assert len(kept.model.pairs) == len(kinds)
