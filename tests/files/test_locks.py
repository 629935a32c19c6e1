"""A lock names its holder, ends with it, and tells the next one if it was killed."""

from __future__ import annotations

import os
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
