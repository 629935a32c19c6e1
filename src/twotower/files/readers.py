"""Readers of the files of a run, bundle or dataset. Errors name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import JsonValue

from twotower.errors import RunError, TwoTowerError, first_line
from twotower.files import READ_ONLY

if TYPE_CHECKING:
    import numpy.typing as npt
    import polars as pl

T = TypeVar("T")


def read_checked(path: Path, reader: Callable[[Path], T]) -> T:
    """Return `reader(path)`. Raises RunError with the file's name for any error of the reader."""
    try:
        try:
            return reader(path)
        except SystemError:  # of two threads that parse headers of arrays at once (CPython, gh-106905)
            return reader(path)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the folder is not complete") from None
    except TwoTowerError as e:
        raise RunError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
    except BaseException as e:
        from polars.exceptions import PanicException  # no Exception

        if not isinstance(e, Exception | PanicException):
            raise
        raise RunError(f"{path}: damaged ({first_line(e)})") from e  # a reader depends on the file alone


def read_text(path: Path) -> str:
    """Read a file as UTF-8, whatever the locale. A reader for `read_checked`."""
    return path.read_text(encoding="utf-8")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file. A reader for `read_checked`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_parquet(path: Path) -> pl.DataFrame:
    """Read one Parquet file; special characters in its name are no pattern. A reader for `read_checked`."""
    import polars as pl

    return pl.read_parquet(path, glob=False)


def write_parquet(frame: pl.DataFrame, path: Path, **options: Any) -> None:
    """Write one Parquet file, with options of polars. Raises OSError, also for polars' own errors (a full disk)."""
    from polars.exceptions import PolarsError

    try:
        frame.write_parquet(path, **options)
    except PolarsError as e:
        raise OSError(first_line(e)) from e


def read_array(path: Path, mode: Literal["r", "c"] | None = None) -> npt.NDArray[Any]:
    """Return the array of a .npy file, loaded, or memory-mapped with `mode`.

    Raises OSError, and ValueError for any other content; archives and pickles are not opened."""
    import numpy as np  # imported late, as polars is: a lock or a store needs neither

    found: npt.NDArray[Any]
    if mode is not None:
        found = np.lib.format.open_memmap(path, mode)
        return found
    with path.open("rb") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
    return found


def read_json(path: Path) -> Any:
    """Return the value in a JSON file, with or without a byte order mark. Raises RunError without JSON."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as e:
        raise RunError(f"{path}: not readable as JSON ({e})") from None


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes. Raises OSError at once for a pipe, link or larger file."""
    handle = os.open(path, READ_ONLY)
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if info.st_size <= max_bytes:
            parts, left = [], max_bytes + 1
            while left and (part := os.read(handle, left)):
                parts.append(part)
                left -= len(part)
            if left:
                return b"".join(parts)
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    finally:
        os.close(handle)


def parse_json(text: str | bytes) -> JsonValue:
    """Parse JSON with finite numbers of up to 19 digits. Raises ValueError, RecursionError."""
    found: JsonValue = json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int)
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _parse_int(text: str) -> int:
    if len(text) > 19:  # more than a JSON reply can hold
        raise ValueError(f"{text:.19}… has more than 19 digits")
    return int(text)
