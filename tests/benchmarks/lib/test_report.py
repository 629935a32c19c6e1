"""One form of a result, files that keep what they have, and the options of a script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measured import QUALITY, SPEED, speed

from benchmarks.lib import report


def test_a_spread_is_of_all_rounds() -> None:
    found = report.spread([3.0, 1.0, 2.0, 10.0])
    assert found == {"median": 2.5, "mean": 4.0, "low": 1.0, "high": 10.0, "rounds": 4}
    with pytest.raises(ValueError, match="no round"):
        report.spread([])


def test_ratios_say_how_many_times_as_good_whichever_way_is_better() -> None:
    found = speed()
    assert found["value"] == found["median"] == 1000
    assert found["peer"]["torch-rechub 0.9.0"]["ratio"] == pytest.approx(1000 / 110)
    assert found["peer"]["RecBole 1.2.1"]["ratio"] == 20
    assert found["ratio_to_peer"] == pytest.approx(1000 / 110), "beside the best of the others"
    assert found["ratio_to_floor"] == 4
    seconds = report.result("x: y", 2.0, "s", more=False, peers={"other": [8.0]}, floor=1.0)
    assert (seconds["ratio_to_peer"], seconds["ratio_to_floor"], seconds["rounds"]) == (4, 2, 1)


def test_a_file_keeps_results_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x.json"
    report.save(path, [speed()], 2, {"a": {"seeds": 1}})
    report.save(path, [report.result(QUALITY, [0.82, 0.83], "")], 2, {"b": {"seeds": 2}})
    written = speed(floor=None)  # once: the load that it tells changes
    report.save(path, [written], 2)
    found = report.load(path)
    assert [r["name"] for r in found["results"]] == [QUALITY, SPEED]
    assert found["results"][1] == json.loads(json.dumps(written)), "what was written is what is read"
    assert found["rows"] == {"a": {"seeds": 1}, "b": {"seeds": 2}}
    assert found["limits"]["threads"] == 2
    assert not list(path.parent.glob("*.part"))


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"popularity": {}}')
    with pytest.raises(SystemExit, match="no file of results"):
        report.save(path, [speed()], 2)
    assert path.read_text() == '{"popularity": {}}'
    report.save(None, [speed()], 2)
    assert report.load(None) == report.load(tmp_path / "none.json") == {"results": [], "rows": {}}


DECLARED = """
about = "Measure."
[options]
items = [1000, "number of items"]
only = [["rows", "items"], "parts", ["rows", "items"]]
resume = [false, "keep rows"]
sizes = [[10, 20], "numbers"]

[quick]
items = 10
"""


def test_options_are_those_that_a_script_declares(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.with_suffix(".toml").write_text(DECLARED)

    def chosen(*words: str) -> dict[str, object]:
        return vars(report.options(str(script), list(words)))

    assert chosen() == {
        "items": 1000, "only": ["rows", "items"], "resume": False, "sizes": [10, 20], "quick": False, "out": None,
    }  # fmt: skip
    assert chosen("--quick")["items"] == 10
    assert chosen("--quick", "--items", "7")["items"] == 7
    found = chosen("--only=items", "--sizes", "1,2", "--resume", "--out", "x.json")
    assert (found["only"], found["sizes"], found["resume"], found["out"]) == (["items"], [1, 2], True, Path("x.json"))
    with pytest.raises(SystemExit):
        chosen("--only", "columns")
