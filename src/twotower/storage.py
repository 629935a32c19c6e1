"""Files that are whole or not there: written under a temporary name, synced, renamed."""

from __future__ import annotations

import glob
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.errors import RunError

FAIL_POINT = "TWOTOWER_FAIL_AT_PUBLISH"  # for tests of recovery: SIGKILL to itself at this point
_points = itertools.count(1)


def point() -> None:
    """A place between two steps where a test of recovery can kill the process."""
    if (at := os.environ.get(FAIL_POINT)) and next(_points) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)


def write(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Replace `path` by `data` in one step; on failure the old file stays. Raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            point()
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            point()
            if mode is not None:
                os.fchmod(f.fileno(), mode)
            os.fsync(f.fileno())
        point()
        os.replace(temporary, path)
        point()
        sync(path.parent)
        point()
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({e.strerror})") from e


def write_json(path: Path, value: Any, mode: int | None = None) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", mode)


def read_json(path: Path) -> Any:
    """A byte order mark, as some editors write it, does no harm. Raises RunError if the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as e:
        raise RunError(f"{path}: not readable as JSON ({e})") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    What `path` held goes only then, and as a whole; a link stays one. Raises RunError."""
    path = path.resolve()
    if path.exists() and path.samefile("."):  # a shell in it would be left in a folder that is gone
        raise RunError(f"{path}: the present folder cannot be replaced; name another, or start from elsewhere")
    if path.is_mount():
        raise RunError(f"{path}: a mounted disk cannot be replaced as a whole; name a folder in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    before = path.with_name(f".{path.name}.{os.getpid()}.old")
    for left in path.parent.glob(
        f".{glob.escape(path.name)}.*.old"
    ):  # of a process that was killed between two renames
        _put_back(left, path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as e:
        raise RunError(f"{path}: cannot be written ({e.strerror or e})") from e
    finally:
        _put_back(before, path)
        shutil.rmtree(temporary, ignore_errors=True)


def _put_back(before: Path, path: Path) -> None:
    """What `path` was goes back to its place, or away if there is something new."""
    if not path.exists() and before.exists():
        os.replace(before, path)
    shutil.rmtree(before, ignore_errors=True)


def probe(folder: Path) -> None:
    """Make `folder` and prove that it can be written to. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ".probe"
        file.write_bytes(b"\0" * 65_536)
        file.unlink()
    except OSError as e:
        raise RunError(f"{folder}: cannot be written to ({e.strerror}); choose another --run") from e


def sync(path: Path) -> None:
    """Put a file or a folder's list of names on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
