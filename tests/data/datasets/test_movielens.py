"""Small archives in the official layouts are read right; damaged and hostile ones, and bad networks, are refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from messages import refused
from movielens_archives import ML_1M, ML_100K, zipped

from twotower.data.datasets import archive, movielens
from twotower.data.datasets.archive import MAX_MEMBER_BYTES, Archive
from twotower.data.datasets.ml_1m import MovieLens1M
from twotower.data.datasets.ml_100k import WHEEL_FOLDER, MovieLens100K
from twotower.data.datasets.movielens import Downloads, MovieLens, kind_of_archive
from twotower.data.tables import Tables, check, save
from twotower.errors import DataError, RunError

KINDS: dict[str, type[MovieLens]] = {kind.kind: kind for kind in (MovieLens1M, MovieLens100K)}


def parse(data: bytes, what: str, name: str, most: int = MAX_MEMBER_BYTES) -> Tables:
    return KINDS[name]().parse(data, what, most)


def load(name: str, source: Path | str = "", downloads: Downloads = Downloads()) -> Tables:
    return KINDS[name](archive=str(source)).load(downloads)


def archive_name(source: Path | str) -> str:
    return kind_of_archive(source, [*KINDS.values()]).kind


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test downloads is not found by another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


WHEEL = {
    f"{WHEEL_FOLDER}ml-100k.user": (
        b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        b"1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\tV3N4P\n"
    ),
    f"{WHEEL_FOLDER}ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tMisérables, Les\t1995\tDrama\n3\tunknown\t\tunknown\n"
    ).encode(),
    f"{WHEEL_FOLDER}ml-100k.inter": (
        b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        b"1\t1\t5\t874965758\n1\t3\t3\t876893171\n2\t2\t4\t878542960\n"
    ),
}


# --- parsing ------------------------------------------------------------------------------------------------------


def test_ml_1m_is_parsed() -> None:
    tables = parse(zipped(ML_1M), "a.zip", "ml-1m")
    assert tables.users.rows() == [(1, "F", 1, 10, "48067"), (2, "M", 56, 16, "V3N4P")]
    assert tables.items.rows() == [
        (1, "Toy Story (1995)", 1995, ["Animation", "Children's", "Comedy"]),
        (2, "Léon: The \x85 Professional (1994)", 1994, ["Drama"]),
        (5, "Nameless", None, ["Film-Noir"]),
    ]
    assert tables.interactions.rows() == [(1, 1, 5, 978300760), (1, 5, 3, 978302109), (2, 2, 4, 978301968)]


def test_ml_100k_is_parsed() -> None:
    tables = parse(zipped(ML_100K), "a.zip", "ml-100k")
    assert tables.users.rows() == [(1, "M", 24, "technician", "85711"), (2, "F", 53, "other", "V3N4P")]
    assert tables.items.rows() == [
        (1, "Toy Story (1995)", 1995, ["Animation", "Children's", "Comedy"]),
        (2, "Misérables, Les (1995)", 1995, ["Drama"]),
        (3, "unknown", None, []),
    ]
    assert tables.interactions.rows() == [(1, 1, 5, 874965758), (1, 3, 3, 876893171), (2, 2, 4, 878542960)]


@pytest.mark.parametrize(
    ("member", "old", "new", "words"),
    [
        ("ml-1m/ratings.dat", b"::3::", b"::three::", "ratings.dat (could not parse `three`"),
        ("ml-1m/users.dat", b"2::M", b"2::", "users.dat line 2 does not read user_id, gender"),
        ("ml-1m/movies.dat", b"5::Nameless", b"Nameless", "movies.dat line 3 does not read as a film in 3 columns"),
        ("ml-100k/u.user", b"|M|", b"||", "u.user line 1 does not read user_id, age"),
        ("ml-100k/u.item", b"|0\n2|", b"\n2|", "u.item line 1 does not read as a film in 24 columns"),
    ],
)
def test_a_malformed_row_is_refused_and_named(member: str, old: bytes, new: bytes, words: str) -> None:
    name: Any = member.split("/")[0]
    members = dict(ML_1M if name == "ml-1m" else ML_100K)
    assert members[member].count(old) == 1
    members[member] = members[member].replace(old, new)
    refused(lambda: parse(zipped(members), "a.zip", name), "a.zip: ", words, "fetch the archive again")


@pytest.mark.parametrize("name", ["ml-1m", "ml-100k"])
def test_a_missing_member_is_refused(name: Any) -> None:
    whole = ML_1M if name == "ml-1m" else ML_100K
    for member in whole:
        if member.endswith("README"):
            continue
        fewer = {n: d for n, d in whole.items() if n != member}
        refused(partial(parse, zipped(fewer), "a.zip", name), f"a.zip: no entry '{member}' (found: ml-1")


# --- hostile archives ---------------------------------------------------------------------------------------------


def test_a_large_entry_is_refused() -> None:
    refused(lambda: parse(zipped(ML_1M), "a.zip", "ml-1m", 60), "entry 'ml-1m/movies.dat' unpacks to")


def test_an_archive_damaged_anywhere_is_read_right_or_refused() -> None:
    whole = zipped(ML_1M)
    expected = parse(whole, "a.zip", "ml-1m")
    outcomes = set()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        try:
            tables = parse(bytes(damaged), "a.zip", "ml-1m")
        except DataError:
            outcomes.add("refused")
        else:
            outcomes.add("right")
            assert tables.interactions.equals(expected.interactions)
            assert tables.users.equals(expected.users)
            assert tables.items.equals(expected.items)
    assert outcomes == {"refused", "right"}


def test_an_encrypted_archive_is_refused() -> None:
    locked = bytearray(zipped(ML_1M))
    at = 0
    while (at := locked.find(b"PK\1\2", at)) >= 0:
        locked[at + 8] |= 1  # the flag of encryption in the central directory
        at += 4
    refused(lambda: parse(bytes(locked), "a.zip", "ml-1m"), "entry 'ml-1m/ratings.dat' is damaged (", "encrypted")


# --- local archives -----------------------------------------------------------------------------------------------


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Path]:
    """Paths of both archives, of one without a MovieLens, of no archive, and of nothing."""
    archives = {"ml-1m": zipped(ML_1M), "ml-100k": zipped(ML_100K), "other": zipped({"a/b": b"c"}), "text": b"no zip"}
    for name, data in archives.items():
        (tmp_path / f"{name}.zip").write_bytes(data)
    return {name: tmp_path / f"{name}.zip" for name in [*archives, "nothing"]}


def test_the_environment_names_the_archive_and_source_wins_over_it(
    archives: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TWOTOWER_DATA", str(archives["ml-1m"]))
    assert load("ml-1m").users.height == 2
    other = tmp_path / "again.zip"
    other.write_bytes(zipped(ML_1M | {"ml-1m/users.dat": b"1::F::1::10::48067\n"}))
    assert load("ml-1m", str(other)).users.height == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other", "neither an ml-1m/ nor an ml-100k/ folder inside"),
        ("text", "not a complete zip archive"),
        ("nothing", "no such file; give the path of ml-1m.zip"),
    ],
)
def test_what_is_no_movielens_is_refused(
    archives: dict[str, Path], name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(lambda: archive_name(archives[name]), str(archives[name]), words)
    refused(lambda: load("ml-1m", archives[name]), str(archives[name]))
    monkeypatch.setenv("TWOTOWER_DATA", str(archives[name]))
    refused(lambda: load("ml-1m"), str(archives[name]))


# --- the network --------------------------------------------------------------------------------------------------

GOOD = {"ml-1m": zipped(ML_1M), "ml-100k": zipped(ML_100K)}


class Handler(BaseHTTPRequestHandler):
    """`/good/NAME`, and every way in which a server fails."""

    stop: threading.Event

    def do_GET(self) -> None:
        kind, name = self.path.split("/")[1:]
        body = GOOD[name]
        if kind == "garbage":
            self.wfile.write(b"hello\r\n\r\n")
            return
        self.send_response(404 if kind == "gone" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "stalled":
            self.wfile.write(body[:10])
            self.stop.wait(10)
            return
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a loopback server."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    handler = type("OneHandler", (Handler,), {"stop": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        handler.stop.set()  # type: ignore[attr-defined]
        http.shutdown()
        thread.join()


def served(name: Any, url: str, **wrong: Any) -> Downloads:
    """Downloads of `name` from `url`, with the size and digest of the good archive unless `wrong`."""
    right: dict[str, Any] = {"size": len(GOOD[name]), "sha256": hashlib.sha256(GOOD[name]).hexdigest()}
    return Downloads(Archive(url, **(right | wrong)), hashlib.sha256(zipped(WHEEL)).hexdigest(), 0.2)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip as it would fetch a small wheel; the list holds the commands that were run."""
    wheel, commands = zipped(WHEEL), []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / "recbole-1.2.1-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.parametrize("name", ["ml-1m", "ml-100k"])
