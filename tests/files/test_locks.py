"""A lock names its holder, ends with it, and shows the next one if it was killed; temporary folders end with theirs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from twotower.files import locks


def test_a_held_lock_is_refused_with_the_name_of_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_locked(path)
    with locks.lock(path) as held:
        held.write_holder("training")
        assert locks.is_locked(path)
        with (
            pytest.raises(locks.LockHeld, match=f"another training is running .pid {os.getpid()} on "),
            locks.lock(path),
        ):
            raise AssertionError
        held.clear()
        with pytest.raises(locks.LockHeld, match="another process is running"), locks.lock(path):
            raise AssertionError
    assert not locks.is_locked(path)
    assert path.read_bytes() == b""
    with locks.lock(path) as held:
        assert held.killed_holder is None


def test_text_in_a_free_lock_is_of_a_killed_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("publish 123 host 20260101T000000Z\n")
    with locks.lock(path) as held:
        assert held.killed_holder == locks.LockHolder("publish", "123", "host", "20260101T000000Z")
        assert held.killed_holder.process == "(pid 123 on host)"
    path.write_text("no holder")
    with locks.lock(path) as held:
        assert held.killed_holder == locks.LockHolder()


def test_a_lock_that_is_not_kept_leaves_no_file(tmp_path: Path) -> None:
    with locks.lock(tmp_path / "lock", keep=False):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_a_pipe_or_a_link_is_no_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("pipe", "link"):
        with pytest.raises(OSError), locks.lock(tmp_path / name):
            raise AssertionError
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_and_its_lock_are_there_within_the_block_alone(tmp_path: Path) -> None:
    with locks.scratch_folder(tmp_path, "text") as folder:
        assert re.fullmatch(r"twotower-text-[0-9a-f]{16}", folder.name)
        (folder / "file").write_text("content")
        assert sorted(tmp_path.iterdir()) == [folder, Path(f"{folder}.held")]
        with locks.scratch_folder(tmp_path, "text") as other:
            assert other != folder
            assert (folder / "file").exists(), "its process lives"
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, alive, foreign = (tmp_path / f"twotower-{name}" for name in (f"a-{'0' * 16}", f"b-{'1' * 16}", "tests"))
    for folder in (left, alive, foreign):
        folder.mkdir()
        (folder / "file").write_text("content")
        Path(f"{folder}.held").touch()
    (early := tmp_path / f"twotower-c-{'2' * 16}.held").touch()  # killed before its folder was made
    with locks.lock(Path(f"{alive}.held")), locks.scratch_folder(tmp_path, "shard"):
        assert not left.exists()
        assert not early.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        alive.name, f"{alive.name}.held", "twotower-tests", "twotower-tests.held"
    ]  # fmt: skip
