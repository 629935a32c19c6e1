"""What the benchmarks share: one form of a result, files that keep what they have, tables that show what is missing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = str(ROOT / "benchmarks")


def _load(name: str) -> ModuleType:
    sys.path.insert(0, FOLDER)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(FOLDER)


measure, table, suite = (_load(name) for name in ("measure", "table", "suite"))
SPEED, QUALITY = "train_speed: training", "rank_quality: examples/movielens-rank.toml, test AUC"


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed here would be timed on a busy machine."""
    bounds = {"fp32_gflops": 100.0, "bf16_gflops": 200.0, "read_gb_per_s": 10.0}
    monkeypatch.setattr(measure, "limits", lambda threads: {"threads": threads} | bounds)


def speed(**changed: Any) -> Any:
    given: dict[str, Any] = {"peers": {"torch-rechub 0.9.0": [100.0, 120.0], "RecBole 1.2.1": [50.0]}, "floor": 4000.0}
    return measure.result(SPEED, [1000.0, 1200.0, 900.0], "rows/s", **given | changed)


# ---- results


def test_a_spread_is_of_all_rounds() -> None:
    found = measure.spread([3.0, 1.0, 2.0, 10.0])
    assert found == {"median": 2.5, "mean": 4.0, "low": 1.0, "high": 10.0, "rounds": 4}
    with pytest.raises(ValueError, match="no round"):
        measure.spread([])


def test_ratios_say_how_many_times_as_good_whichever_way_is_better() -> None:
    found = speed()
    assert found["value"] == found["median"] == 1000
    assert found["peer"]["torch-rechub 0.9.0"]["ratio"] == pytest.approx(1000 / 110)
    assert found["peer"]["RecBole 1.2.1"]["ratio"] == 20
    assert found["ratio_to_peer"] == pytest.approx(1000 / 110), "beside the best of the others"
    assert found["ratio_to_floor"] == 4
    seconds = measure.result("x: y", 2.0, "s", more=False, peers={"other": [8.0]}, floor=1.0)
    assert (seconds["ratio_to_peer"], seconds["ratio_to_floor"], seconds["rounds"]) == (4, 2, 1)


def test_without_a_peer_or_a_limit_there_is_no_ratio() -> None:
    found = measure.result("x: y", 2.0, "s", peers={"failed": []})
    assert found["peer"] == {}
    assert found["ratio_to_peer"] is found["floor"] is found["ratio_to_floor"] is None
    assert measure.result("x: y", 0.0, "s", more=False, peers={"other": [8.0]})["ratio_to_peer"] is None


def test_a_command_can_be_typed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "/some/where/train_speed.py",
        "--rounds",
        "3",
        "--sequences",
        "/data/s.zip",
        "--out",
        "/elsewhere/x.json",
        "--kinds=",
    ]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("TWOTOWER_DATA", "/data/ml-1m.zip")
    expected = "TWOTOWER_DATA=ml-1m.zip python benchmarks/train_speed.py --rounds 3 --sequences s.zip --kinds="
    assert measure.command() == expected


def test_the_kernels_of_every_openblas_in_the_process_are_told() -> None:
    from twotower.index.faiss import setup

    setup.faiss()
    assert set(measure.blas()) >= {"faiss", "numpy"}
    assert measure.machine()["blas"] == measure.blas()


def test_the_machine_is_told() -> None:
    found = measure.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["versions"]["torch"]
    assert measure.tool("torch").startswith("torch 2")
    assert measure.tool("no-such-package") == "no-such-package"


@pytest.mark.parametrize(
    ("value", "text"), [(1234567.0, "1,234,567"), (42.42, "42.4"), (3.14159, "3.14"), (0.81378, "0.8138"), (None, "-")]
)
def test_numbers_are_written_with_the_digits_that_count(value: float | None, text: str) -> None:
    assert measure.number(value) == text


# ---- files


