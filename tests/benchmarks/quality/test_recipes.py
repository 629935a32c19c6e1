"""The logs that recipes are measured on have the shapes of their recipes, and a row is trained as suggested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.lib.report import Report, declared, options
from benchmarks.quality import recipes
from benchmarks.quality.recipes import LOGS, main
from twotower.suggestion.recipes import recipe_names
from twotower.suggestion.suggest import suggest

ROWS = declared(recipes.__file__)["recipes"]


def test_each_row_names_a_recipe_and_a_log() -> None:
    assert set(ROWS) <= set(recipe_names())
    assert {name for row in ROWS.values() for name in row["logs"]} == set(LOGS)


@pytest.mark.parametrize(
    ("recipe", "made"), [(recipe, name) for recipe in ROWS for name in ROWS[recipe]["logs"] if name.startswith("made")]
)
def test_the_rules_choose_the_recipe_for_its_made_logs(recipe: str, made: str) -> None:
    assert suggest(*LOGS[made]("")).recipe == recipe


@pytest.mark.system
def test_a_row_has_the_metrics_of_the_model_and_its_best_baseline(tmp_path: Path) -> None:
    words = ["--quick", "--only", "ranking, made", "--out", str(tmp_path / "rows.json")]
    chosen = options(recipes.__file__, words)
    with Report(chosen, "recipes") as report:
        main(chosen, report)
    results = {r["name"]: r["value"] for r in json.loads((tmp_path / "rows.json").read_text())["results"]}
    row = "recipes: ranking, made, shown and liked"
    assert set(results) == {f"{row}, {end}" for end in ("auc", "auc, bias", "gauc", "gauc, popularity")}
    assert 0.5 < results[f"{row}, auc, bias"] < results[f"{row}, auc"], "the biases are a term of the score"