def test_a_download_with_the_right_digest_is_taken(
    server: str, pip: list[list[str]], name: Any, messages: list[str]
) -> None:
    downloads = served(name, f"{server}/good/{name}")
    assert load(name, "", downloads).interactions.height == 3
    assert messages == [f"downloading {server}/good/{name} (0.0 MB)"]
    assert not pip
    # It is kept; a kept file that was damaged is fetched again.
    assert load(name, "", downloads).interactions.height == 3
    assert "before" in messages[1]
    assert downloads.archive
    kept = archive.cache_path(downloads.archive)
    kept.write_bytes(kept.read_bytes()[:-1])
    assert load(name, "", downloads).interactions.height == 3
    assert messages[2].startswith("downloading")
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


FAILURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "wrong digest": ("good", {"sha256": "0" * 64}, "SHA-256"),
    "too long": ("good", {"size": 99}, "got 100 bytes"),
    "not found": ("gone", {}, "cannot reach"),
    "stalled": ("stalled", {}, "timed out"),
    "not http": ("garbage", {}, "cannot reach"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_refuses_ml_1m_and_falls_back_to_the_wheel_for_ml_100k(
    server: str, pip: list[list[str]], failure: str, messages: list[str]
) -> None:
    kind, wrong, words = FAILURES[failure]
    downloads = served("ml-1m", f"{server}/{kind}/ml-1m", **wrong)
    refused(
        lambda: load("ml-1m", "", downloads),
        f"{server}/{kind}/ml-1m",
        words,
        "archive='path/to/ml-1m.zip'",
        "TWOTOWER_DATA",
    )
    assert not pip

    tables = load("ml-100k", "", served("ml-100k", f"{server}/{kind}/ml-100k", **wrong))
    assert words in messages[-1]
    assert "out of the PyPI wheel recbole==1.2.1 instead" in messages[-1]
    assert len(pip) == 1
    assert "recbole==1.2.1" in pip[0]
    assert tables.users.rows() == [(1, "M", 24, "technician", "85711"), (2, "F", 53, "other", "V3N4P")]
    assert tables.items.rows() == [
        (1, "Toy Story", 1995, ["Animation", "Children's", "Comedy"]),
        (2, "Misérables, Les", 1995, ["Drama"]),
        (3, "unknown", None, ["unknown"]),
    ]
    assert tables.interactions.rows() == [(1, 1, 5, 874965758), (1, 3, 3, 876893171), (2, 2, 4, 878542960)]
    assert check(tables.users, tables.items, tables.interactions, movielens.SCHEMA).notes == [
        "items: 1 of 3 values of 'year' are missing or not finite; imputed"
    ]


def test_another_wheel_than_the_known_one_is_refused(server: str, pip: list[list[str]]) -> None:
    downloads = replace(served("ml-100k", f"{server}/gone/ml-100k"), wheel_sha256="f" * 64)
    refused(lambda: load("ml-100k", "", downloads), "recbole==1.2.1: the wheel has SHA-256", "expected ffffffffffff…")
    assert len(pip) == 1


def test_without_pip_either_ml_100k_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "first line\nno route to host\n")

    monkeypatch.setattr(subprocess, "run", fail)
    refused(
        lambda: load("ml-100k", "", served("ml-100k", f"{server}/gone/ml-100k")),
        "with pip either (no route to host)",
        "`archive`",
    )


# --- saving -------------------------------------------------------------------------------------------------------


def test_a_failed_save_keeps_the_old_file_and_leaves_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = parse(zipped(ML_1M), "a.zip", "ml-1m")
    save(tables, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        save(parse(zipped(ML_100K), "a.zip", "ml-100k"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tables = parse(zipped(ML_1M), "a.zip", "ml-1m")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(partial(save, tables, folder), str(folder), "choose another folder")
