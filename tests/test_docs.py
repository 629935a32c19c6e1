"""Check that the documents say what the code does."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import typer
from heavy import COLLECTED, HEAVY, MARKED, QUICK
from packaging.requirements import Requirement
from worlds import EVERYTHING_SCHEMA, everything, settings

from twotower.api import fit
from twotower.cli.app import app, run_command
from twotower.config.toml import load_config, parse_config
from twotower.data.tables import check
from twotower.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
HOW_TOS = ("own-data", "your-log", "your-lake", "every-day")


@cache
def script(name: str) -> ModuleType:
    """Load a script of the repository once."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "cli.md", "http.md", "openapi.json", "prepared-format.md"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    text = script("docs/generate.py").PAGES[page]()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text, "run `make docs`"


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page that are marked with a language; "" is none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for mark, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if mark == language]


def run_python(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run code in a folder, warnings being errors (pyproject.toml). Returns what it prints."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "<document>", "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out


def test_the_python_of_the_readme_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 20
    assert run_python(code, tmp_path, monkeypatch, capsys) in blocks("README.md", "")


def in_the_shop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder beside the example's tables, as in a checkout."""
    (folder / "examples").mkdir()
    (folder / "examples" / "own-data").symlink_to(ROOT / "examples" / "own-data")
    monkeypatch.chdir(folder)


@pytest.mark.system
@pytest.mark.parametrize("page", ["own-data", "every-day"])
def test_the_commands_of_a_how_to_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_shop(tmp_path, monkeypatch)
    lines = [line for code in blocks(f"docs/how-to/{page}.md", "bash") for line in code.splitlines()]
    commands = [shlex.split(line.replace("$day", "monday"), comments=True) for line in lines if line[:9] == "twotower "]
    assert len(commands) > 5
    for _, *arguments in commands:
        if arguments[0] == "train":
            arguments += ["--threads", "1"]
        assert run_command(arguments) == 0, arguments


@pytest.mark.system
@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_commands_of_the_readme_answer_from_clicks(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a table of clicks to ten items, by the lines of the README."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    clicks = [(u, i, 1_700_000_000 + int(rng.integers(10**6))) for u in range(60) for i in range(80) if (u + i) % 2]
    kept = [row for row in clicks if rng.random() < 0.5]
    pl.DataFrame(kept, schema=["user", "item", "clicked_at"], orient="row").write_parquet("clicks.parquet")
    (code,) = (code for code in blocks(readme, "") if code.startswith("twotower suggest"))
    commands = [shlex.split(line, comments=True)[1:] for line in code.splitlines() if line.startswith("twotower")]
    assert [command[0] for command in commands] == [
        "suggest", "train", "doctor", "publish", "recommend", "similar", "serve",
    ]  # fmt: skip
    for arguments in commands[:-1]:
        capsys.readouterr()
        assert run_command(arguments + ["--threads", "1"] * (arguments[0] == "train")) == 0, arguments
        if arguments[0] in ("recommend", "similar"):
            answer = re.findall(r"\(id (\d+),", capsys.readouterr().out)
            assert len(answer) == 10
            assert all(int(item) % 2 for item in answer)


@pytest.mark.system
def test_the_python_of_a_how_to_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_shop(tmp_path, monkeypatch)
    (code,) = blocks("docs/how-to/own-data.md", "python")
    assert len(run_python(code, tmp_path, monkeypatch, capsys).splitlines()) == 5


@pytest.mark.system
def test_the_python_of_a_lake_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_shop(tmp_path, monkeypatch)
    code = "\n".join(blocks("docs/how-to/your-lake.md", "python"))
    assert run_python(code, tmp_path, monkeypatch, capsys).split() == ["True", "customer", "product", "clicked_at"]


def test_the_site_has_every_page_of_the_documents(tmp_path: Path) -> None:
    site = script("docs/site.py")
    site.stage(tmp_path)
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    in_nav = set(re.findall(r"[\w./-]+\.md", str(config["nav"])))
    assert in_nav == {str(site.place(page)) for page in site.pages() if page.parts[0] != "benchmarks"} | {site.API}
    assert all((tmp_path / page).is_file() for page in in_nav)
    assert "recipes/words.toml.md)" in (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "[data]" in (tmp_path / "examples" / "recipes" / "words.toml.md").read_text(encoding="utf-8")


def test_the_class_of_the_tutorial_learns_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (code for code in blocks("docs/tutorial.md", "python") if "DSSMTrainable" in code)
    shown, *_ = re.findall(r"`test AUC ([\d.]+)`", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    found = float(run_python(code, tmp_path, monkeypatch, capsys).split()[-1])
    assert found == pytest.approx(float(shown), abs=0.03)


def test_the_log_of_the_tutorial_trains(tmp_path: Path) -> None:
    """The shop's clicks with types of events, as the chapter on the log says."""
    shop = ROOT / "examples" / "own-data"
    clicks = pl.read_csv(shop / "clicks.csv")
    types = np.random.default_rng(0).choice(["view", "cart", "buy", "skip", "search", "ping"], clicks.height)
    clicks.with_columns(type=types).write_csv(tmp_path / "clicks.csv")
    (added,) = (tomllib.loads(code) for code in blocks("docs/tutorial.md", "toml") if "[schema.events]" in code)
    given = tomllib.loads((ROOT / "examples" / "own-data.toml").read_text(encoding="utf-8"))
    given["schema"] |= added["schema"]
    given["train"] |= {"epochs": 1, "device": "cpu"}
    schema, config = parse_config({k: v for k, v in given.items() if k != "data"} | {"evaluation": added["evaluation"]})
    assert schema is not None
    run = fit((shop / "customers.csv", shop / "products.csv", tmp_path / "clicks.csv"), schema, config)
    assert np.unique(run.dataset.pairs.weight).tolist() == pytest.approx([0, 0.2, 1, 3])
    assert 0 <= run.metrics["test.recall@10"] <= 1


def test_the_functions_of_the_operations_page_answer_record_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import twotower

    tables = check(*everything(), EVERYTHING_SCHEMA)
    run = twotower.fit(tables, EVERYTHING_SCHEMA, settings(), folder=tmp_path / "runs" / "mine")
    twotower.publish(run, tmp_path / "store", force=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks("docs/operations.md", "python"):
        if "(batches)" in code:
            exec(compile(code, "<document>", "exec"), names)
    items = run.dataset.items.frame
    vectors = pa.Table.from_batches(names["embed"](items.to_arrow().to_batches(max_chunksize=5)))
    assert vectors.schema.equals(names["VECTORS"])
    assert vectors["id"].to_pylist() == run.dataset.items.ids.to_list()
    expected = run.factors().items.numpy()
    assert np.allclose(np.stack(vectors["vector"].to_pylist())[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)
    users = pa.table({"user_id": ["u1", "u2", "nobody"]})
    answers = pa.Table.from_batches(names["recommend"](users.to_batches(max_chunksize=2)))
    assert answers.schema.equals(names["ANSWERS"])
    assert set(answers["user_id"].to_pylist()) == {"u1", "u2", "nobody"}
    assert set(answers["source"].to_pylist()) == {"model", "popular"}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or other.suffix != ".md" or anchor in anchors(other), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("CHANGELOG.md", "log.md")], ids=lambda p: p.name)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    """A path stands for itself, or is below the package, the tests, the examples, the benchmarks, or the page's own
    folder; NAME in it stands for any."""
    roots = (ROOT, ROOT / "src" / "twotower", ROOT / "tests", ROOT / "examples", ROOT / "benchmarks", page.parent)
    for name in re.findall(r"`([\w./-]+\.py)`", page.read_text(encoding="utf-8")):
        pattern = re.sub("[A-Z]{4,}", "*", name)
        assert any(path for root in roots for path in root.glob(pattern)), name


TRANSLATED = [
    (f"{page}.md", f"{page}.zh-CN.md")
    for page in ("README", "docs/tutorial", *(f"docs/how-to/{name}" for name in HOW_TOS))
]


@pytest.mark.parametrize("pages", TRANSLATED, ids=lambda p: p[0])
def test_both_languages_have_the_same_sections_code_and_numbers(pages: tuple[str, str]) -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in pages]
    for pattern in (r"^#+ ", r"^```\w*", r"^\|", r"\d\.\d{4}"):
        english, chinese = (re.findall(pattern, text, re.M) for text in texts)
        assert english == chinese, pattern
    for language in ("python", "toml", "bash"):
        english, chinese = (blocks(name, language) for name in pages)
        for one, other in zip(english, chinese, strict=True):  # the comments are translated
            assert re.sub(r" *#.*", "", one) == re.sub(r" *#.*", "", other)


def test_chinese_pages_address_readers_as_ni_and_tell_repository_and_store_apart() -> None:
    """This repository is 本仓库, a store of bundles 发布库, and a data warehouse 数据仓库."""
    pages = [path for path in tracked(".md", ".ipynb") if ".zh-CN." in path.name]
    assert len(pages) == 7
    for page in pages:
        assert re.findall("您|(?<!本)(?<!数据)仓库", page.read_text(encoding="utf-8")) == [], page.name


def test_the_notes_of_the_next_release_are_at_most_40_lines() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    notes = text.partition("## Unreleased\n")[2].partition("\n## ")[0].strip().splitlines()
    assert len(notes) <= 40
    assert [line for line in notes if not line.startswith("- ") or len(line) > 140] == []


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_short_and_has_one_table_of_results(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "```" in text.splitlines()[:20], "the first commands"
    assert re.findall(r"<!-- bench:(\w+) -->", text) == ["summary"]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len([table for table in tables if re.search(r"\d\.\d{4}", table)]) == 1


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    paths = [ROOT / name for name in names if name] or [p for p in ROOT.rglob("*") if ".venv" not in str(p)]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def test_nothing_installs_the_name_from_an_index() -> None:
    """Nobody has published the name: an install line names the checkout."""
    for path in tracked(".md", ".py", ".toml", ".service", ".yaml", ".yml", ".sh", ".html", ".js", ""):
        if path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            bad = re.search(
                r"(?:pip|uv|pipx|poetry)\b[^\n]*\b(?:install|add)\b[^\n]*[ '\"]twotower(?![\w/.-])[^\n]*", text
            )
            assert bad is None, f"{path.relative_to(ROOT)}: {bad[0] if bad else ''}"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_folder_is_in_the_file_map_of_the_readme(readme: str) -> None:
    """The rooms of the package, and the folders of the repository."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+)/`", text))
    paths = [path.relative_to(ROOT).parts for path in tracked()]
    folders = {parts[0] for parts in paths if len(parts) > 1 and parts[0] != "src"}
    rooms = {parts[2] for parts in paths if parts[:2] == ("src", "twotower") and len(parts) > 3}
    assert (folders | rooms) - named == set()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda p: p.name)
def test_every_example_is_a_valid_config(example: Path) -> None:
    schema, _ = load_config(example, trust=True)
    assert schema is not None
    assert tomllib.loads(example.read_text(encoding="utf-8"))


def test_the_example_of_own_data_trains_and_beats_popularity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "examples" / "own-data.toml"
    words = ["train", str(config), "--run", str(tmp_path / "run")]
    assert run_command(words) == 0
    from twotower import api

    metrics = api.load(tmp_path / "run").metrics
    assert metrics["test.recall@10"] > metrics["baseline.popularity.recall@10"]
    shown = capsys.readouterr().out
    assert f"next: twotower {'publish' if ': the model is better.' in shown else 'doctor'} " in shown


def test_the_picture_of_the_house_is_up_to_date() -> None:
    picture = script("docs/house.py").picture()
    kept = (ROOT / "docs" / "figures" / "house.svg").read_text(encoding="utf-8")
    assert picture == kept, "run `make docs`"


def test_every_target_of_make_that_is_named_exists_and_ci_runs_the_pythons_of_the_package() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w./-]+):", makefile, re.M))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    named = {target for line in re.findall(r"run: make (.*)", workflow) for target in line.split() if "=" not in target}
    assert named == {"check", "dist", "docs", "site", "test", "test-hosts", "test-system", "versions"}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    named |= set(re.findall(r"^stage .* make ([\w./-]+)", ci, re.M))
    for page in [*PAGES, *(ROOT / ".github").rglob("*.md"), ROOT / ".pre-commit-config.yaml"]:
        named |= set(re.findall(r"`make ([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    assert named <= targets
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert re.findall(r'"(3\.\d+)"', workflow.partition("matrix:")[2].partition("\n")[0]) == pythons


def test_every_named_fault_test_exists() -> None:
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]*test_\w+\.py)::(\w+)`", table)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
    rows = re.findall(r"^\| ([A-G]\d+) \|", table, re.M)
    assert {t.split("_")[2] for _, t in named} == set(rows)
    assert len(rows) == len(set(rows))


def test_every_fault_has_a_test_that_is_run_before_each_commit() -> None:
    """Not by `make test-system` or `make test-hosts` alone."""
    marks = {"pytest.mark.system", "pytest.mark.hosts"}
    found: dict[str, set[str]] = {}

    def quick(file: str) -> set[str]:
        if file not in found:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            whole = [
                ast.unparse(n.value)
                for n in tree.body
                if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"
            ]
            functions = [
                n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and not marks & set(whole)
            ]
            found[file] = {n.name for n in functions if not marks & set(map(ast.unparse, n.decorator_list))}
        return found[file]

    heavy = {name for name, cases in HEAVY.items() if cases == ".*"}
    minutes = {"C7"}  # what is beyond memory takes minutes
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines():
        if (row := re.match(r"\| ([A-G]\d+) \|", line)) and row[1] not in minutes:
            named = re.findall(r"`([\w/]*test_\w+\.py)::(\w+)`", line)
            assert any(test in quick(file) - heavy for file, test in named), row[1]
            names = {test for _, test in named}
            assert names & QUICK or not names <= COLLECTED, f"{row[1]}: no case is quick"


def test_every_heavy_case_is_of_a_test_that_exists() -> None:
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = {name for text in texts for name in re.findall(r"^(?:async )?def (test_\w+)\(", text, re.M)}
    assert HEAVY.keys() <= names
    assert HEAVY.keys() & COLLECTED <= MARKED, "no case has the pattern"
    assert {name for name, cases in HEAVY.items() if cases != ".*"} & COLLECTED <= QUICK, "no case is left to make test"


def test_every_identifier_of_the_glossary_exists() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|([^|]*)\|$", page, re.M)
    terms = [term for term, *_ in rows if term != "term" and not term.startswith("---")]
    assert len(terms) > 60
    assert len(set(terms)) == len(terms)
    for term, _, where, _ in rows:
        if term in terms:
            for file, names in re.findall(r"`([\w/]+\.py)`((?:,? `[\w.]+`)*)", where):
                text = (ROOT / "src" / "twotower" / file).read_text(encoding="utf-8")
                for name in re.findall(r"`([\w.]+)`", names):
                    assert re.search(rf"\b{re.escape(name)}\b", text), f"{term}: {file} {name}"
            assert re.search(r"`[\w/]+\.py`", where), f"{term}: no module"


def test_every_metric_is_on_the_operations_page() -> None:
    from twotower.serve.metrics import ServeMetrics

    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    metrics = ServeMetrics()
    names = [family.name for family in metrics._registry.collect()]
    assert len(names) > 12
    for name in names:
        assert f"`{name}" in page, name


def test_every_flag_that_is_named_exists() -> None:
    flags = set(re.findall(r"`(--[a-z-]+)", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")))
    flags |= {"--no-console", "--no-access-log"}
    named = re.findall(r"`(--[a-z-]+)", (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))
    for file in ("twotower.service", "Dockerfile", "kubernetes/twotower.yaml"):
        lines = (ROOT / "deploy" / file).read_text(encoding="utf-8").splitlines()
        starts = [line for line in lines if re.match(r"\s*(ExecStart|--workers|ENTRYPOINT|CMD \[\"--|args:)", line)]
        assert starts, file
        named += re.findall(r"(?<![\w-])(--[a-z-]+)", " ".join(starts))
    assert len(named) > 30
    assert set(named) - flags == set()


def nightly() -> list[str]:
    """Return the commands of the nightly unit, without the folders of the programs."""
    unit = (ROOT / "deploy" / "twotower-nightly.service").read_text(encoding="utf-8")
    return [re.sub(r"^(?:/\w+)+/", "", line) for line in re.findall(r"^ExecStart(?:Pre)?=(.*)$", unit, re.M)]


def test_the_nightly_unit_and_the_line_of_cron_run_the_same_commands_of_this_package() -> None:
    (line,) = re.findall(r"^0 3 .*$", (ROOT / "deploy" / "twotower.cron").read_text(encoding="utf-8"), re.M)
    assert line.split(" && ")[2:] == nightly()
    clear, *lines = map(shlex.split, nightly())
    assert clear == ["rm", "-rf", "runs/nightly"]
    assert [words[1] for words in lines] == ["train", "publish", "gc"]
    commands: Any = typer.main.get_command(app)
    for _, name, *arguments in lines:
        commands.commands[name].make_context(name, arguments)  # raises UsageError


@pytest.mark.system
def test_the_nightly_commands_run_night_after_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    log = pl.read_csv(ROOT / "examples" / "own-data" / "clicks.csv").sort("clicked_at")
    for night, share in enumerate((0.7, 0.85, 1.0), start=1):
        log.head(int(share * log.height)).write_csv("clicks.csv")
        if night == 1:
            assert run_command(["suggest", "clicks.csv", "--output", "daily.toml"]) == 0
        (_, _, clear), *commands = map(shlex.split, nightly())
        shutil.rmtree(clear, ignore_errors=True)
        for _, *arguments in commands:
            capsys.readouterr()
            code = run_command([*arguments, *(["--threads", "1"] if arguments[0] == "train" else [])])
            assert code == 0, (night, arguments, capsys.readouterr().err)
        assert len([*(tmp_path / "store" / "bundles").iterdir()]) == night


def test_every_import_of_a_document_or_the_makefile_exists() -> None:
    found = set()
    for page in (*PAGES, ROOT / "Makefile"):
        text = page.read_text(encoding="utf-8")
        for module, names in re.findall(r"\bfrom (twotower[\w.]*) import ([\w, ]+)", text):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), f"{page.name}: {module} {name}"
                found.add(name)
    assert len(found) > 3


def test_every_command_and_flag_of_the_readme_and_the_tutorial_and_every_option_of_the_readme_exists() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    flags = {name: set(re.findall(r"`(-[\w-]+)", text)) | set(re.findall(r" (--?[a-z][\w-]*)", text))
             for name, text in re.findall(r"^## twotower (.+)\n([\s\S]*?)(?=^## |\Z)", page, re.M)}  # fmt: skip
    found = 0
    for name in (page for pair in TRANSLATED for page in pair):
        for code in blocks(name, ""):
            for line in re.findall(r"^\$? ?twotower (.*)$", code, re.M):
                words = line.partition(" #")[0].split()
                command = " ".join(words[:2]) if " ".join(words[:2]) in flags else words[0]
                assert command in flags, line
                assert {w for w in words if re.match(r"--?[a-z]", w)} <= flags[command], line
                found += 1
    assert found > 30
    (config,) = blocks("README.md", "toml")
    schema, _ = parse_config(tomllib.loads(config))
    assert schema is not None


# ---- dependencies


def test_the_versions_that_are_tested_are_those_of_every_direct_dependency() -> None:
    versions = script("docs/versions.py")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| .* \| (\S.*) \|$", versions.table(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for one in map(Requirement, (*project["dependencies"], *project["optional-dependencies"]["train"])):
        if one.marker is None or one.marker.evaluate():
            assert rows[one.name] == importlib.metadata.version(one.name)
    assert rows["Python"] == ".".join(map(str, sys.version_info[:3]))


def test_every_file_that_names_the_version_names_this_one() -> None:
    """Those that a release changes: CONTRIBUTING.md lists them."""
    texts = {
        "CHANGELOG.md": r"^## (\d\S*)",
        "CITATION.cff": r"^version: (\S+)",
        "deploy/kubernetes/twotower.yaml": r"image: twotower:(\S+)",
        "docs/openapi.json": r'^  "version": "([^"]+)"',
    }
    found = {
        name: re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.M)[0] for name, pattern in texts.items()
    }
    assert set(found.values()) == {__version__}, found
    rules = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [name for name in texts if f"`{name}`" not in rules] == []


@pytest.mark.parametrize("name", ["uvicorn", "onnx", "onnxruntime", "faiss-cpu", "safetensors"])
def test_what_has_private_parts_or_reads_files_has_an_upper_bound(name: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'"{name}>=[\d.]+,<[\d.]+"', text)
    assert not re.search(r'"[\w.-]+==', text), "a range, no pin"
