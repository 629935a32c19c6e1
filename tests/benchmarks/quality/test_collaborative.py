"""The rows of the recipe are some of its pairs."""

from __future__ import annotations

import pytest

from benchmarks.quality.collaborative import DECLARED, recipe


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ("ials", ["ials"]),
        ("recipe", ["ials", "ease"]),
        ("columns", ["ials", "ease", "columns"]),
    ],
)
def test_a_row_keeps_some_scorers_of_the_recipe(row: str, kinds: list[str]) -> None:
    _, kept = recipe(DECLARED["rows"][row]["scorers"])
    assert [(n, form.kind) for n, form in kept.solved.items()] == [*enumerate(kinds)]
    assert len(kept.model.pairs) == len(kinds)