def test_a_file_keeps_results_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x.json"
    measure.save(path, [speed()], 2, {"a": {"seeds": 1}})
    measure.save(path, [measure.result(QUALITY, [0.82, 0.83], "")], 2, {"b": {"seeds": 2}})
    measure.save(path, [speed(floor=None)], 2)
    found = measure.load(path)
    assert [r["name"] for r in found["results"]] == [QUALITY, SPEED]
    assert found["results"][1] == json.loads(json.dumps(speed(floor=None))), "what was written is what is read"
    assert found["rows"] == {"a": {"seeds": 1}, "b": {"seeds": 2}}
    assert found["limits"]["threads"] == 2
    assert not list(path.parent.glob("*.part"))


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"popularity": {}}')
    with pytest.raises(SystemExit, match="no file of results"):
        measure.save(path, [speed()], 2)
    assert path.read_text() == '{"popularity": {}}'
    measure.save(None, [speed()], 2)
    assert measure.load(None) == measure.load(tmp_path / "none.json") == {"results": [], "rows": {}}


# ---- tables


def results() -> Any:
    made = [speed(), measure.result(QUALITY, [0.826, 0.828], "", interval=[0.82, 0.83])]
    made.append(measure.result("rank_quality: DSSM, shown pairs only, test AUC", [0.81], ""))
    return {r["name"]: r for r in made}


def test_what_was_not_run_can_be_seen() -> None:
    english = table.BLOCKS["rank"].markdown(results(), "en").splitlines()
    assert english[0] == "| model | test AUC | test GAUC | validation AUC | seconds |"
    assert len(english) == 2 + len(table.BLOCKS["rank"].rows)
    assert english[2] == "| popularity | not run | not run |  |  |"
    assert "| **0.8270 ± 0.0010** | not run |" in english[-1], "the best of a column is bold"
    assert "| 0.8100 |" in english[4]
    chinese = table.BLOCKS["summary"].markdown(results(), "zh").splitlines()
    assert chinese[2] == "| 流行度 | 未运行 | 未运行 | – | – |"


def test_the_summary_has_popularity_the_best_peer_and_the_package() -> None:
    lines = table.BLOCKS["summary"].markdown(results(), "en").splitlines()
    assert lines[0] == "|  | AUC | HR@10 | rows/s | p99 |"
    assert lines[3] == "| best peer | – | 0.3159 | 110 | – |"
    assert lines[4] == "| twotower | 0.8270 ± 0.0010 | not run | 1,000 | not run |"


def test_a_row_of_speed_has_its_peers_ratio_and_limit() -> None:
    row = table.BLOCKS["speed"].markdown(results(), "en").splitlines()[2]
    expected = "| rows per second of training | 1,000 (900–1,200) | 110 (100–120) | 50.0 | 9.1 | 4,000 |"
    assert row == expected
    alone = {SPEED: speed(peers={}, floor=None)}
    row = table.BLOCKS["speed"].markdown(alone, "en").splitlines()[2]
    assert row == "| rows per second of training | 1,000 (900–1,200) | not run | not run | not run | not run |"


def test_a_number_that_is_not_to_be_used_says_so(tmp_path: Path) -> None:
    """The load generator knows when others were in its way."""
    loads = _load("serve_load")
    found: dict[str, dict[str, float | None]] = {
        "method1": {"p50": 1.0, "p99": 2.0, "goodput": 300.0, "count": 10, "ok": 10}
    }
    found |= {"method2": {"p50": 1.5, "p99": None, "goodput": 300.0, "count": 10, "ok": 9}}
    bundle = {"counts": {"items": 5}, "index": {"kind": "exact"}}
    made = loads.results(found, bundle, ["INVALID: method1: the generator was late", "DOUBTFUL: peak: 5/s: others"])
    assert [r["name"].partition(": ")[2] for r in made if "doubt" not in r] == [
        "method2, p50",
        "method2, requests a second",
        "method2, requests not answered",
    ]
    measure.save(tmp_path / "a.json", made, 2)
    results, _, _, doubts = table.collect(tmp_path)
    assert doubts == ["a.json: INVALID: method1: the generator was late"]
    lines = table.BLOCKS["serving"].markdown(results, "en").splitlines()
    assert lines[2] == "| method 1 by user id | 1.00 (doubtful) | 2.00 (doubtful) | 300 (doubtful) | 0 (doubtful) |"
    assert lines[3] == "| method 2, history of 50, tower live | 1.50 | not run | 300 | 1 |"


