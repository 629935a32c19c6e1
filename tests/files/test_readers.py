"""An error of a reader names its file, of whatever kind the error is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from twotower.errors import DataError, RunError
from twotower.files.readers import (
    parse_json,
    read_array,
    read_checked,
    read_json,
    read_parquet,
    read_regular,
    read_text,
)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("odd\nand long"), "damaged (odd)"),
        (KeyError("x"), "damaged ('x')"),
        (MemoryError(), "damaged (MemoryError)"),
        (pl.exceptions.PanicException("index out of bounds"), "damaged (index out of bounds)"),
        (DataError("no ids"), "no ids"),
        (FileNotFoundError("x"), "no such file; the folder is not complete"),
    ],
)
def test_any_failure_of_a_reader_is_one_line_that_names_the_file(
    tmp_path: Path, error: BaseException, says: str
) -> None:
    def reader(path: Path) -> None:
        raise error

    with pytest.raises(RunError) as caught:
        read_checked(tmp_path / "file", reader)
    assert str(caught.value) == f"{tmp_path / 'file'}: {says}"


def test_an_interrupt_of_a_reader_is_no_damage(tmp_path: Path) -> None:
    def reader(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_checked(tmp_path, reader)


def test_readers_return_what_a_file_holds(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("Üñí".encode())
    assert read_checked(tmp_path / "text", read_text) == "Üñí"
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "[a]*.parquet")
    assert read_checked(tmp_path / "[a]*.parquet", read_parquet)["a"].to_list() == [1]
    np.save(tmp_path / "a.npy", np.arange(3))
    assert read_array(tmp_path / "a.npy").tolist() == read_array(tmp_path / "a.npy", "r").tolist() == [0, 1, 2]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json") == [1]
    for name, says in (("text", "not readable as JSON"), ("none", "no such file")):
        with pytest.raises(RunError, match=says):
            read_json(tmp_path / name)


def test_a_pipe_a_link_and_a_large_file_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name, most in (("file", 4), ("link", 9), ("pipe", 9)):
        with pytest.raises(OSError):
            read_regular(tmp_path / name, most)


def test_numbers_of_json_are_finite_and_of_at_most_19_digits() -> None:
    assert parse_json('{"a": 9223372036854775807}') == {"a": 2**63 - 1}
    for text in ("NaN", "-Infinity", "1" * 20):
        with pytest.raises(ValueError):
            parse_json(text)


def test_a_reader_that_the_interpreter_disturbs_reads_again(tmp_path: Path) -> None:
    """Two threads that parse headers of arrays at once may disturb each other."""
    calls: list[Path] = []

    def read(path: Path) -> int:
        calls.append(path)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=180, after=44)")
        return 7

    assert read_checked(tmp_path, read) == 7
    assert len(calls) == 2
