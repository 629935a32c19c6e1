"""Tables of metrics have the columns of the registry, in its order, and the same cells in every report."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api
from twotower.evaluation.config import EvaluationConfig, MetricSet
from twotower.evaluation.metrics.metric import Prominence
from twotower.reports.compare import compare_with_first, describe_runs
from twotower.reports.metric_tables import ROWS, cell, columns, print_metrics, print_served
from twotower.reports.pages import write_comparison, write_report
from twotower.reports.progress import Progress
from twotower.reports.verdict import verdict

AT_FIVE = EvaluationConfig(k=(5, 9))


def test_a_cell_is_a_dash_for_what_is_undefined() -> None:
    assert [cell(v) for v in (0.25, 1, None, float("nan"), float("inf"))] == ["0.2500", "1.0000", "–", "–", "–"]


def test_the_terminal_shows_every_column_and_row(capsys: pytest.CaptureFixture[str]) -> None:
    number = count(1)
    metrics = {f"{prefix}.{name}": next(number) / 100 for prefix in ROWS.values() for name in columns(AT_FIVE)}
    print_metrics(metrics | {"test.width": 1024}, AT_FIVE)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["test", "width", *columns(AT_FIVE)]
    shown = [line[18:].split() for line in lines]
    assert [line[:18].rstrip() for line in lines] == list(ROWS)
    assert shown == [
        [width, *(f"{metrics[f'{prefix}.{name}']:.4f}" for name in columns(AT_FIVE))]
        for prefix, width in zip(ROWS.values(), ["1,024", "–", "–"], strict=True)
    ]
    print_metrics(metrics, AT_FIVE.model_copy(update={"weighted": True}))
    assert capsys.readouterr().out.startswith("test, by weight  ")


def test_a_bundles_table_has_the_served_metrics_at_every_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    config = EvaluationConfig(k=(2, 7))
    served = {"exact": {"auc": 0.75, "width": 64}, "index": {"recall@7": 0.5}, "live": {"ndcg@2": float("nan")}}
    print_served(served, config)
    head, exact, index, live = capsys.readouterr().out.splitlines()
    names = MetricSet().names([2, 7], Prominence.SERVED)
    assert head.split() == ["test", "width", *names]
    for line, way, found in (
        (exact, "method 1, exact search", {"auc": "0.7500", "width": "64"}),
        (index, "method 1, index", {"recall@7": "0.5000"}),
        (live, "method 2, index", {}),
    ):
        assert line[:24].rstrip() == way
        assert line[24:].split() == [found.get(name, "–") for name in ("width", *names)]


def test_the_table_of_a_bundle_without_precomputed_vectors_has_method_2_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_served({"live": {"auc": 0.5}, "live_exact": {"auc": 0.75}, "intervals": {}}, EvaluationConfig(k=(2,)))
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line[:24].rstrip() for line in lines] == ["method 2, exact search", "method 2, index"]


def test_the_line_of_an_epoch_has_the_most_prominent_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {f"validation.{name}": 0.5 for name in MetricSet().names([3])}
    Progress().on_epoch_end([{"epoch": 2, "train.loss": 0.25, "train.seconds": 1.5, **measured}])
    shown = "  ".join(f"{name} 0.5000" for name in MetricSet().names([3], Prominence.EPOCH))
    assert capsys.readouterr().out == f"epoch   2  loss 0.2500  {shown}  1.5 s\n"


def test_every_report_shows_the_same_numbers_and_the_same_verdict(tmp_path: Path) -> None:
    run = api.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings(evaluation={"bootstrap": 20}), folder=tmp_path / "run")
    assert run.metrics["test.width"] == run.factors().items.shape[1]
    assert api.evaluate(run).items() <= run.metrics.items()
    card = (api.publish(run, tmp_path / "store", force=True).folder / "README.md").read_text(encoding="utf-8")
    config = run.config.evaluation
    write_report(tmp_path / "report.html", run, run.factors())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for label, prefix in ROWS.items():
        row = page.partition(f"<tr><td>{label}</td>")[2].partition("</tr>")[0]
        assert [c.partition(">")[2].removesuffix("</td>") for c in row.split("<td")[1:]] == [
            cell(run.metrics.get(f"{prefix}.{name}"), name) for name in ("width", *columns(config))
        ]
    for name in ("width", *config.metric_set.names(config.k)):
        values = (cell(run.metrics.get(f"{prefix}.{name}"), name) for prefix in ROWS.values())
        assert f"\n| {name} | {' | '.join(values)} |\n" in card
    found = verdict(run.metrics, run.config)
    assert found
    assert "95 % interval" in found.text
    compared = compare_with_first([run, run], resamples=100)
    write_comparison(tmp_path / "comparison.html", compared)
    assert list(describe_runs(compared))[-2:] == [f"A: {found.text}", f"B: {found.text}"]
    comparison = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert [text.count(found.text) for text in (card, page, comparison)] == [1, 1, 2]


def test_a_narrow_terminal_gets_the_columns_below_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["width", *columns(AT_FIVE)]
    metrics = {f"{prefix}.{name}": 0.5 for prefix in ROWS.values() for name in names}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width in (60, 10, 300):
        monkeypatch.setenv("COLUMNS", str(width))
        print_metrics(metrics, AT_FIVE)
        lines = capsys.readouterr().out.splitlines()
        heads = lines[:: 1 + len(ROWS)]
        assert [name for head in heads for name in head.split()[1:]] == names
        assert len(heads) == {60: -(-len(names) // 3), 10: len(names), 300: 1}[width]
        assert all(len(line) <= max(width, 18 + 13) for line in lines)


@pytest.mark.parametrize("epochs", [0.0, 3.0])
def test_a_training_without_epochs_has_no_rate_and_no_best_epoch(
    epochs: float, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = {"seconds": 36.1, "rows_per_second": 1200.0, "best_epoch": 2.0, "epochs": epochs, "peak_memory_mb": 565.0}
    print_metrics({"test.auc": 0.7} | {f"train.{name}": value for name, value in trained.items()}, EvaluationConfig())
    shown = "trained in 36.1 s at 1,200 rows/s, best epoch 2, peak" if epochs else "trained in 36.1 s, peak"
    assert shown in capsys.readouterr().out
