"""Slices and negatives in the report of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plotly.graph_objects as go
import pytest
from worlds import settings

from twotower.config.toml import load_config
from twotower.evaluation.config import EvaluationConfig
from twotower.reports.charts import curves, empty_figure, negatives
from twotower.reports.html import _slices, _summary
from twotower.reports.page import page, section
from twotower.reports.tower_drawing import draw_model

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
    assert [(t.name, list(t.x), list(t.y)) for t in share.data] == [
        ("uniform (98 a positive)", [1, 3], [1.0, 0.75]),
        ("Near (2.5 a positive)", [3], [0.25]),
    ]
    assert [list(t.y) for t in above.data] == [[0.3, 0.2], [0.5]]
    assert all(t.showlegend for t in share.data)  # plotly leaves out the name of a line that is alone
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
    assert [t.name for t in loss_curve.data] == ["train loss (weighted)", "validation log loss"]
    assert [(t.name, t.showlegend) for t in auc.data] == [("auc", True)]


@pytest.mark.system
def test_the_towers_fit_into_the_width_of_a_page() -> None:
    from playwright import sync_api

    schema, config = load_config(ROOT / "examples" / "parallel.toml")
    assert schema
    drawing = f"<div class='wide'>{draw_model(schema, config.model)}</div>"
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.set_content(page("towers", "", [drawing]))
        shown, drawn = tab.evaluate(
            "[document.querySelector('.wide').clientWidth, document.querySelector('.wide').scrollWidth]"
        )
        browser.close()
    assert drawn == shown


def test_a_figure_of_a_page_has_the_default_template_and_its_line() -> None:
    figure = empty_figure("Loss", "epoch", "loss", x_axis={"dtick": 2}, vertical=3)
    drawn = re.search(r"Plotly.newPlot\(\s*\S+\s*\[\],\s*(\{.*?\}),\s*\{\"displayModeBar", section("", "", [figure]))
    assert drawn
    expected = go.Figure(
        layout={"title": {"text": "Loss", "font": {"size": 15, "color": "#1f2933"}, "x": 0.0, "xref": "paper"}}
    )
    expected.add_vline(x=3, line_dash="dot", line_color="#8a94a0")
    layout = json.loads(drawn[1])
    for part in ("template", "title", "shapes"):
        assert layout[part] == json.loads(expected.to_json())["layout"][part]
    assert layout["xaxis"]["dtick"] == 2


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
