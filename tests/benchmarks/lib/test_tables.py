"""Tables that show what is missing."""

from __future__ import annotations

import pytest
from measured import results, speed

from benchmarks.lib import tables


def test_what_was_not_run_can_be_seen() -> None:
    english = tables.markdown(tables.BLOCKS["rank"], results(), "en").splitlines()
    assert english[0] == "| model | width | test AUC | test GAUC | validation AUC | seconds |"
    assert len(english) == 2 + len(tables.BLOCKS["rank"]["rows"])
    assert english[2] == "| popularity | – | not run | not run |  |  |"
    assert "| **0.8270 ± 0.0010** | not run |" in english[-1], "the best of a column is bold"
    assert "| 0.8100 |" in english[4]
    chinese = tables.markdown(tables.BLOCKS["summary"], results(), "zh").splitlines()
    assert chinese[2] == "| 流行度 | 未运行 | – | 未运行 | – | – | – | – |"


@pytest.mark.parametrize("name", list(tables.BLOCKS))
def test_every_row_is_as_wide_as_its_table_in_both_languages(name: str) -> None:
    block = tables.BLOCKS[name]
    for language in tables.LANGUAGES:
        lines = tables.markdown(block, {}, language).splitlines()
        assert {line.count("|") for line in lines} == {len(block["columns"]) + 2}
    assert set(tables.names_of(block)) <= set(tables.EXPECTED)


def test_markers_are_rewritten_and_nothing_else() -> None:
    speed, demo = "<!-- bench:speed -->\nold | table\n<!-- /bench -->", "<!-- bench:demo -->\n<!-- /bench -->"
    text = f"before\n{speed}\nbetween\n{demo}\nafter\n"
    new = tables.rewrite(text, results(), "en")
    assert new.startswith("before\n<!-- bench:speed -->\n|  | twotower |")
    assert "old | table" not in new
    assert "|\n<!-- /bench -->\nbetween\n<!-- bench:demo -->\n|" in new
    assert new.endswith("|\n<!-- /bench -->\nafter\n")
    assert tables.rewrite(new, results(), "en") == new
    assert tables.rewrite("no marker\n", results(), "en") == "no marker\n"


def test_a_partial_run_keeps_the_cells_that_it_did_not_measure() -> None:
    name = "train_speed: training"
    summary = tables.BLOCKS["summary"]
    before = f"<!-- bench:summary -->\n{tables.markdown(summary, results(), 'en')}\n<!-- /bench -->\n"
    after = tables.rewrite(before, {name: speed(peers={"RecBole 1.2.1": [70.0]})}, "en", keep=True)
    assert "| twotower | 0.8270 ± 0.0010 | 258 | not run | not run | 1,000 | not run | not run |" in after
    assert "| best peer | – | – | 0.3159 | – | 70.0 | – | – |" in after
    assert "| twotower | not run |" in tables.rewrite(before, {name: speed()}, "en")
