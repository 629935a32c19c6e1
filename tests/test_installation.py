"""The base installation, without torch, asks and serves; the extras add the rest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from functools import cache
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from server_process import serving
from worlds import EVERYTHING_SCHEMA, everything, settings

import twotower
from twotower.data.tables import check, save
from twotower.errors import ConfigError, MissingPackage, missing_package
from twotower.kinds import import_modules
from twotower.store.store import Store
from twotower.suggestion.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@cache
def base_distributions() -> set[str]:
    """Return the distributions that `pip install .` installs here: the dependencies, and theirs."""
    found: set[str] = set()
    left = [Requirement(line) for line in PROJECT["dependencies"]]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        if (wanted.marker and not wanted.marker.evaluate({"extra": ""})) or name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            inner = Requirement(line)
            extras = {"", *wanted.extras}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                left.append(inner)
    return found


@cache
def blocked_modules() -> list[str]:
    """Return the top-level modules of this environment that the base installation lacks."""
    base = base_distributions() | {"twotower"}
    homes = importlib.metadata.packages_distributions()
    return sorted(module for module, of in homes.items() if not {canonicalize_name(name) for name in of} & base)


BASE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def as_base(code: str) -> str:
    """Return code that runs as in an environment of the base installation."""
    return BASE.format(blocked=blocked_modules()) + code


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tables = check(*everything(), EVERYTHING_SCHEMA)
    save(tables, folder / "tables")
    run = twotower.fit(
        tables, EVERYTHING_SCHEMA, settings(train={"epochs": 1, "batch_size": 256}), folder=folder / "run"
    )
    twotower.publish(run, folder / "store")
    twotower.publish(run, folder / "store")
    return folder / "store"


def test_the_base_has_nothing_that_trains_draws_or_converts() -> None:
    assert {"numpy", "polars", "faiss-cpu", "onnxruntime", "onnx", "fastapi", "uvicorn"} <= base_distributions()
    assert not {"torch", "pyarrow", "pandas", "safetensors", "tomli-w", "duckdb"} & base_distributions()
    assert {"torch", "pyarrow", "pandas", "safetensors"} <= set(blocked_modules())


def test_the_extras_are_those_that_texts_name() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {
        "train",
        "milvus",
        "bucket",
        "ray",
        "delta",
        "iceberg",
        "torchrec",
        "all",
        "dev",
        "test",
    }
    assert {Requirement(line).name for line in extras["train"]} >= {"torch", "safetensors", "tomli-w"}
    assert Requirement(extras["all"][0]).extras == {"train", "milvus", "bucket", "ray", "delta", "iceberg"}
    named = set()
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("deploy/**/*"),
        *ROOT.glob("src/**/*.py"),
        ROOT / "Makefile",
    ]:
        if path.is_file() and path.name != "CHANGELOG.md":
            text = path.read_text(encoding="utf-8", errors="replace")
            named |= {e for found in re.findall(r"\.\[([a-z,]+)\]'", text) for e in found.split(",")}
    assert named <= set(extras)
    assert {"train", "all"} <= named


def test_every_verb_that_asks_works_in_the_base(store: Path, tmp_path: Path) -> None:
    tables, out = store.parent / "tables", tmp_path / "answers"
    calls: list[list[object]] = [
        ["--help"],
        ["recommend", "--store", store, "--user", "u1", "-k", 3, "--json"],
        ["recommend", "--store", store, "--user", "u1", "-k", 3, "--method", 2],
        ["recommend", "--store", store, "--users", tables / "users.parquet", "--out", out],
        ["similar", "--store", store, "--item", "i1"],
        ["search", "--store", store, "motto", "-k", 2],
        ["bundles", "--store", store],
        ["data", "stats", tables],
        ["key", "shop"],
        ["rollback", "--store", store],
        ["gc", "--store", store, "--keep", 2],
    ]
    code = (
        "import json\nfrom twotower.cli.app import run_command\nfor words in "
        "json.loads(sys.argv[1]):\n    print(words, file=sys.stderr)\n    assert run_command(words) == 0, words\n"
        f"import twotower\nasked = twotower.retriever({str(store)!r}).recommend(twotower.Request('u1'), k=3)\n"
        "assert len(asked.items) == 3\n"
    )
    words = json.dumps([[str(word) for word in call] for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", as_base(code), words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert list(out.glob("*.parquet"))


def test_a_service_answers_in_the_base(store: Path) -> None:
    code = as_base("sys.argv[0] = 'twotower'\nfrom twotower.__main__ import main\nmain()")
    with serving(store) as start:
        served = start(code=code, preload=False).wait()
        body = {"user_id": "u1", "history": ["i1"], "k": 3}
        assert len(httpx.post(served.url + "/v1/recommend", json=body).json()["items"]) == 3
        assert served.end()[0] == 0


def test_a_verb_that_needs_an_extra_says_so_and_leaves_nothing(store: Path, tmp_path: Path) -> None:
    """In the order of the words: what is missing is said before a file is made."""
    config = ROOT / "examples" / "own-data.toml"
    calls: list[list[object]] = [
        ["train", config, "--run", tmp_path / "run"],
        ["suggest", store.parent / "tables", "-o", tmp_path / "mine.toml"],
        ["prepare", config, "--out", tmp_path / "prepared"],
        ["publish", store.parent / "run", "--store", tmp_path / "store"],
        ["evaluate", store],
        ["config"],
        ["demo", "--run", tmp_path / "demo", "--serve", "--port", 0],
    ]
    code = (
        "import json\nfrom twotower.cli.app import run_command\n"
        "for words in json.loads(sys.argv[1]):\n    assert run_command(words) == 2, words\n"
        "import twotower\ntry:\n    twotower.fit\nexcept ImportError as e:\n    print(e, file=sys.stderr)\n"
    )
    words = json.dumps([[str(word) for word in call] for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", as_base(code), words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    how = "of the extra 'train': pip install -e '.[train]' in a checkout, or pip install 'WHEEL[train]'"
    lines = [re.sub("needs (torch|tomli_w)", "needs torch", line) for line in done.stderr.splitlines()]
    assert lines == [
        *(f"error: twotower {call[0]} needs torch, {how}" for call in calls),
        f"twotower.fit needs torch, {how}",
    ]
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_module_of_ones_own_that_needs_an_extra_is_no_misspelt_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_torch.py").write_text("raise ModuleNotFoundError(name='torch.nn')")
    (tmp_path / "needs_other.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match="^`kinds='needs_torch'` needs torch, of the extra 'train'"):
        import_modules(["needs_torch"])
    with pytest.raises(ConfigError, match="no_such_package.*name an installed module"):
        import_modules(["needs_other"])
    assert missing_package(ModuleNotFoundError(name="no_such_package"), "it") is None
    assert missing_package(ModuleNotFoundError(), "it") is None


@pytest.mark.system
def test_the_quickstart_of_the_readme_runs_from_clicks_to_answers_over_http(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the programs of this environment; `make dist` does it with those of the wheel."""
    dist = runpy.run_path(str(ROOT / ".ci" / "dist.py"))
    store = dist["quickstart"](Path(sys.executable).parent, tmp_path / "quickstart")
    assert Store(store).current().id
    shown = capsys.readouterr().out
    followed = [line.split()[2] for line in shown.splitlines() if line.startswith("$ twotower ")]
    assert followed == ["suggest", "train", "doctor", "publish", "recommend", "similar", "train"]


