"""Training, evaluation, answers and a service of one worker need nothing that only POSIX has.

Windows is not at hand: every process of a test imitates its interpreter. It lacks the functions and flags that Windows
lacks, its event loop has no handlers of signals, and the package cannot import POSIX modules (libraries have their own
ways there). What Windows refuses for open files is not imitated.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import httpx
import polars as pl
import pytest
from server_process import serving
from suggestion_worlds import log

from twotower.escaping import shell_command
from twotower.files.urls import Url, is_url
from twotower.limited_process import WorkResult, run_limited
from twotower.suggestion.suggest import suggest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_POSIX = """
import asyncio, builtins, os, sys
sys.modules["uvloop"] = None
real = builtins.__import__
def import_as_windows(name, globals=None, *more, **keywords):
    posix = name in ("fcntl", "resource", "pwd", "grp", "termios")
    if posix and str((globals or {}).get("__name__", "")).partition(".")[0] in ("twotower", "__main__"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *more, **keywords)
builtins.__import__ = import_as_windows
names = "fork forkpty fchmod nice sched_getaffinity posix_fallocate O_DIRECTORY O_NOFOLLOW O_CLOEXEC"
for name in names.split():
    delattr(os, name)
def add_signal_handler(*_):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = add_signal_handler
"""
STEPS = """
import sys
from pathlib import Path
from twotower.cli.app import run_command
try:
    import fcntl
except ImportError:
    out, config = Path(sys.argv[1]), sys.argv[2]
    run, store = str(out / "run"), str(out / "store")
    steps = (
        ["train", config, "--run", run, "--set", "train.epochs=1"],
        ["train", config, "--run", run, "--set", "train.epochs=2", "--resume", "--override"],
        ["evaluate", run],
        ["publish", run, "--store", store],
        ["evaluate", store],
        ["recommend", "--store", store, "--user", "c001", "-k", "3"],
        ["recommend", "--store", store, "--users", str(out / "users.csv"), "--out", str(out / "answers")],
        ["embed", run, str(out / "items.csv"), "--out", str(out / "vectors")],
        ["prepare", config, "--out", str(out / "prepared")],
        ["publish", run, "--store", store],
        ["rollback", "--store", store],
        ["publish", run, "--store", store],
        ["publish", run, "--store", store],
        ["gc", "--store", store],
    )
    for step in steps:
        assert run_command(step) == 0, step
else:
    raise SystemExit("the imitation does not work")
"""


POSIX = (
    {"chown", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid"}
    | {
        "killpg", "mkfifo", "nice", "posix_fallocate", "pread", "pwrite", "sched_getaffinity", "setsid", "statvfs",
        "sync",
    }
    | {"sysconf", "uname", "wait", "waitpid", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"}
)  # fmt: skip
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
GUARDED = {
    ("arrays/pieces.py", "posix_fallocate"), ("files/inspections.py", "geteuid"), ("limited_process.py", "nice"),
    ("machine.py", "sched_getaffinity"),
}  # fmt: skip
MODULES = {
    ("files/locks.py", "fcntl"),
    ("limited_process.py", "resource"),
    ("machine.py", "resource"),
    ("serve/connections.py", "resource"),
}
"""Modules that use what Windows lacks only where it is there."""


def test_what_only_posix_has_is_used_in_the_places_that_look_for_it() -> None:
    functions, modules = set(), set()
    found = re.compile(rf"\bos\.({'|'.join(POSIX)})\b|\b({'|'.join(POSIX_MODULES)})\b")
    for path in (ROOT / "src" / "twotower").rglob("*.py"):
        name, text = path.relative_to(ROOT / "src" / "twotower").as_posix(), path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if found.search(text) else ():
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr=attribute) if attribute in POSIX:
                    functions.add((name, attribute))
                case ast.Import(names=names):
                    modules |= {(name, alias.name) for alias in names}
                case ast.ImportFrom(module=str(module)):
                    modules.add((name, module))
    assert functions == GUARDED
    assert {(name, m) for name, m in modules if m in POSIX_MODULES} == MODULES


def test_a_slow_inspection_is_refused_as_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the output of a process that is stopped is text if that was asked for, and bytes otherwise."""

    def stopped(command: list[str], **options: object) -> None:
        lines = '["seen", ""]\n'
        output = lines if options.get("text") or options.get("encoding") else lines.encode()
        raise subprocess.TimeoutExpired(command, 1, output)

    monkeypatch.setattr(subprocess, "run", stopped)
    one, other = tmp_path / "one", tmp_path / "other"
    results = run_limited("module:name", [one, other], timeout=1, memory=1 << 30)
    assert results[one] == WorkResult("seen")
    assert results[other].error == "loading it takes more than 1 seconds"


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("runs\\mine", "runs\\mine"),
        ("C:\\My Runs\\mine", '"C:\\My Runs\\mine"'),
        ("Süd", "Süd"),
        ("a&b", '"a&b"'),
        ("", '""'),
        ('x = "y"', '"x = \\"y\\""'),
        ("C:\\PROGRA~1\\mine.toml", "C:\\PROGRA~1\\mine.toml"),
        ("C:\\My Runs\\", '"C:\\My Runs\\\\"'),
        ("evaluation.k=1,2", '"evaluation.k=1,2"'),
        ("@mine", '"@mine"'),
        ("~", '"~"'),
        ("-5.toml", '"-5.toml"'),
        ("--user", "--user"),
    ],
)
def test_a_command_that_is_shown_on_windows_is_quoted_for_its_shells(word: str, quoted: str) -> None:
    assert shell_command("evaluate", word, windows=True) == f"twotower evaluate {quoted}"


