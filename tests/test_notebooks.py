"""The notebooks run from the first cell to the last, on made data here and on MovieLens in `make test-real`."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from worlds import write_movielens_archive

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
ARCHIVE = os.environ.get("TWOTOWER_DATA", "")
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
LESSONS = [name for name in NOTEBOOKS if name.startswith("lesson")]


def cells(name: str, kind: str) -> list[str]:
    """Return the texts of the cells of a kind."""
    book = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def run(name: str, more: str = "") -> list[Any]:
    """Run a notebook, and a cell `more` after it; an error in a cell is raised. Returns the cells with their
    outputs."""
    nbformat: Any = import_module("nbformat")  # without types
    client_of: Any = import_module("nbclient").NotebookClient
    book = nbformat.read(FOLDER / name, as_version=4)
    if more:
        book.cells.append(nbformat.v4.new_code_cell(more))
    client = client_of(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    return list(client.execute().cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    book = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert not any("raises-exception" in cell["metadata"].get("tags", []) for cell in code)


def test_both_languages_of_the_lesson_have_the_same_code() -> None:
    assert LESSONS == ["lesson.ipynb", "lesson.zh-CN.ipynb"]
    assert cells(LESSONS[0], "code") == cells(LESSONS[1], "code")
    assert len(cells(LESSONS[0], "markdown")) == len(cells(LESSONS[1], "markdown"))


CODE = """
import sys
sys.path.insert(0, {tests!r})
import twotower
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings
twotower.fit(checkerboard(), CHECKERBOARD_SCHEMA, settings());
"""


@pytest.mark.system
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_training_shows_its_progress_in_a_notebook(tmp_path: Path) -> None:
    nbformat: Any = import_module("nbformat")  # without types
    cell = nbformat.v4.new_code_cell(CODE.format(tests=str(Path(__file__).parent)))
    book = nbformat.v4.new_notebook(cells=[cell])
    client = import_module("nbclient").NotebookClient(book, timeout=600, kernel_name="python3")
    (done,) = client.execute().cells
    lines = "".join(output["text"] for output in done["outputs"]).splitlines()
    assert [line for line in lines if line.startswith("phase")] == [
        "phase 1 of 3: reading", "phase 2 of 3: epochs", "phase 3 of 3: evaluation",
    ]  # fmt: skip
    assert [line[:14] for line in lines if line.startswith("epoch ")] == ["epoch   1 of 2", "epoch   2 of 2"]


@pytest.mark.system
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != "lesson.zh-CN.ipynb"])
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_DATA", str(write_movielens_archive(tmp_path / "ml-1m.zip")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    counts = [cell["execution_count"] for cell in run(name) if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_lesson_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random negatives raise recall, and the softmax over all films has the highest."""
    assert ARCHIVE, "TWOTOWER_DATA must name ml-1m.zip"
    monkeypatch.setenv("TWOTOWER_DATA", ARCHIVE)  # which no other test may find
    more = "import json; print(json.dumps([[m['test.auc'], m['test.recall@10']] for m in results.values()]))"
    found = json.loads(run("lesson.ipynb", more)[-1]["outputs"][0]["text"])
    plain, senet, negatives, softmax = found
    assert min(plain[0], senet[0]) > 0.78
    assert max(plain[1], senet[1]) < negatives[1] < softmax[1]
