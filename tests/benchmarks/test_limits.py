"""The judgement of results by limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import limits, suite
from benchmarks.lib.processes import ROOT
from benchmarks.lib.report import declared, options, result, save

ENTRY = {"name": "a: b", "value": 2.0, "ratio_to_floor": 4.0}


@pytest.mark.parametrize(
    ("limit", "entry", "expected"),
    [
        ({"most": 2}, ENTRY, "holds  a: b: 2.00, at most 2"),
        ({"most": 1.9}, ENTRY, "fails  a: b: 2.00, at most 1.90"),
        ({"least": 2.1}, ENTRY, "fails  a: b: 2.00, at least 2.10"),
        ({"field": "ratio_to_floor", "least": 3}, ENTRY, "holds  a: b, ratio_to_floor: 4.00, at least 3"),
        ({"most": 2}, {}, "fails  a: b: -, at most 2"),
        ({"most": 2}, ENTRY | {"doubt": "others ran"}, "fails  a: b: 2.00, at most 2; others ran"),
    ],
)
def test_a_limit_is_judged_by_its_field(limit: dict[str, float], entry: dict[str, float], expected: str) -> None:
    assert limits.judged({"result": "a: b"} | limit, entry) == expected


def test_results_of_all_steps_are_judged_and_a_missing_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "serve_load: swap, failed requests"
    save(tmp_path / "serve_load.json", [result(name, 0)], 1)
    assert f"holds  {name}: 0, at most 0" in limits.judged_all(tmp_path)
    chosen = options(str(ROOT / "benchmarks" / "limits.py"), ["--run", str(tmp_path)])
    with pytest.raises(SystemExit, match="not all limits hold"):
        limits.main(chosen, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("fails") == len(declared(limits.__file__)["limits"]) - 1


def test_each_limit_is_of_a_step_of_the_suite() -> None:
    of_steps = {declared(str(ROOT / "benchmarks" / f"{step['run'].split()[0].replace('.', '/')}.py")).get("name", "")
                for step in suite.STEPS.values() if not step["run"].startswith("twotower")}  # fmt: skip
    tasks = declared(str(ROOT / "benchmarks" / "speed" / "peers.py"))["tasks"].values()
    of_steps |= {task["name"].partition(":")[0] for task in tasks}
    assert {limit["result"].partition(":")[0] for limit in declared(limits.__file__)["limits"]} <= of_steps
