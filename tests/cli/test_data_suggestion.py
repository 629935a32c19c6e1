"""The verb suggest: a config that trains, printed or written; bad input is one line, exit code 2, and no file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import polars as pl
import pytest
from suggestion_worlds import log, with_label

from twotower.cli.app import run_command


def call(*arguments: object) -> int:
    return run_command([str(a) for a in arguments])


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    path = tmp_path / "clicks.csv"
    log(length=8).write_csv(path)
    return path


def test_a_question_names_the_flags_that_settle_it(clicks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = clicks.with_name("two.csv")
    log(length=8).with_columns(customer=pl.col("user_id") + 7, updated_at=pl.col("timestamp") + 9).write_csv(two)
    assert call("suggest", two) == 2
    shown = capsys.readouterr()
    assert not shown.out
    first, *lines, hint, again = shown.err.splitlines()
    assert first == "error: interactions: columns have two readings, or no usual name"
    assert lines[:3] == [
        "  user: 'user_id' or 'customer'", "  time: 'timestamp' or 'updated_at'", "  found: item = 'item_id'",
    ]  # fmt: skip
    assert "    customer    7, 8, 9" in lines
    assert hint == "  ('': no column has the role; --query or --session may stand for --user)"
    assert again == f"  again: twotower suggest {two} --user COLUMN --time COLUMN"
    assert call("suggest", two, "--user", "customer", "--time", "") == 0
    settings = tomllib.loads(capsys.readouterr().out)["schema"]
    assert (settings["user_id"], settings["item_id"], settings.get("time")) == ("customer", "item_id", None)


def test_a_question_shows_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pl.DataFrame({"price\x1b[2J": [1.57, 2.51], "a\nb": ["x", "y\n"]}).write_csv(tmp_path / "prices.csv")
    assert call("suggest", tmp_path / "prices.csv", "--output", tmp_path / "mine.toml") == 2
    shown = capsys.readouterr().err
    assert shown.endswith(
        f"again: twotower suggest {tmp_path}/prices.csv --output {tmp_path}/mine.toml --user COLUMN --item COLUMN\n"
    )
    assert "\x1b" not in shown
    assert "a\\u000ab" in shown
    assert not (tmp_path / "mine.toml").exists()


def test_the_written_config_trains(clicks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = clicks.with_name("mine.toml")
    assert call("suggest", clicks, "--output", output) == 0
    shown = capsys.readouterr().out
    assert "Recipe sequence-short" in shown
    assert "a flag such as --time NAME corrects one" in shown
    assert f"next: twotower train {output} --run runs/mine" in shown
    fast = ["--set", "train.epochs=1", "--set", "train.device=cpu"]
    assert call("train", output, "--run", clicks.with_name("run"), *fast) == 0
    assert "recall@10" in capsys.readouterr().out


def test_the_printed_config_is_toml(
    clicks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clicks.parent)
    assert call("suggest", "clicks.csv", "--set", "train.epochs=2") == 0
    settings = tomllib.loads(capsys.readouterr().out)
    assert (settings["data"], settings["train"]["epochs"]) == ({"interactions": "clicks.csv"}, 2)


def test_tables_are_named_by_flags(clicks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = clicks.with_name("things.csv")
    pl.DataFrame({"item_id": range(40), "category": ["a", "b"] * 20}).write_csv(items)
    assert call("suggest", clicks, "--items", items, "--recipe", "cold-start") == 0
    assert 'name = "category"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.csv"], "none.csv: no such file"),
        (["years.csv"], "give --set schema.bad_times=drop to leave those rows out"),
        (["clicks.csv", "--recipe", "sequence"], "--recipe sequence: no such recipe; did you mean"),
        (["clicks.csv", "--set", "train.epochs"], "--set train.epochs: expected key=value"),
        (["clicks.csv", "--users", "years.csv", "--label", "liked"], "no column 'liked'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, clicks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{i % 5},{i % 7},{4_102_444_800 if i == 3 else 1_650_000_000 + i}\n" for i in range(40)]
    clicks.with_name("years.csv").write_text(f"user_id,item_id,timestamp\n{''.join(rows)}")
    monkeypatch.chdir(clicks.parent)
    before = sorted(clicks.parent.rglob("*"))
    assert call("suggest", *arguments, "--output", "mine.toml") == 2
    shown = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]*\n", shown.err)
    assert words in shown.err
    assert sorted(clicks.parent.rglob("*")) == before


def test_a_file_that_exists_is_kept(clicks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("suggest", clicks, "--output", clicks) == 2
    assert "exists already; choose another file for --output" in capsys.readouterr().err
    assert clicks.read_text() == log(length=8).write_csv()
    assert call("suggest", clicks, "--output", clicks.parent / "no" / "mine.toml") == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_odd_names_stay_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"user_id": 'who "is" it', "item_id": "what\\is it", "clicked": "did they?"}
    frame = with_label(log(length=8), 0.3).rename(odd)
    frame.select('who "is" it', "what\\is it", "did they?").write_csv(tmp_path / "a b'c.csv")
    named = [
        "--user",
        'who ""is"" it',
        "--item",
        "what\\is it",
        "--label",
        "did they?",
        "--output",
        tmp_path / "o.toml",
    ]
    assert call("suggest", tmp_path / "a b'c.csv", *named) == 0
    fast = ["--set", "train.epochs=1", "--set", "train.device=cpu"]
    assert call("train", tmp_path / "o.toml", "--run", tmp_path / "run", *fast) == 0