@pytest.mark.parametrize("name", list(table.BLOCKS))
def test_every_row_is_as_wide_as_its_table_in_both_languages(name: str) -> None:
    block = table.BLOCKS[name]
    for language in table.LANGUAGES:
        lines = block.markdown({}, language).splitlines()
        assert {line.count("|") for line in lines} == {len(block.columns) + 1}
    assert set(block.names()) <= set(table.EXPECTED)


def test_markers_are_rewritten_and_nothing_else() -> None:
    text = "before\n<!-- bench:speed -->\nold | table\n<!-- /bench -->\nbetween\n<!-- bench:demo -->\n<!-- /bench -->\nafter\n"
    new = table.rewrite(text, results(), "en")
    assert new.startswith("before\n<!-- bench:speed -->\n|  | twotower |")
    assert "old | table" not in new
    assert "|\n<!-- /bench -->\nbetween\n<!-- bench:demo -->\n|" in new
    assert new.endswith("|\n<!-- /bench -->\nafter\n")
    assert table.rewrite(new, results(), "en") == new
    assert table.rewrite("no marker\n", results(), "en") == "no marker\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- bench:sped -->\n<!-- /bench -->\n", "no such table"),
        ("<!-- bench:speed -->\n", "needed"),
        ("<!-- bench:speed -->\n<!-- bench:rank -->\n<!-- /bench -->\n", "needed"),
        ("a <!-- bench:speed --> b\n<!-- /bench -->\n", "needed"),
    ],
)
def test_a_marker_that_is_wrong_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table.rewrite(text, {}, "en")


def test_a_run_folder_becomes_a_page_and_a_table(tmp_path: Path) -> None:
    measure.save(tmp_path / "train_speed.json", [speed()], 2)
    measure.save(tmp_path / "rank_quality.json", [results()[QUALITY]], 1)
    (tmp_path / "serve.json").write_text('{"machine": {}}')  # not of this form
    for name in ("README.md", "README.zh-CN.md"):
        (tmp_path / name).write_text("<!-- bench:summary -->\n<!-- /bench -->\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(
        f"# By hand\n\n<!-- bench:speed -->\n<!-- /bench -->\n\n{table.MEASUREMENTS}\nof an earlier run\n",
        encoding="utf-8",
    )
    words = [str(tmp_path), "--date", "2026-01-31", "--page", str(tmp_path / "page.md")]
    for name in ("README.md", "README.zh-CN.md"):
        words += ["--readme", str(tmp_path / name)]
    table.main(words)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# By hand\n\n<!-- bench:speed -->\n|  | twotower |")
    assert page.count(table.MEASUREMENTS) == 1
    assert "of an earlier run" not in page
    assert "2026-01-31" in page
    assert "Limits with 2 threads, the best of 1 scripts: 100 GFLOP/s" in page
    assert "torch-rechub 0.9.0: 110 (100–120); RecBole 1.2.1: 50.0 | 9.09x; 20x | 4,000 | 4.00x | 1 |" in page
    assert "test AUC | 0.8270 (0.8260–0.8280) [0.8200, 0.8300] |" in page
    assert "| recbole-bpr, HR@10 | not run |" in page
    assert str(tmp_path) not in page
    found = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert {r["name"] for r in found["results"]} == {SPEED, QUALITY}
    assert set(found["not_run"]) == set(table.EXPECTED) - {SPEED, QUALITY}
    assert "流行度" in (tmp_path / "README.zh-CN.md").read_text(encoding="utf-8")
    assert "popularity" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_partial_run_keeps_the_cells_that_it_did_not_measure() -> None:
    name = "train_speed: training"
    summary = table.BLOCKS["summary"]
    before = f"<!-- bench:summary -->\n{summary.markdown(results(), 'en')}\n<!-- /bench -->\n"
    after = table.rewrite(before, {name: speed(peers={"RecBole 1.2.1": [70.0]})}, "en", keep=True)
    assert "| twotower | 0.8270 ± 0.0010 | not run | 1,000 | not run |" in after
    assert "| best peer | – | 0.3159 | 70.0 | – |" in after
    assert "| twotower | not run |" in table.rewrite(before, {name: speed()}, "en")


