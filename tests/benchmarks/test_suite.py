"""The steps of the suite, and the rows of its scripts in the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.lib import tables
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import Report, declared, options
from benchmarks.quality import baselines, collaborative, models, titles

SCRIPTS = sorted(p for p in (ROOT / "benchmarks").rglob("*.py") if "\ndef main(chosen: Namespace" in p.read_text())


def test_every_row_of_the_scripts_has_its_place() -> None:
    expected = "\n".join(tables.EXPECTED)
    for name in baselines.ROWS:
        assert f"baselines: {name}, HR@10\n" in expected
    for name in models.TABLES["retrieval"]["rows"]:
        assert f"retrieval_quality: {name}, HR@10\n" in expected
    for name in models.TABLES["short"]["rows"]:
        assert f"short_quality: {name}, HR@10\n" in expected
    for name in (*titles.BASELINES, *(f"examples/{name}" for name in titles.EXAMPLES)):
        assert f"search_quality: {name}, new queries, HR@1\n" in expected
    for name in collaborative.DECLARED["rows"]:
        assert f"collaborative: {name}, NDCG@20\n" in expected
    for name in declared(str(ROOT / "benchmarks" / "quality" / "cold.py"))["rows"]:
        assert f"cold_items: ml-1m, {name}, alone, NDCG@20\n" in expected
    for name in [*models.TABLES["rank"]["rows"], "baseline: popularity", "baseline: bias"]:
        assert f"rank_quality: {name}, test AUC" in expected


def test_the_suite_runs_scripts_that_are_there() -> None:
    for step in suite.STEPS.values():
        for quick in (False, True):
            words = suite.words(
                step, quick, {"run": "R", "sequences": "", "short": "", "server": "0", "generator": "1"}
            )
            assert "" not in words
            assert not any("{" in word for word in words)
            if words[2] == "benchmarks":  # the script takes these options
                script = ROOT / "benchmarks" / f"{words[3].replace('.', '/')}.py"
                assert script in SCRIPTS
                assert options(str(script), words[4:]).quick == quick
    assert {name.partition(":")[0] for name in tables.EXPECTED} - {"suite"} <= set(suite.STEPS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_declares_its_options_and_a_small_version(script: Path) -> None:
    found = declared(str(script))
    assert set(found.get("quick", {})) <= set(found["options"])
    assert "quick" in found or script.stem == "suite"
    assert f"]({script.relative_to(ROOT / 'benchmarks')})" in (ROOT / "benchmarks" / "README.md").read_text(
        encoding="utf-8"
    )


def test_a_step_that_fails_is_seen_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"bad": {"run": "scale.items --no-such-option"}, "good": {"run": "scale.items --help"}}
    monkeypatch.setenv("TWOTOWER_DATA", "ml-1m.zip")
    chosen = options(str(ROOT / "benchmarks" / "suite.py"), ["--date", "d", "--quick", "--run", str(tmp_path)])
    with pytest.raises(SystemExit, match="1 failed: bad"), Report(chosen) as report:
        suite.main(chosen, report, steps)
    assert "error:" in (tmp_path / "bad.log").read_text()
    assert "usage" in (tmp_path / "good.log").read_text()
    assert "not run" in (tmp_path / "measurements.md").read_text(encoding="utf-8"), "the tables were written"
