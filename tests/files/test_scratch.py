"""Temporary folders, and what killed processes leave of them."""

from __future__ import annotations

import re
from pathlib import Path

from twotower.files import locks
from twotower.files.scratch import scratch_folder


def test_a_folder_and_its_lock_are_there_within_the_block_alone(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "text") as folder:
        assert re.fullmatch(r"twotower-text-[0-9a-f]{16}", folder.name)
        (folder / "file").write_text("content")
        assert sorted(tmp_path.iterdir()) == [folder, Path(f"{folder}.held")]
        with scratch_folder(tmp_path, "text") as other:
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
    with locks.lock(Path(f"{alive}.held")), scratch_folder(tmp_path, "shard"):
        assert not left.exists()
        assert not early.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        alive.name, f"{alive.name}.held", "twotower-tests", "twotower-tests.held"
    ]  # fmt: skip
