"""Slices and negatives in the report of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worlds import settings

from twotower.evaluation.config import EvaluationConfig
from twotower.reports.charts import curves, negatives
from twotower.reports.figure import Figure, Series
from twotower.reports.html import _slices, _summary
from twotower.reports.page import page, section

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("alone", [True, False])
def test_cold_items_have_a_row_among_all_and_one_among_themselves(alone: bool) -> None:
    config = EvaluationConfig(k=(10,))
    metrics = {"test.rows.cold_item": 7, "test.recall@10": 0.5, "test.recall@10.cold_item": 0.0312}
    if alone:
        metrics["test.recall@10.cold_item_alone"] = 0.2468
    run: Any = SimpleNamespace(
        config=SimpleNamespace(evaluation=config), metrics=metrics, dataset=SimpleNamespace(test=range(90))
    )
    found = _slices(run)
    among_all = found.partition("cold items (no training interaction)")[2].partition("</tr>")[0]
    assert "<td>7</td>" in among_all
    assert "0.0312" in among_all
    assert ("cold items, ranked among themselves" in found) == ("0.2468" in found) == alone


def test_each_source_of_negatives_is_a_line_over_the_epochs_in_which_it_drew() -> None:
    history = [
        {"epoch": 1, "train.negatives.uniform.share": 1.0, "train.negatives.uniform.above": 0.3, "train.negatives.uniform.n": 99.4},
        {"epoch": 2},
        {
            "epoch": 3, "train.negatives.uniform.share": 0.75, "train.negatives.uniform.above": 0.2, "train.negatives.uniform.n": 98.0,
            "train.negatives.my.kinds:Near.share": 0.25, "train.negatives.my.kinds:Near.above": 0.5, "train.negatives.my.kinds:Near.n": 2.5,
        },
    ]  # fmt: skip
    run: Any = SimpleNamespace(history=history)
    share, above = negatives(run)
    assert [(t.name, t.x, t.y) for t in share.series] == [
        ("uniform (98 a positive)", [1, 3], [1.0, 0.75]),
        ("Near (2.5 a positive)", [3], [0.25]),
    ]
    assert [t.y for t in above.series] == [[0.3, 0.2], [0.5]]
    assert "Near (2.5 a positive)" in share.html()
    run.history = [{"epoch": 1, "train.loss": 0.5}]
    assert negatives(run) == []


def test_curves_name_only_metrics_that_have_values() -> None:
    """A part with one pair of each user has no AUC within users."""
    evaluation = EvaluationConfig(k=(10,))
    loss = SimpleNamespace(pointwise=True)
    history = [{"epoch": 1, "train.loss": 0.5, "validation.auc": 0.7, "validation.log_loss": 0.6}]
    run: Any = SimpleNamespace(
        history=history, metrics={"train.best_epoch": 1}, config=SimpleNamespace(evaluation=evaluation, loss=loss)
    )
    loss_curve, auc = curves(run)
    assert [t.name for t in loss_curve.series] == ["train loss (weighted)", "validation log loss"]
    assert [t.name for t in auc.series] == ["auc"]
    run.history = []  # of a model that is its start
    assert curves(run) == []


@pytest.mark.parametrize(
    ("repeats", "words"),
    [("exclude", "are left out."), ("allow", "are ranked as all others."), ("only", ": only items")],
)
def test_the_page_says_how_items_that_a_user_has_seen_are_ranked(repeats: str, words: str) -> None:
    run: Any = SimpleNamespace(
        config=settings(evaluation={"repeats": repeats}, train={"monitor": "validation.auc"}), metrics={}
    )
    assert words in _summary(run).replace("\n", " ")
    assert ("left out" in _summary(run)) == (repeats == "exclude")


@pytest.mark.system
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_as_wide_as_the_screen_and_a_wide_table_scrolls_in_its_box(width: int) -> None:
    from playwright import sync_api

    cells = "".join(f"<td>0.{n:04}</td>" for n in range(9))
    table = f"<table><tr><td>transition counts</td>{cells}</tr></table>"
    row = "x" * 20
    figure = Figure("recall", "epoch", rows=[row], series=[Series("", [0.5], [row], "red", "bar")])
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.set_content(page("a run", "", [table, section("Figures", "", [figure, figure])]))
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        box, first, svg = (tab.locator(of).first for of in ("table", "td", "figure svg"))
        assert (box.evaluate("t => t.scrollWidth > t.clientWidth")) == (width == 390)
        at = first.bounding_box()
        box.evaluate("t => t.scrollLeft = 200")
        assert first.bounding_box() == at, "the names of the rows stay"
        drawn = svg.bounding_box()
        assert drawn
        assert drawn["width"] > 340
        assert drawn["x"] + drawn["width"] <= width
        browser.close()