def test_a_wrong_marker_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- bench:nothing -->\n<!-- /bench -->\n", encoding="utf-8")
    words = [str(tmp_path), "--date", "d", "--page", str(tmp_path / "page.md"), "--readme", str(tmp_path / "README.md")]
    with pytest.raises(SystemExit, match="no such table"):
        table.main(words)
    assert not (tmp_path / "page.md").exists()


def test_results_of_two_machines_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure.save(tmp_path / "a.json", [speed()], 2)
    here = measure.machine()
    monkeypatch.setattr(measure, "machine", lambda: here | {"cpu": "another"})
    measure.save(tmp_path / "b.json", [speed()], 2)
    _, _, _, doubts = table.collect(tmp_path)
    assert doubts == ["b.json is of another machine: another", f"b.json: {SPEED} is measured twice"]
    (tmp_path / "b.json").unlink()
    monkeypatch.setattr(measure, "machine", lambda: here | {"cores": here["cores"] + 1})  # not all were given to it
    measure.save(tmp_path / "c.json", [], 1)
    _, machine, _, doubts = table.collect(tmp_path)
    assert not doubts
    assert machine["cores"] == here["cores"] + 1


def test_a_partial_run_leaves_other_tables_and_sections_with_their_dates(tmp_path: Path) -> None:
    tables = "<!-- bench:speed -->\n| old |\n<!-- /bench -->\n<!-- bench:rank -->\n| older |\n<!-- /bench -->\n"
    (tmp_path / "README.md").write_text(tables, encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "Made by `make bench` on 2026-01-01; do not edit.\n\n## train_speed\n\n| gone |\n\n## rank_quality\n\n| stays |\n\n"
        "1. `its command`\n\n## of_another_list\n\n| this too |\n\n## Other tools\n\nwords\n",
        encoding="utf-8",
    )
    measure.save(tmp_path / "train_speed.json", [speed()], 2)
    words = [
        str(tmp_path),
        "--date",
        "2026-02-02",
        "--page",
        str(page),
        "--readme",
        str(tmp_path / "README.md"),
        "--keep",
    ]
    for _ in range(2):  # the second finds the dates in the sections
        table.main(words)
        text = page.read_text(encoding="utf-8")
        assert "## rank_quality\n\nRun on 2026-01-01.\n\n| stays |\n\n1. `its command`\n" in text
        assert "## of_another_list\n\nRun on 2026-01-01.\n\n| this too |\n" in text
        assert "## train_speed\n\nRun on 2026-02-02.\n" in text
        assert "| gone |" not in text
        assert "not run" in text, "sections that the page did not have"
        assert text.count("## Other tools") == 1
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| older |" in readme
    assert "| old |" not in readme


# ---- peers at their best

search_speed = _load("search_speed")