@pytest.mark.parametrize("word", ["C:\\My Runs\\", "a b\\\\", 'x = "y"', 'a\\"b c', "", 'a b\\"'])
def test_a_quoted_word_is_read_by_a_program_of_windows_as_it_was(word: str) -> None:
    quoted = shell_command(word, windows=True).removeprefix("twotower ")
    assert quoted in (subprocess.list2cmdline([word]), f'"{subprocess.list2cmdline([word])}"')


def test_a_path_of_windows_that_was_made_of_a_url_is_one() -> None:
    assert Url.parse(PureWindowsPath("s3://lake/clicks/day.parquet")) == Url("s3", "lake", ("clicks", "day.parquet"))
    assert not is_url(PureWindowsPath("s3/clicks.csv"))
    assert not is_url(PureWindowsPath("C:\\clicks.csv"))


def test_a_config_on_another_drive_names_its_tables_by_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log().write_csv(tmp_path / "clicks.csv")
    monkeypatch.chdir(tmp_path)
    assert 'interactions = "clicks.csv"' in suggest("clicks.csv").text

    def relpath(path: object, start: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", relpath)
    assert f'interactions = "{tmp_path.as_posix()}/clicks.csv"' in suggest("clicks.csv").text


@pytest.fixture
def without_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every interpreter that is started run without POSIX."""
    (tmp_path / "imitation").mkdir()
    (tmp_path / "imitation" / "sitecustomize.py").write_text(WITHOUT_POSIX)
    given = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "imitation"), given])))


@pytest.mark.system
@pytest.mark.usefixtures("without_posix")
def test_a_shop_is_trained_measured_published_asked_and_served(tmp_path: Path) -> None:
    pl.DataFrame({"customer": [f"c{i:03}" for i in range(1, 30)]}).write_csv(tmp_path / "users.csv")
    (tmp_path / "items.csv").write_bytes((ROOT / "examples" / "own-data" / "products.csv").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path), str(ROOT / "examples" / "own-data.toml")],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "store" / "bundles").iterdir())) == 2
    assert pl.read_parquet(tmp_path / "answers" / "*.parquet").height == 290
    assert (tmp_path / "vectors" / "_embedding.json").exists()
    assert not list((tmp_path / "run").glob(".*"))
    with serving(tmp_path / "store") as start:
        served = start("--event-ttl", "60", preload=False).wait()
        reply = httpx.post(served.url + "/v1/recommend", json={"user_id": "c001", "k": 3})
        assert len(reply.json()["items"]) == 3
        code, log = served.end()
        assert code == 0, log
        assert "draining" in log
