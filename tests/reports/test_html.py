"""Slices in the report of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from twotower.evaluation.config import EvaluationConfig
from twotower.reports.html import _slices


@pytest.mark.parametrize("alone", [True, False])
def test_cold_items_have_a_row_among_all_and_one_among_themselves(alone: bool) -> None:
    config = EvaluationConfig(k=(10,))
    metrics = {"test.rows.cold_item": 7, "test.recall@10": 0.5, "test.recall@10.cold_item": 0.0312}
    if alone:
        metrics["test.recall@10.cold_item_alone"] = 0.2468
    run: Any = SimpleNamespace(
        config=SimpleNamespace(evaluation=config), metrics=metrics, dataset=SimpleNamespace(test=range(90))
    )
    page = _slices(run)
    among_all = page.partition("cold items (no training interaction)")[2].partition("</tr>")[0]
    assert "<td>7</td>" in among_all
    assert "0.0312" in among_all
    assert ("cold items, ranked among themselves" in page) == ("0.2468" in page) == alone