def test_faiss_runs_with_the_settings_that_its_row_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "search_speed.py --scale 3000 --width 32 --batch 16 --k 5 --rounds 1 --threads 2 --kinds= --out"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "found.json")])
    search_speed.main()
    batch, single = json.loads((tmp_path / "found.json").read_text())["results"]
    for found in (batch, single):
        best, shipped = found["peer"]
        assert (best.partition(", ")[2], shipped.partition(", ")[2]) == ("at its best", "as shipped")
        assert "distance_compute_blas_threshold=320" in found["settings"][best]
        assert "doubt" not in found
        assert found["agreement_with_faiss"] == 1
        for way, kernels in found["blas"].items():
            assert kernels["faiss"], way
            assert way not in search_speed.KERNELS or kernels["faiss"].upper() == way
        assert {"faiss flat, as shipped", "search, ours"} < set(found["tried"])
        assert {way.partition(",")[0] for way in found["tried"]} >= {"faiss flat", "faiss knn", "faiss shards"}
    page = table.page({batch["name"]: batch}, {}, [], [], "2026-01-31")
    assert "at its best (distance_compute_blas_threshold=320, OPENBLAS_CORETYPE=" in page


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"threshold": 128_000}, "threshold is 128000, not 640"),
        ({"blas": {"faiss": "Zen"}}, "runs Zen, not those of HASWELL"),
        ({"blas": {}}, "runs unknown kernels"),
    ],
)
def test_a_peer_without_its_settings_is_marked(changed: Any, said: str | None) -> None:
    told = {"as shipped": {"threshold": 128_000, "blas": {}}, "ours": {"threshold": None, "blas": {}}}
    found = search_speed.settings_doubt(
        told | {"HASWELL": {"threshold": 640, "blas": {"faiss": "Haswell"}} | changed}, 64
    )
    assert (said is None and not found) or (said or "") in found["doubt"]


def test_the_quickest_way_of_a_tool_is_its_row_and_the_shipped_one_beside_it() -> None:
    at_best = _load("peers").at_best
    tried = {"torch-rechub": [5.0], "torch-rechub @ num_workers=1": [9.0, 8.0], "RecBole": [7.0], "RecBole @ x": []}
    label, other = (_load("peers").tool_label(name) for name in ("torch-rechub", "RecBole"))
    peers, settings = at_best(tried, more=True)
    assert peers == {label: [9.0, 8.0], f"{label}, as shipped": [5.0], other: [7.0]}
    assert settings == {label: "num_workers=1"}
    peers, settings = at_best(tried, more=False)
    assert peers[label] == [5.0]
    assert settings == {label: "as shipped"}


# ---- what the tables expect is what the scripts have


def test_every_row_of_the_scripts_has_its_place() -> None:
    baselines, retrieval, words = (_load(name) for name in ("baselines", "retrieval_quality", "search_quality"))
    expected = "\n".join(table.EXPECTED)
    for name in baselines.ROWS:
        assert f"baselines: {name}, HR@10\n" in expected
    for name in retrieval.ROWS:
        assert f"retrieval_quality: {name}, HR@10\n" in expected
    for name in (*words.BASELINES, *(f"examples/{name}" for name in words.OURS)):
        assert f"search_quality: {name}, new queries, HR@1\n" in expected
    for name in _load("rank_quality").BRANCHES:
        assert f"rank_quality: DSSM + branch {name}, shown pairs only, test AUC" in expected


def test_the_suite_runs_scripts_that_are_there_and_none_twice() -> None:
    names = [step.name for step in suite.STEPS]
    assert len(set(names)) == len(names)
    for step in suite.STEPS:
        assert step.program == "twotower" or (ROOT / "benchmarks" / f"{step.program}.py").exists()
        for quick in (False, True):
            words = step.words(quick, {"run": "R", "sequences": "", "server": "0", "generator": "1"})
            assert "" not in words
            assert not any("{" in word for word in words)
    assert {script for script in (name.partition(":")[0] for name in table.EXPECTED) if script != "suite"} <= {
        step.program for step in suite.STEPS
    }


def test_a_step_that_fails_is_seen_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        suite.Step("bad", "table", "--no-such-option", out=False),
        suite.Step("good", "table", "--help", out=False),
    )
    monkeypatch.setenv("TWOTOWER_DATA", "ml-1m.zip")
    with pytest.raises(SystemExit, match="1 failed: bad"):
        suite.main(["--date", "d", "--quick", "--run", str(tmp_path)], steps)
    assert "error:" in (tmp_path / "bad.log").read_text()
    assert "usage" in (tmp_path / "good.log").read_text()
    assert "not run" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8"), "the tables were written"
