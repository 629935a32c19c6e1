"""The demo on a small archive: two questions, a table each, and a store that answers by what was watched last."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from movielens_archives import ML_100K, film, zipped

from twotower import api
from twotower.cli.app import run_command
from twotower.cli.demo import next_lines, program_here
from twotower.config.toml import load_config
from twotower.data.datasets.ml_100k import MovieLens100K
from twotower.retrieval.request import Request

USERS, FILMS, COLD = 40, 30, 4
VERBS = {"evaluate", "recommend", "doctor", "train", "suggest", "serve"}


def archive(folder: Path) -> Path:
    """A MovieLens 100K of users who watch a circle of films in its order, and rate those of their own genre above 3.
    The last films are known by the last rating of one user alone."""
    rng, rows = np.random.default_rng(1), []
    for user in range(1, USERS + 1):
        first = int(rng.integers(FILMS - COLD))
        for step in range(12):
            number = (first + step) % (FILMS - COLD) + 1
            rating = 5 if number % 2 == user % 2 else int(rng.integers(1, 4))
            rows.append((user, number, rating, 874_000_000 + 1000 * user + step))
    rows.append((USERS, FILMS, 5, 874_000_000 + 1000 * USERS + 99))
    people = [f"{u}|{20 + u % 30}|{'MF'[u % 2]}|writer|00000\n" for u in range(1, USERS + 1)]
    films = [film(n, f"Film {n} (1990)", ("Drama", "Comedy")[n % 2]) for n in range(1, FILMS + 1)]
    members = ML_100K | {
        "ml-100k/u.user": "".join(people).encode(),
        "ml-100k/u.item": "".join(films).encode(),
        "ml-100k/u.data": "".join("\t".join(map(str, row)) + "\n" for row in rows).encode(),
    }
    path = folder / "ml-100k.zip"
    path.write_bytes(zipped(members))
    return path


def table(lines: list[str], title: str) -> tuple[list[str], dict[str, list[str]], str]:
    """The columns, rows and last line of the table that follows a title."""
    begin = next(n for n, line in enumerate(lines) if line.startswith(title))
    head = next(n for n in range(begin, len(lines)) if lines[n].startswith("test  "))
    end = next(n for n in range(head, len(lines)) if lines[n].startswith("trained in"))
    rows = {line[:18].rstrip(): line[18:].split() for line in lines[head + 1 : end]}
    return lines[head].split()[1:], rows, lines[end + 1]


@pytest.mark.parametrize("times", [pytest.param(1, id="once"), pytest.param(2, id="again")])
def test_the_demo_answers_two_questions_and_publishes_the_first(
    times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for _ in range(times):  # the second replaces the first
        assert run_command(["demo", "--data", str(archive(tmp_path)), "--run", str(run)]) == 0
    out = capsys.readouterr().out
    lines = out[out.rindex("What next?") :].splitlines()

    columns, rows, cold = table(lines, "What next?")
    assert columns == ["width", "recall@10", "ndcg@10", "mrr@10", "hit_rate@10", "coverage@10"]
    assert list(rows) == ["model", "popularity", "user+item bias", "transition counts"]
    found = json.loads((run / "metrics.json").read_text())
    assert rows["model"] == [f"{found['test.width']:.0f}", *(f"{found[f'test.{name}']:.4f}" for name in columns[1:])]
    assert cold == "4 films of the catalogue have no rating in training; test rows of these: 1 of 40"

    columns, rows, _ = table(lines, "Would they like it?")
    assert columns == ["width", "auc", "gauc"]
    assert list(rows) == ["model", "popularity", "user+item bias"]
    found = json.loads((tmp_path / "run-like" / "metrics.json").read_text())
    assert rows["model"] == [f"{found['test.width']:.0f}", *(f"{found[f'test.{name}']:.4f}" for name in columns[1:])]

    assert len([line for line in lines if line.startswith("user ")]) == 3
    store = api.retriever(tmp_path / "run-store")
    asked = [[i.id for i in store.recommend(Request(events=[(seen, True)]), 3).items] for seen in ("3", "20")]
    assert asked[0] != asked[1]
    assert store.recommend(Request("1"), 1).items[0].title.startswith("Film ")

    commands = [shlex.split(line) for line in lines[lines.index("Next:") + 2 :: 2]]
    assert [next(w for w in words if w in VERBS) for words in commands] == [
        "evaluate",
        "recommend",
        "doctor",
        "train",
        "train",
        "suggest",
        "serve",
    ]
    for words in commands:
        if "train" in words:  # of the archive of the demo
            settings = load_config(Path(words[words.index("train") + 1]), [words[words.index("--set") + 1]])[1]
            assert settings.data.dataset == MovieLens100K(archive=str(archive(tmp_path)))


def test_the_commands_name_the_program_as_a_shell_here_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "a python")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/twotower")
    assert program_here(windows=False) == program_here(windows=True) == "twotower"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert program_here(windows=False) == "'a python' -m twotower"
    assert program_here(windows=True) == "python -m twotower"


def test_the_commands_are_those_of_both_shells_of_windows() -> None:
    dataset = MovieLens100K(archive=r"C:\My Data\ml-100k.zip")
    _, *lines = next_lines(Path("runs/demo"), Path("runs/demo-store"), 7, dataset, windows=True)
    commands = [line.strip() for line in lines[1::2]]
    assert commands[0].endswith(" evaluate runs/demo")
    assert all(line.endswith(":") for line in lines[::2])
    assert [line.count('\\"') + line.count("#") for line in commands] == [0] * 7
    values = [re.findall(r'"data.dataset=(.*)"', line) for line in commands if " train " in line]
    assert [tomllib.loads(f"x = {value}")["x"] for (value,) in values] == [dataset.model_dump(mode="json")] * 2


def test_a_folder_in_the_way_is_an_error_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run-like").mkdir()
    (tmp_path / "run-like" / "notes.txt").write_text("mine", encoding="utf-8")
    data = str(archive(tmp_path))
    assert run_command(["demo", "--data", data, "--run", str(tmp_path / "run")]) == 2
    assert "run-like" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)
    assert run_command(["demo", "--data", data, "--run", "."]) == 2
    assert str(tmp_path) in capsys.readouterr().err
