"""Files of a folder on a disk, and of a prefix in a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.errors import RunError
from twotower.files import places
from twotower.files.urls import Url


@pytest.fixture(params=["disk", "bucket"])
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Url:
    return tmp_path if request.param == "disk" else Url.parse(f"{request.getfixturevalue('bucket')}/a")


def test_what_is_written_is_listed_read_and_removed(at: Path | Url) -> None:
    assert places.names(at) == []
    assert places.names(at / "none") == []
    for name, data in (("b", b"1"), ("a", b"2"), ("a", b"3")):
        places.write(at / name, data)
    assert places.names(at) == ["a", "b"]
    assert places.read(at / "a") == b"3"
    assert places.read(at / "c") is None
    places.remove(at, ["a", "c"])
    assert places.names(at) == ["b"]


def test_only_an_object_of_json_is_one(at: Path | Url) -> None:
    for data, found in ((b'{"a": 1}', {"a": 1}), (b"{", {}), (b"[1]", {}), (b"\xff", {}), (b"[" * 100_000, {})):
        places.write(at / "x", data)
        assert places.read_json(at / "x") == found
    assert places.read_json(at / "y") is None


def test_names_of_an_object_store_are_keys_below_the_prefix(bucket: str) -> None:
    at = Url.parse(f"{bucket}/a")
    for key in ("x/y", "z"):
        places.write(at / key, b"")
    places.write(Url.parse(f"{bucket}/ab"), b"")
    assert places.names(at) == ["x/y", "z"]
    assert places.names(Url.parse(bucket)) == ["a/x/y", "a/z", "ab"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none/x: cannot be written"):
        places.write(tmp_path / "none" / "x", b"")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """One line of the command, as for a folder within another user's."""
    strange = tmp_path / ("x" * 300)
    with pytest.raises(RunError, match=r"xxx: cannot be read \(File name too long\)"):
        places.names(strange)
    with pytest.raises(RunError, match="xxx/y: .*too long"):
        places.read(strange / "y")
