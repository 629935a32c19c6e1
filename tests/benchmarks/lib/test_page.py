"""The page of all measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measured import QUALITY, SPEED, results, speed

from benchmarks.lib import page, report, tables
from benchmarks.lib.machine import machine


def test_a_run_folder_becomes_a_page_and_a_table(tmp_path: Path) -> None:
    report.save(tmp_path / "train_speed.json", [speed()], 2)
    report.save(tmp_path / "rank_quality.json", [results()[QUALITY]], 1)
    (tmp_path / "serve.json").write_text('{"machine": {}}')  # not of this form
    for name in ("README.md", "README.zh-CN.md"):
        (tmp_path / name).write_text("<!-- bench:summary -->\n<!-- /bench -->\n", encoding="utf-8")
    (tmp_path / "topics.md").write_text("# By hand\n\n<!-- bench:speed -->\n<!-- /bench -->\n", encoding="utf-8")
    (tmp_path / "page.md").write_text("of an earlier run\n", encoding="utf-8")
    pages = [tmp_path / name for name in ("README.md", "README.zh-CN.md", "topics.md")]
    page.write(tmp_path, "2026-01-31", tmp_path / "page.md", pages)
    topics = (tmp_path / "topics.md").read_text(encoding="utf-8")
    assert topics.startswith("# By hand\n\n<!-- bench:speed -->\n|  | twotower |")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.startswith("# All measurements\n")
    assert "of an earlier run" not in text
    assert "2026-01-31" in text
    assert "Limits with 2 threads, the best of 1 scripts: 100 GFLOP/s" in text
    assert "torch-rechub 0.9.0: 110 (100–120); RecBole 1.2.1: 50.0 | 9.09x; 20x | 4,000 | 4.00x | 1 |" in text
    assert "test AUC | 0.8270 (0.8260–0.8280) [0.8200, 0.8300] |" in text
    assert "| recbole-bpr, HR@10 | not run |" in text
    assert str(tmp_path) not in text
    found = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert {r["name"] for r in found["results"]} == {SPEED, QUALITY}
    assert set(found["not_run"]) == set(tables.EXPECTED) - {SPEED, QUALITY}
    assert "流行度" in (tmp_path / "README.zh-CN.md").read_text(encoding="utf-8")
    assert "popularity" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_wrong_marker_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- bench:nothing -->\n<!-- /bench -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no such table"):
        page.write(tmp_path, "d", tmp_path / "page.md", [tmp_path / "README.md"])
    assert not (tmp_path / "page.md").exists()


def test_a_partial_run_leaves_other_tables_and_sections_with_their_dates(tmp_path: Path) -> None:
    marked = "<!-- bench:speed -->\n| old |\n<!-- /bench -->\n<!-- bench:rank -->\n| older |\n<!-- /bench -->\n"
    (tmp_path / "README.md").write_text(marked, encoding="utf-8")
    to = tmp_path / "page.md"
    to.write_text(
        "Made by `make bench` on 2026-01-01; do not edit.\n\n## train_speed\n\n| gone |\n\n## rank_quality\n\n| stays "
        "|\n\n"
        "1. `its command`\n\n## of_another_list\n\n| this too |\n\n## Other tools\n\nwords\n",
        encoding="utf-8",
    )
    report.save(tmp_path / "train_speed.json", [speed()], 2)
    for _ in range(2):  # the second finds the dates in the sections
        page.write(tmp_path, "2026-02-02", to, [tmp_path / "README.md"], keep=True)
        text = to.read_text(encoding="utf-8")
        assert "## rank_quality\n\nRun on 2026-01-01.\n\n| stays |\n\n1. `its command`\n" in text
        assert "## of_another_list\n\nRun on 2026-01-01.\n\n| this too |\n" in text
        assert f"## train_speed\n\nRun on 2026-02-02, {machine()['cpu']}.\n" in text
        assert "| gone |" not in text
        assert "not run" in text, "sections that the page did not have"
        assert text.count("## Other tools") == 1
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| older |" in readme
    assert "| old |" not in readme
