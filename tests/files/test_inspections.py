"""Passed inspections that later processes of the user find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.files import inspections


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of passes, which is not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "twotower" / inspections.FOLDER


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A call after which this process knows none of its passes."""

    def forget() -> None:
        monkeypatch.setattr(inspections, "_here", set())

    forget()
    return forget


def test_another_process_finds_what_has_passed_and_nothing_else(
    folder: Path, another_process: Callable[[], None]
) -> None:
    assert not inspections.has_passed("a")
    inspections.keep_pass("a")
    assert inspections.has_passed("a")
    another_process()
    assert inspections.has_passed("a")
    assert not inspections.has_passed("b")
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert folder.stat().st_mode & 0o777 == 0o700


def writable_by_a_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o770)


def writable_by_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o1777)


def of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)


def a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.rename(folder.with_name("elsewhere")))


def a_link_for_a_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").rename(folder / "b")
    (folder / "a").symlink_to("b")


def a_pass_that_others_can_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").chmod(0o666)


def a_folder_for_a_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").unlink()
    (folder / "a").mkdir(mode=0o700)


CHANGES = [
    writable_by_a_group, writable_by_all, of_another_user, a_link, a_link_for_a_pass, a_pass_that_others_can_write,
    a_folder_for_a_pass,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_fault_G34_what_others_may_have_put_there_is_no_pass(
    change: Callable[[Path, pytest.MonkeyPatch], None],
    folder: Path, another_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inspections.keep_pass("a")
    another_process()
    assert inspections.has_passed("a")
    change(folder, monkeypatch)
    assert not inspections.has_passed("a")
    if change not in (a_link_for_a_pass, a_pass_that_others_can_write, a_folder_for_a_pass):
        inspections.keep_pass("c")
        assert not (folder / "c").exists()


def test_without_a_cache_each_process_inspects(
    tmp_path: Path, another_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for home in (str(tmp_path / "file"), ""):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.setattr(Path, "home", homeless)
        inspections.keep_pass("a")
        assert inspections.has_passed("a")
        another_process()
        assert not inspections.has_passed("a")


def test_the_oldest_passes_are_removed(folder: Path) -> None:
    for age, name in ((10, "c"), (30, "b"), (20, "a"), (0, "d")):
        inspections.keep_pass(name, most=2)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert sorted(path.name for path in folder.iterdir()) == ["c", "d"]
    inspections.keep_pass("c", most=2)  # again
    assert sorted(path.name for path in folder.iterdir()) == ["c", "d"]


def test_a_pass_is_of_one_check_of_one_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "check.py").write_text("allowed = 1")
    names = [inspections.pass_name("a:b", tmp_path, ["x"])]
    assert inspections.pass_name("a:b", tmp_path, ["x"]) == names[0]
    names += [inspections.pass_name("a:c", tmp_path, ["x"]), inspections.pass_name("a:b", tmp_path, ["y"])]
    (tmp_path / "check.py").write_text("allowed = 2")
    names.append(inspections.pass_name("a:b", tmp_path, ["x"]))
    (tmp_path / "other.py").write_text("")
    names.append(inspections.pass_name("a:b", tmp_path, ["x"]))
    monkeypatch.setattr(inspections, "__version__", "next")
    names.append(inspections.pass_name("a:b", tmp_path, ["x"]))
    assert len(set(names)) == len(names) == 6
