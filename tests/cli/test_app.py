"""The command line: verbs, one-line errors, exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import preloaded
import pytest
from worlds import CHECKERBOARD_SCHEMA, ID_FEATURES, checkerboard, settings

from twotower import api
from twotower.cli.app import run_command
from twotower.config.experiment import Config
from twotower.config.toml import dump_config, load_config, parse_config
from twotower.errors import DataError
from twotower.escaping import escape_controls, shell_command
from twotower.features.categorical import Categorical
from twotower.features.multi_hot import MultiHot
from twotower.features.schema import Schema
from twotower.features.side import SIDES
from twotower.features.text import Text
from twotower.reports.verdict import verdict


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with three tables and a config that names them."""
    for name, frame in zip(("users", "items", "interactions"), checkerboard(), strict=True):
        frame.write_csv(tmp_path / f"{name}.csv")
    config = settings(train={"epochs": 2, "batch_size": 200, "device": "cpu"})
    data = {n: f"{n}.csv" for n in ("users", "items", "interactions")}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    (tmp_path / "config.toml").write_text(dump_config(CHECKERBOARD_SCHEMA, config), encoding="utf-8")
    return tmp_path


def call(*arguments: object) -> int:
    return run_command([str(a) for a in arguments])


def test_train_then_evaluate_agree(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", project / "config.toml", "--run", project / "run") == 0
    shown = capsys.readouterr().out
    assert "popularity" in shown
    assert "user+item bias" in shown
    run = api.load(project / "run")
    found = verdict(run.metrics, run.config)
    assert found
    assert "\n".join(found.sentences) in shown
    command = f"publish {project / 'run'} --store store" if found.is_better else f"doctor {project / 'run'}"
    assert shown.endswith(f"next: twotower {command}\n")
    assert call("evaluate", project / "run", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    saved = json.loads((project / "run" / "metrics.json").read_text())
    assert measured == {m: saved[m] for m in measured}
    assert call("evaluate", project / "run") == 0
    assert f"{saved['test.auc']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{}/nowhere.toml", "--run", "{}/r"], ["no such file", "twotower config"]),
        (["train", "{}/config.toml"], ["--run"]),
        (["train", "{}/config.toml", "--run", "{}/r", "--set", "train.epoch=3"], ["train.epoch", "'epochs'"]),
        (
            ["train", "{}/config.toml", "--run", "{}/r", "--set", "train.epochs=0"],
            ["train.epochs = 0 trains no towers", "to 1 or more"],
        ),
        (["evaluate", "{}/nothing"], ["no run"]),
        (["data", "fetch", "ml-1m", "--source", "{}/no.zip", "--out", "{}/d"], ["no.zip", "no such file"]),
        (["data", "stats", "{}/.."], ["holds no interactions.parquet"]),
        (["compare", "{}", "{}", "--resamples", "1000000001"], ["--resamples", "1000000\n"]),
        (["trian"], ["trian"]),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(
    project: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name for p in project.iterdir()}
    assert call(*(a.replace("{}", str(project)) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert {p.name for p in project.iterdir()} == before


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model of films with names in two scripts, whose users liked all they met."""
    folder = tmp_path_factory.mktemp("published")
    users, items, actions = checkerboard()
    items = items.with_columns(pl.format("Дом ☃ {}", "item_id").alias("title"))
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"title": "title"})
    config = settings(loss={"kind": "softmax"}, negatives={"full": True}, train={"monitor": "validation.recall@5"})
    run = api.fit((users, items, actions.filter(pl.col("liked") == 1).head(300)), schema, config, folder=folder / "run")
    api.publish(run, folder / "store")
    return folder / "store"


def test_what_is_printed_into_a_file_is_utf_8_in_every_locale(store: Path, tmp_path: Path) -> None:
    """As on Windows, whose locale is none."""
    locale = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"} | C_LOCALE
    command = [sys.executable, "-m", "twotower", "recommend", "--store", str(store), "--user", "1", "-k", "3"]
    with (tmp_path / "answer.txt").open("wb") as file:
        subprocess.run(command, env=locale, stdout=file, check=True)
    assert "Дом ☃" in (tmp_path / "answer.txt").read_text(encoding="utf-8")


def test_json_of_what_cannot_be_measured_leaves_it_out(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def none(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    assert call("evaluate", store, "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=none)
    assert "recall@5" in found["index"]
    assert "gauc" not in found["index"]  # nobody disliked anything


ADDRESSES = Schema(
    user_id="uid",
    item_id="iid",
    label="liked",
    features=(
        *(Categorical(name=f"{side[0]}id", side=side) for side in SIDES),
        Categorical(name="zip", side="user"),
        Categorical(name="floor", side="user"),
        MultiHot(name="codes", side="user", separator="|"),
        Categorical(name="version", side="item"),
    ),
)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CSVs of categories that look like numbers, a run of them and a store."""
    folder = tmp_path_factory.mktemp("addresses")
    users, items, actions = checkerboard()
    n, m = users["user_id"].to_list(), items["item_id"].to_list()
    spelled = {
        "users": {
            "uid": n, "zip": [("02139", "2139", "1e5", "90210")[i % 4] for i in n], "floor": [i % 3 for i in n],
            "codes": [("7", "07", "7|12")[i % 3] for i in n],
        },
        "items": {
            "iid": m, "version": [("1.10", "1.1")[i % 2] for i in m],
            "sku": [("01000", "1000", "1e3")[i % 3] for i in m],
        },
        "interactions": actions.rename({"user_id": "uid", "item_id": "iid"}).drop("at").to_dict(as_series=False),
    }  # fmt: skip
    for name, columns in spelled.items():
        pl.DataFrame(columns).write_csv(folder / f"{name}.csv")
    config = settings(train={"epochs": 1, "batch_size": 200, "device": "cpu"})
    data = {name: f"{name}.csv" for name in spelled}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    (folder / "config.toml").write_text(dump_config(ADDRESSES, config), encoding="utf-8")
    assert call("train", folder / "config.toml", "--run", folder / "run") == 0
    assert call("publish", folder / "run", "--store", folder / "store") == 0
    return folder


@pytest.mark.parametrize(
    ("condition", "which"),
    [
        ("sku=01000", range(0, 30, 3)), ("version=1.10", range(0, 30, 2)), ("version=1.100", []),
    ],
)  # fmt: skip
def test_fault_G10_filters_find_what_looks_like_a_number_as_it_is_spelled(
    addresses: Path, condition: str, which: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--store", addresses / "store", "--user", "1", "--keep-seen", "-k", "30", "--where", condition, "--json"]
    assert call("recommend", *asked) == 0
    assert sorted(int(i["id"]) for i in json.loads(capsys.readouterr().out)["items"]) == [*which]


@pytest.mark.parametrize(
    ("features", "known"),
    [
        ({"zip": "02139"}, True),
        ({"zip": 2139}, True),
        ({"zip": 2139.5}, False),
        ({"floor": 2.0}, True),
        ({"floor": "02"}, False),
        ({"codes": "07"}, True),
    ],
)
def test_fault_G10_a_request_means_a_category_by_its_spelling(
    addresses: Path, features: dict[str, Any], known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.json").write_text(json.dumps({"features": features}))
    asked = ["--store", addresses / "store", "--features", tmp_path / "asked.json", "--json"]
    assert call("recommend", *asked) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == ([] if known else [*features])


def test_fault_G10_a_csv_that_is_embedded_is_read_as_in_training(addresses: Path, tmp_path: Path) -> None:
    run = api.load(addresses / "run")
    rows = (addresses / "users.csv").read_text().splitlines()
    for path, lines in ((tmp_path / "all.csv", rows), (tmp_path / "digits.tsv", [rows[0], *rows[2::4]])):
        path.write_text("\n".join(lines).replace(",", "\t" if path.suffix == ".tsv" else ",") + "\n")
        assert call("embed", addresses / "run", path, "--out", tmp_path / path.stem, "--side", "user") == 0
        found = pl.read_parquet(tmp_path / path.stem / "part-*.parquet")["vector"].to_numpy()
        users = [int(line.split(",")[0]) for line in lines[1:]]
        np.testing.assert_allclose(found, run.factors().users[users].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        (
            "schema.features.0={kind='categorical', name='user_id', side='user', hash_buckets=2147483647, "
            "width=1000000}",
            "2,147,483,648 x 1,000,000",
        ),
        ("model.width=4294967295", "x 4,294,967,295"),
    ],
)
def test_fault_G19_a_model_larger_than_the_machine_is_refused_before_anything_is_written(
    project: Path, override: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", project / "config.toml", "--run", project / "run", "--set", override) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the model's weights and gradients take ")
    assert shown in error
    assert "lower hash_buckets" in error
    assert not (project / "run").exists()


def test_fault_G19_a_tower_that_no_file_holds_is_refused_before_anything_is_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = "{kind='categorical', name='user_id', side='user', hash_buckets=600000, width=896}"
    assert call("train", project / "config.toml", "--run", project / "run", "--set", f"schema.features.0={large}") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the user tower reads weights of 2,153 MB, and a published tower has at most 2,146 MB "
    )
    assert "600,001 x 896); lower hash_buckets" in error
    assert not (project / "run").exists()


def test_fault_G19_more_memory_than_there_is_ends_with_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        np.empty(2**62, np.int8)

    monkeypatch.setattr(api, "fit", full)
    assert call("train", project / "config.toml", "--run", project / "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (")
    assert error.count("\n") == 1


def test_fault_G19_names_that_nobody_uses_and_ids_of_the_other_side_are_just_columns(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users, items, actions = (pl.read_csv(project / f"{n}.csv") for n in ("users", "items", "interactions"))
    odd = {"__row": 1, "__positive": 2, "*": 3, "^.*$": 4}
    for name, frame in (("users", users), ("items", items), ("interactions", actions)):
        other = {"users": {"item_id": 7}, "items": {"user_id": 5}, "interactions": {}}[name]
        frame.with_columns(pl.lit(v).alias(c) for c, v in (odd | other).items()).write_csv(project / f"{name}.csv")
    schema, config = load_config(project / "config.toml")
    assert schema
    both = (Categorical(name="favourite", column="item_id", side="user"), Categorical(name="user_id", side="item"))
    schema = schema.model_copy(update={"features": (*schema.features, *both)})
    (project / "config.toml").write_text(dump_config(schema, config), encoding="utf-8")
    assert call("train", project / "config.toml", "--run", project / "run", "--set", "train.epochs=1") == 0
    assert call("publish", project / "run", "--store", project / "store") == 0
    asked = ["--store", project / "store", "--user", "3", "--keep-seen", "-k", "3"]
    assert call("recommend", *asked, "--where", "^.*$=4", "--where", "*=3") == 0
    assert call("data", "stats", project) == 0
    told = capsys.readouterr()
    assert told.out.count("interactions per *: ") == 2
    assert "interactions per ^.*$: median 1200" in told.out


# ---- data in lines that people paste, and on a terminal

STEERING = "a\x1b]0;owned\x07\nb\r\x9b2J\u202egnp.exe\u2066 \x7f\u2028é ☃"
"""A title that would rename a window, end the line, go to its start, clear the screen and turn the writing round."""
HARMLESS = r"a\u001b]0;owned\u0007\u000ab\u000d\u009b2J\u202egnp.exe\u2066 \u007f\u2028é ☃"
NASTY = [
    "-5",
    "it's; touch owned $(touch owned) `touch owned` \"&",
    "two\nlines\x1b[2J",
    "\u202eback\\slash'",
    "--help",
]


def words_of(line: str) -> list[str]:
    """The words that bash makes of a command line."""
    done = subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, check=True, timeout=60)
    return done.stdout.decode(errors="surrogateescape").split("\0")[:-1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store in a folder, of users, items, titles and texts, that mean harm; and what publishing it printed."""
    folder = tmp_path_factory.mktemp("it's $(touch owned)\n&") / "-store"
    users, items, actions = checkerboard(len(NASTY))
    named = users.with_columns(pl.Series("user_id", NASTY))
    actions = actions.filter(pl.col("liked") == 1).join(users.with_columns(new=named["user_id"]), on="user_id")
    actions = actions.with_columns(user_id="new").drop("new")
    items = items.with_columns(pl.format("{} {}", pl.lit(STEERING), "item_id").alias("title"))
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"title": "title"})
    config = settings(loss={"kind": "softmax"}, negatives={"full": True}, train={"monitor": "validation.recall@5"})
    api.fit((named, items, actions), schema, config, folder=folder.parent / "run")
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out:
        patch.setattr(sys, "stdout", out)
        patch.chdir(folder.parent)
        assert call("publish", "run", "--store", folder) == 0
        return folder, out.getvalue()


def test_fault_G15_what_is_pasted_is_quoted(hostile: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    store, told = hostile
    line = next(line for line in told.splitlines() if line.startswith("next: "))
    words = words_of(line.removeprefix("next: "))
    assert words == ["twotower", "recommend", "--store", str(store), "--user", NASTY[0]]
    assert call(*words[1:], "-k", "1") == 0
    capsys.readouterr()
    for name in (bundle.name for bundle in (store / "bundles").iterdir()):
        (store / "CURRENT").write_text("nothing\n")
        assert call("recommend", "--store", store, "--user", "1") == 2
        advice = re.search("`(twotower rollback.*)` returns to an earlier", capsys.readouterr().err)
        assert advice
        assert call(*words_of(advice[1])[1:], "--to", name) == 0


@pytest.mark.parametrize("word", [*NASTY, STEERING, "plain-1.toml", "", "'", "half \udcff a byte", "~"])
def test_fault_G15_any_word_comes_through_a_shell_as_it_is(word: str) -> None:
    line = shell_command("evaluate", word, f"data.prepared={word}")
    assert line == escape_controls(line)
    assert words_of(line) == ["twotower", "evaluate", word, f"data.prepared={word}"]
    if word.startswith("-"):
        assert words_of(shell_command(Path(word))) == ["twotower", f"./{word}"]


def test_fault_G15_a_text_to_search_for_is_quoted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, items, actions = checkerboard()
    text = '-v "$(touch owned)" $HOME'
    users = users.with_columns(pl.lit(text).alias("asked"))
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": (*ID_FEATURES, Text(name="asked", side="user"))})
    config = settings(train={"epochs": 1})
    api.fit((users, items, actions), schema, config, folder=tmp_path / "run")
    assert call("publish", tmp_path / "run", "--store", tmp_path / "store", "--force") == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert words_of(line) == ["twotower", "search", "--store", str(tmp_path / "store"), "--", text]
    assert call(*words_of(line)[1:]) == 0


@pytest.mark.parametrize("verb", ["recommend", "stats", "error"])
def test_fault_G15_what_would_steer_a_terminal_is_shown_harmless(
    hostile: tuple[Path, str], verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = hostile
    arguments: list[object] = {
        "recommend": ["recommend", "--store", store, "--user", NASTY[1], "-k", "3", "--keep-seen"],
        "similar": ["similar", "--store", store, "--item", "3"],
        "stats": ["data", "stats", tmp_path],
        "error": ["similar", "--store", store, "--item", STEERING],
    }[verb]
    titles = {"user_id": [1, 1], "item_id": [1, 2], f"c{STEERING}": [STEERING] * 2}
    pl.DataFrame(titles).write_parquet(tmp_path / "interactions.parquet")
    assert call(*arguments) == (2 if verb == "error" else 0)
    told = "".join(capsys.readouterr())
    assert HARMLESS[:20] in told
    assert all(line.isprintable() for line in told.splitlines())
    assert not set(told) & set(STEERING) - set(HARMLESS) - {"\n"}


def test_fault_G15_json_keeps_titles_as_they_are(hostile: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("recommend", "--store", hostile[0], "--user", NASTY[2], "--json", "--keep-seen") == 0
    told = capsys.readouterr().out
    assert told[:-1].isprintable()
    assert all(i["title"] == f"{STEERING} {i['id']}" for i in json.loads(told)["items"])


def test_fault_G15_notes_of_a_training_are_harmless(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = pl.read_csv(project / "users.csv").with_columns(pl.lit(None, pl.String).alias(STEERING))
    users.write_parquet(project / "users.parquet")
    schema, config = load_config(project / "config.toml")
    assert schema
    schema = schema.model_copy(
        update={"features": (*schema.features, Categorical(name="x", column=STEERING, side="user"))}
    )
    (project / "config.toml").write_text(dump_config(schema, config), encoding="utf-8")
    asked = ["--set", "data.users=users.parquet", "--set", "train.epochs=1"]
    assert call("train", project / "config.toml", "--run", project / "run", *asked) == 0
    told = capsys.readouterr().out
    assert f"values of '{HARMLESS}' are missing" in told
    assert call("doctor", project / "run") in (0, 1)
    assert call("compare", project / "run", project / "run") == 0
    assert all(line.isprintable() for line in (told + capsys.readouterr().out).splitlines())


def test_the_template_is_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config") == 0
    schema, config = parse_config(tomllib.loads(capsys.readouterr().out))
    assert schema is not None
    assert config == Config()


@pytest.mark.parametrize("words", [[], ["data"]])
def test_without_a_verb_the_help_is_all_that_is_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    told = capsys.readouterr()
    assert "Usage: " in told.out + told.err
    assert "error:" not in told.out + told.err


def test_stats_of_a_file_tell_its_columns(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = project.glob("interactions.*")
    assert call("data", "stats", project) == 0
    of_folder = capsys.readouterr().out
    assert "interactions: 1,200 rows" in of_folder
    assert "interactions per user_id: median 30" in of_folder
    assert call("data", "stats", file) == 0
    told = capsys.readouterr().out
    assert told.startswith("interactions: ")
    assert told in of_folder
    (dates := project / "dates.csv").write_text("user_id,day\n1,31.12.23\n2,01.01.24\n", encoding="utf-8")
    assert call("data", "stats", dates) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("31.12.23")


def test_output_that_is_not_a_terminal_is_plain(project: Path) -> None:
    done = preloaded.run("-m", "twotower", "train", project / "config.toml", "--run", project / "r")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert sum(line.startswith("epoch ") for line in done.stdout.splitlines()) == 2
    assert not done.stderr


def test_a_terminal_gets_a_progress_bar(project: Path) -> None:
    import pty

    command = ("-m", "twotower", "train", project / "config.toml", "--run", project / "r")
    ours, theirs = pty.openpty()
    process = preloaded.start(*command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0
    assert b"phase 2 of 3: epochs\r\n" in shown
    assert b"\repochs\r" in shown  # the line that is overwritten


# ---- outputs, names and interrupts that fail


def twotower(*arguments: object, shell: str = '"$@"', **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `shell` says where "$@" gets its streams from."""
    command = [sys.executable, "-m", "twotower", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", shell, "bash", *command], env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True, text=True, check=False, errors="surrogateescape",
    )  # fmt: skip


def main_with_closed(*names: str) -> str:
    """Code of a process whose streams of these names are closed, as by `>&-`, and which then runs the command."""
    closing = "".join(f"os.close(sys.{name}.fileno()); sys.{name} = None\n" for name in names)
    return f"import os, sys\n{closing}from twotower.__main__ import main\nmain()"


@contextmanager
def output(kind: str) -> Iterator[int | IO[str]]:
    """A standard output: "full" has no space, "left" has no reader any more, "open" is a pipe."""
    if kind == "full":
        with Path("/dev/full").open("w") as full:
            yield full
    elif kind == "left":
        reader, writer = os.pipe()
        os.close(reader)
        yield writer
        os.close(writer)
    else:
        yield preloaded.PIPE


@pytest.mark.parametrize(
    ("out", "err", "closed", "words"),
    [
        ("full", "open", (), "No space left on device"),
        ("open", "open", ("stdout", "stderr"), ""),
        ("full", "full", (), ""),
        ("left", "open", (), "Broken pipe"),
    ],
)
def test_fault_G17_an_output_that_is_full_or_closed_costs_what_is_said_and_not_the_run(
    project: Path, out: str, err: str, closed: tuple[str, ...], words: str
) -> None:
    command = ("-c", main_with_closed(*closed), "train", project / "config.toml", "--run", project / "run")
    with output(out) as stdout, output(err) as stderr:
        process = preloaded.start(*command, stdout=stdout, stderr=stderr)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors == (f"warning: standard output: {words}; what was printed is lost\n" if words else "")
    assert api.load(project / "run").metrics


@pytest.mark.parametrize(
    ("out", "err", "words"),
    [
        ("full", "open", "error: standard output: No space left on device; the answer is lost\n"),
        ("full", "full", ""),
        ("left", "open", ""),
    ],
)
def test_fault_G17_an_answer_that_cannot_be_written_is_not_code_0(store: Path, out: str, err: str, words: str) -> None:
    command = ("-m", "twotower", "recommend", "--store", store, "--user", "1")
    with output(out) as stdout, output(err) as stderr:
        process = preloaded.start(*command, stdout=stdout, stderr=stderr)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (1, words)


def test_fault_G17_a_report_that_fails_costs_a_warning(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, *_: object) -> None:
        assert api.load(path.parent).metrics, "the model comes first"
        raise ValueError("no such colour\nat all")

    monkeypatch.setattr("twotower.reports.pages.write_report", fails)
    assert call("train", project / "config.toml", "--run", project / "run") == 0
    said = capsys.readouterr().out
    assert "warning: no report.html (no such colour)\n" in said
    assert f"run: {project / 'run'}\n" in said
    assert call("evaluate", project / "run") == 0


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_fault_G17_names_that_are_no_utf_8_are_refused_before_anything_is_done(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(project) + b"/caf\xe9"))
    odd.mkdir()
    for path in project.iterdir():
        if path.is_file():
            os.link(path, odd / path.name)
    before = sorted(p.name for p in odd.iterdir())
    for arguments in (
        ["train", project / "config.toml", "--run", odd / "run"],
        ["train", odd / "config.toml", "--run", project / "run"],
        ["prepare", project / "config.toml", "--out", odd / "out"],
        ["evaluate", odd],
    ):
        assert call(*arguments) == 2
        shown, errors = capsys.readouterr()
        assert not shown
        assert "caf\\udce9" in errors
        assert "no UTF-8 in this locale; rename it, or choose another\n" in errors
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
    done = twotower("train", "config.toml", "--run", "run", shell=f"cd $'{project}/caf\\xe9'; \"$@\"")
    assert done.returncode == 2
    assert "no UTF-8 in this locale" in done.stderr
    assert sorted(p.name for p in odd.iterdir()) == before
    assert not (project / "run").exists()


@pytest.mark.system  # processes of many locales
def test_fault_G17_a_locale_without_utf_8_trains_or_says_so_first(project: Path) -> None:
    _, items, actions = checkerboard()
    items, actions = (t.with_columns(pl.format("ä{}☃", "item_id").alias("item_id")) for t in (items, actions))
    items.with_columns(pl.format("Дом {}", "item_id").alias("title")).write_parquet(project / "items.parquet")
    actions.write_parquet(project / "interactions.parquet")
    text = (project / "config.toml").read_text(encoding="utf-8").replace(".csv", ".parquet")
    text = text.replace("users.parquet", "users.csv")
    (project / "config.toml").write_text(text, encoding="utf-8")
    command = ("train", project / "config.toml", "--set", "schema.title=title", "--run")
    done = twotower(*command, project / "run", **C_LOCALE)
    assert done.returncode == 0, done.stderr
    done = twotower(*command, project / "größe", **C_LOCALE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no UTF-8 in this locale; names are " in done.stderr
    assert "set PYTHONUTF8=1\n" in done.stderr
    (project / "größe.parquet").write_bytes((project / "items.parquet").read_bytes())
    (project / "config.toml").write_text(text.replace("items.parquet", "größe.parquet"), encoding="utf-8")
    done = twotower(*command, project / "other", **C_LOCALE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no UTF-8 in this locale" in done.stderr
    done = twotower(*command, project / "größe", LC_ALL="C")  # Python takes UTF-8 then
    assert done.returncode == 0, done.stderr


INTERRUPTED = """import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
os.kill(os.getpid(), signal.SIGINT)
[None for _ in range(10**6)]
"""
"""A module in which an interrupt arrives."""


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("typer", INTERRUPTED),
        ("torch", INTERRUPTED),
        (
            "torch",
            "try:\n    raise KeyboardInterrupt\nexcept BaseException as e:\n    raise ImportError('of C') from e",
        ),
    ],
)
def test_fault_G21_an_interrupt_while_libraries_are_loaded_is_one_line(tmp_path: Path, module: str, text: str) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = twotower("evaluate", tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_process_that_ends_does_not_look_through_all_its_objects() -> None:
    code = (
        "import atexit, gc, sys\nfrom twotower.__main__ import main\nsys.argv = ['twotower', '--version']\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000))\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_a_shell_completes_options() -> None:
    words, found = "twotower train --res", ["--resume"]
    code = "import sys; sys.argv = ['twotower']; from twotower.__main__ import main; main()"
    asked = {"_TWOTOWER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = preloaded.run("-c", code, env=os.environ | asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, found, "")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom twotower.cli.app import run_command\nassert run_command(['serve', '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'polars', 'faiss', 'fastapi', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_a_verb_answers_is_free_of_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logs(*_: object, **__: object) -> tuple[list[str], list[str]]:
        logging.getLogger("twotower.data.somewhere").warning("a message")
        raise DataError("the end")

    monkeypatch.setattr("twotower.retrieval.retriever.current_retriever", logs)
    assert run_command(["similar", "--store", "s", "--item", "1"]) == 2
    assert "warning: a message\n" in capsys.readouterr().err
