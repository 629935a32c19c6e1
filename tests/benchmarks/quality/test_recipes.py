"""The logs that recipes are measured on have the shapes of their recipes, and a row is trained as suggested."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from benchmarks.lib.report import Report, declared, options
from benchmarks.quality import recipes
from benchmarks.quality.recipes import LAST, LOGS, Log, main
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


def test_parts_of_a_log_keep_its_other_tables() -> None:
    rows = [(user, item, 5 - item % 3, item) for user in range(10) for item in range(20)]
    log = Log(pl.DataFrame(rows, ("user_id", "item_id", "rating", "timestamp"), orient="row"), pl.DataFrame(), None)
    last, likes, some = log.last(), log.likes(), log.some_users()
    assert (
        last.interactions.group_by("user_id").agg(pl.col("item_id").sort())["item_id"].to_list()
        == [[*range(20 - LAST, 20)]] * 10
    )
    assert likes.interactions.columns == ["user_id", "item_id"]
    assert len(likes.interactions) == sum(rating >= 4 for _, _, rating, _ in rows)
    assert some.interactions["user_id"].n_unique() == 2
    assert len(some.interactions) == 40
    assert all(part.users is log.users for part in (last, likes, some))


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


def test_rows_of_an_archive_that_is_not_named_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = options(recipes.__file__, ["--only", "short sequences"])
    with Report(chosen, "recipes") as report:
        main(chosen, report)
    assert not report.results
    assert capsys.readouterr().out.count("left out") == 2
