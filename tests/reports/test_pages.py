"""Pages of reports: of a run, and of several runs compared with the first."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worlds import EVERYTHING_SCHEMA, everything, settings

from twotower import api
from twotower.errors import RunError
from twotower.reports.compare import (
    MAX_RUNS,
    ComparedRun,
    compare_with_first,
)
from twotower.reports.figure import Figure
from twotower.reports.metric_tables import cell
from twotower.reports.pages import COLORS, run_page, write_comparison
from twotower.runs import Run


def of_metrics(metrics: dict[str, float], evaluation: dict[str, Any], **figures: list[Figure]) -> str:
    """Return the page of a run with these metrics and these settings of its evaluation."""
    config = settings(evaluation=evaluation, train={"monitor": "validation.auc"})
    dataset = SimpleNamespace(test=range(90), describe=lambda: "")
    run: Any = SimpleNamespace(folder=None, config=config, metrics=metrics, dataset=dataset)
    return run_page(run, defaultdict(list, figures))


@pytest.mark.parametrize("alone", [True, False])
def test_cold_items_have_a_row_among_all_and_one_among_themselves(alone: bool) -> None:
    metrics = {"test.rows.cold_item": 7, "test.recall@10": 0.5, "test.recall@10.cold_item": 0.0312}
    if alone:
        metrics["test.recall@10.cold_item_alone"] = 0.2468
    found = of_metrics(metrics, {"k": [10]})
    among_all = found.partition("cold items (no training interaction)")[2].partition("</tr>")[0]
    assert "<td>7</td>" in among_all
    assert "0.0312" in among_all
    assert ("cold items, ranked among themselves" in found) == ("0.2468" in found) == alone


SLICED = {"k": [5], "bootstrap": 20, "slices": ["city"], "slice_min_users": 1, "new_item_below": 20}


def trained(name: str, **sections: dict[str, object]) -> Run:
    sections["evaluation"] = SLICED | sections.get("evaluation", {})
    run = api.fit(everything(), EVERYTHING_SCHEMA, settings(**sections))
    return replace(run, folder=Path(f"runs/{name}"))


@pytest.fixture(scope="module")
def base() -> Run:
    return trained("base")


@pytest.fixture(scope="module")
def other() -> Run:
    return trained("<i>other", train={"seed": 2, "epochs": 3, "lr": 0.05}, evaluation={"new_item_below": 24})


@pytest.fixture(scope="module")
def shifted() -> Run:
    return trained("shifted", split={"seed": 3})


@pytest.fixture(scope="module")
def compared(base: Run, other: Run, shifted: Run) -> list[ComparedRun]:
    return compare_with_first(iter([base, shifted, other]), resamples=100, sliced=True)


def test_two_runs_that_cannot_be_compared_are_an_error_and_so_are_too_few_and_too_many(base: Run, shifted: Run) -> None:
    with pytest.raises(RunError, match="runs/shifted was not tested on the pairs of runs/base"):
        compare_with_first([base, shifted])
    with pytest.raises(RunError, match="runs/shifted was not tested on the pairs of runs/base"):
        compare_with_first([base, shifted, shifted])
    with pytest.raises(RunError, match="1 runs are given; a comparison needs at least 2"):
        compare_with_first([base])
    with pytest.raises(RunError, match=f"more than {MAX_RUNS} runs"):
        compare_with_first([base, *[shifted] * MAX_RUNS])
    assert len(COLORS) == MAX_RUNS


@pytest.fixture(scope="module")
def page(compared: list[ComparedRun], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    write_comparison(path, compared)
    return path.read_text(encoding="utf-8")


def rows(page: str, title: str) -> dict[str, list[str]]:
    """The rows of the first table after a title, by their first cell, as text."""
    table = page.partition(f">{title}</h")[2].partition("<table")[2].partition("</table>")[0]
    found = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    return {_text(row[0]): [_text(c) for c in row[1:]] for row in found}


def _text(cell: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", cell)).strip()


def test_the_page_has_the_metrics_and_intervals_of_each_run_that_can_be_compared(
    page: str, base: Run, other: Run
) -> None:
    found = rows(page, "Test metrics")
    assert {"auc", "gauc", "recall@5", "coverage@5"} <= found.keys()
    for name, (*values, popularity) in found.items():
        for value, run in zip(values, (base, other), strict=True):
            assert value.split()[0] == cell(run.metrics[f"test.{name}"])
            if f"test.{name}.low" in run.metrics:
                assert value.split()[1::2] == [cell(run.metrics[f"test.{name}.{end}"]) for end in ("low", "high")]
        assert popularity == cell(base.metrics.get(f"baseline.popularity.{name}"))
    assert "<b>B shifted</b> cannot be compared with A base and is left out below: runs/shifted was not tested" in page


def test_the_page_has_the_differences_that_the_terminal_shows(page: str, compared: list[ComparedRun]) -> None:
    found = rows(page, "Differences")
    assert list(found) == [c.metric for c in compared[2].comparisons]
    for c in compared[2].comparisons:
        assert found[c.metric][0].split()[:4] == [f"{c.difference:+.4f}", f"{c.low:+.4f}", "to", f"{c.high:+.4f},"]


def test_slices_of_the_first_run_have_paired_differences_with_their_intervals(
    page: str, compared: list[ComparedRun], base: Run
) -> None:
    found, differences = rows(page, "recall@5"), {(c.metric, c.of): c for c in compared[2].slices}
    name = next(name for name in found if name.startswith("city = "))
    of = name.replace(" = ", "=")
    size, first, second = found[name]
    c = differences["recall@5", of]
    assert int(size) == base.metrics[f"test.users.{of}"]
    assert first == cell(base.metrics[f"test.recall@5.{of}"])
    assert second.split()[:6] == [f"{c.difference:+.4f}", f"{c.low:+.4f}", "to", f"{c.high:+.4f},", "p", f"{c.p:.3f}"]
    assert c.low < c.high
    assert any(name.startswith("head") for name in found)
    assert any(
        name.startswith("new items (fewer than 20") for name in found
    )  # of the first run; 24 are those of the other
    assert compared[1].slices == compared[0].slices == []


def test_options_that_differ_are_listed_and_those_of_a_run_left_out_are_not(page: str) -> None:
    found = rows(page, "Options")
    assert found["train.lr"] == ["0.02", "0.05"]
    assert found["evaluation.new_item_below"] == ["20", "24"]
    assert "split.seed" not in found
    assert "train.batch_size" not in found


def test_losses_stand_over_each_other_only_where_they_are_of_one_kind(
    compared: list[ComparedRun], tmp_path: Path
) -> None:
    first, _, third = compared
    path = tmp_path / "page.html"
    write_comparison(path, [first, third])
    same = path.read_text(encoding="utf-8")
    assert "<b>Loss</b>" in same
    assert "losses are comparable only" not in same
    larger = third.config.model_copy(update={"train": third.config.train.model_copy(update={"batch_size": 7})})
    write_comparison(path, [first, replace(third, config=larger)])
    differing = path.read_text(encoding="utf-8")
    assert "<b>Loss</b>" not in differing
    assert "The loss leaves out C &lt;i&gt;other: losses are comparable only" in differing


def test_the_page_loads_nothing_and_shows_names_as_text(page: str) -> None:
    body = page.partition("<body>")[2]
    assert len(page.encode()) < 1_500_000
    assert "<i>" not in body
    assert "C &lt;i&gt;other" in body
    assert not re.search(r"<(script|link|img)\b", page)
