"""Results of a load, and doubts about them."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.lib import page, report, tables
from benchmarks.serving.load import tell


def test_a_number_that_is_not_to_be_used_says_so(tmp_path: Path) -> None:
    """The load generator knows when others were in its way."""
    found: dict[str, dict[str, float | None]] = {
        "method1": {"p50": 1.0, "p99": 2.0, "goodput": 300.0, "unanswered": 0},
        "method2": {"p50": 1.5, "p99": None, "goodput": 300.0, "unanswered": 1},
    }
    doubts = {"method1": "INVALID: method1: the generator was late", "overload": "DOUBTFUL: peak: 5/s: others"}
    chosen = argparse.Namespace(out=tmp_path / "a.json", threads=2)
    with report.Report(chosen, "serve_load") as told:
        tell(told, found, doubts, 5)
    assert [r["name"].partition(": ")[2] for r in told.results if "doubt" not in r] == [
        "method2, p50",
        "method2, requests a second",
        "method2, requests not answered",
    ]
    results, _, _, doubted = page.collect(tmp_path)
    assert doubted == ["a.json: INVALID: method1: the generator was late"]
    lines = tables.markdown(tables.BLOCKS["serving"], results, "en").splitlines()
    assert lines[2] == "| method 1 by user id | 1.00 (doubtful) | 2.00 (doubtful) | 300 (doubtful) | 0 (doubtful) |"
    assert lines[3] == "| method 2, history of 50, tower live | 1.50 | not run | 300 | 1 |"