@pytest.mark.system
def test_the_wheel_has_the_files_and_the_metadata_of_the_base(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    code = f"import hatchling.build as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
        names = set(wheel.namelist())
        found = Parser().parsestr(wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    assert {n for n in names if n.endswith(".toml")} == {
        "twotower/cli/demo.toml",
        *(f"twotower/recipes/{path.name}" for path in (ROOT / "examples" / "recipes").glob("*.toml")),
    }
    assert {"twotower/py.typed", "twotower/serve/page/index.html", "twotower/reports/run.html"} <= names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "examples"))]
    required = [Requirement(line) for line in found.get_all("Requires-Dist", [])]
    base = {r.name for r in required if r.marker is None or "extra" not in str(r.marker)}
    assert base == {Requirement(line).name for line in PROJECT["dependencies"]}
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    code = "from twotower.suggestion.recipes import FOLDER, read_recipe, recipe_names; print(FOLDER, *recipe_names())\n"
    code += "assert all(map(read_recipe, recipe_names()))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "installed" / "twotower" / "recipes"), *recipe_names()]


def test_the_page_of_compatibility_has_the_numbers_of_all_formats() -> None:
    found = {}
    for path in (ROOT / "src" / "twotower").rglob("*.py"):
        for name, number in re.findall(
            r"^(\w*(?:FORMAT|SCHEMA_VERSION)) = (\d+)$", path.read_text(encoding="utf-8"), re.M
        ):
            found[path.parent.name + "/" + path.stem, name] = int(number)
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    shown = [int(n) for n in re.findall(r"^\| [^|]+ \| (\d+) \| [^|]+ \|$", page, re.M)]
    assert len(found) > 5
    assert sorted(found.values()) == sorted(shown)
