"""A file or a folder is replaced as a whole, or stays as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from twotower import files
from twotower.errors import RunError


def held(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_a_new_folder_takes_the_place_of_the_old_one_and_a_link_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").write_text("1")
    link.symlink_to(real)
    with files.new_folder(link) as folder:
        (folder / "new").write_text("2")
        assert held(real) == {"old": "1"}
    assert link.is_symlink()
    assert held(real) == {"new": "2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_mounted_disk_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("1")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(RunError, match="a mounted disk cannot be replaced"), files.new_folder(tmp_path / "disk"):
        raise AssertionError
    assert held(tmp_path / "disk") == {"old": "1"}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_there_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    rename, calls = os.replace, []

    def broken(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "replace", broken)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # as on a system without it
    with pytest.raises(RunError, match="Input/output error"), files.new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("2")
    assert held(tmp_path / "out") == {"old": "1"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("there", [True, False])
def test_what_a_process_left_that_was_killed_between_two_renames_comes_back(tmp_path: Path, there: bool) -> None:
    left = tmp_path / ".out.7.old"
    left.mkdir()
    (left / "old").write_text("1")
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert held(tmp_path / "out") == ({} if there else {"old": "1"})
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writes_of_a_file_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two hosts whose processes have one number."""
    path, calls = tmp_path / "f", list[str]()

    class Other:
        def point(self, name: str) -> None:
            calls.append(name)
            if len(calls) == 1:
                files.write(path, b"of the other")
                assert path.read_bytes() == b"of the other"

    monkeypatch.setattr(files, "hooks", Other())
    files.write(path, b"ours")
    assert calls.count("file.renamed") == 2
    assert held(tmp_path) == {"f": "ours"}


@pytest.mark.parametrize("ending", ["tmp", "old"])
def test_what_a_write_has_left_is_known_by_its_name(tmp_path: Path, ending: Literal["tmp", "old"]) -> None:
    left = files.temporary_path(tmp_path / "a.json", ending)
    left.write_text("1")
    files.remove_leftovers(tmp_path, {"b.json"}.__contains__)
    assert held(tmp_path) == {left.name: "1"}
    files.remove_leftovers(tmp_path, {"a.json"}.__contains__)
    assert held(tmp_path) == ({"a.json": "1"} if ending == "old" else {})
