"""Atomic writes of files and folders: temporary name, sync, rename."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from twotower.errors import RunError

JsonData: TypeAlias = "Mapping[str, JsonData] | Sequence[JsonData] | str | float | bool | None"
"""A value that JSON can hold."""

_LEFTOVER_NAME = re.compile(r"\.(.+)\.\d+\.(tmp|old)", re.DOTALL)


class Hooks:
    """Calls at named points between two steps of a write, a training or an embedding; these do nothing."""

    def point(self, name: str) -> None:
        """Run at the point `name`."""


READ_ONLY = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("BINARY", "NONBLOCK", "NOFOLLOW", "CLOEXEC"))
"""Flags of `os.open` for an untrusted file: no wait for a pipe, no symbolic link, if the system has such flags."""
READ_WRITE = READ_ONLY | os.O_RDWR
_SYNCS_FOLDERS = hasattr(os, "O_DIRECTORY")
"""False on Windows, which opens no folder and has a journal for its entries."""

hooks = Hooks()
"""The hooks of this process. Tests of recovery put hooks here that end the process at a point."""


def point(name: str) -> None:
    hooks.point(name)


def temporary_path(path: Path, ending: Literal["tmp", "old"] = "tmp") -> Path:
    """Return a path in the same folder that no other write on any host uses, and that `remove_leftovers` recognises."""
    return path.with_name(f".{path.name}.{secrets.randbits(48)}.{ending}")


def write(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Replace `path` by `data` in one step; on failure the old file stays. Raises RunError."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as f:
            point("file.opened")
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            point("file.written")
            if mode is not None:
                temporary.chmod(mode)
            os.fsync(f.fileno())
        point("file.synced")
        os.replace(temporary, path)
        point("file.renamed")
        sync(path.parent)
        point("file.folder_synced")
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({e.strerror})") from e


def write_json(path: Path, value: JsonData, mode: int | None = None) -> None:
    """Replace `path` by a JSON file, as `write` does."""
    write(path, json_bytes(value), mode)


def json_bytes(value: JsonData) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block succeeds, and is removed when it fails.

    The former content of `path` is removed only on success; a symbolic link is kept. Raises RunError."""
    path = replaceable(path)
    temporary = temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(temporary, path)
    except OSError as e:
        raise RunError(f"{path}: cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replaceable(path: Path) -> Path:
    """Return the folder `path` without symbolic links. Raises RunError if no new folder may replace it."""
    check_name(path)
    path = path.resolve()
    if path.exists() and path.samefile("."):  # its replacement would leave the shell in a removed folder
        what = "the current folder cannot be replaced; choose another folder, or start from another one"
        raise RunError(f"{path}: {what}")
    if os.path.ismount(path):
        raise RunError(f"{path}: a mounted disk cannot be replaced; choose a folder in it")
    # of a process that was killed between two renames
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        _restore(left, path)
    return path


def replace_folder(made: Path, path: Path) -> None:
    """Replace the folder `path` by the folder `made`, in one step where the system can. Raises OSError."""
    before = temporary_path(path, "old")
    for file in made.iterdir():
        sync(file)
    sync(made)
    try:
        exchanged = path.exists() and _exchange(made, path)
        if path.exists():
            point("folder.exchanged")
            os.replace(made if exchanged else path, before)
        point("folder.moved")
        if not exchanged:
            os.replace(made, path)
        point("folder.replaced")
        sync(path.parent)
    finally:
        _restore(before, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _restore(before: Path, path: Path) -> None:
    """Move the former content back to `path`, or remove it if `path` exists."""
    if not path.exists() and before.exists():
        os.replace(before, path)
    shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(folder: Path, ours: Callable[[str], bool]) -> None:
    """Remove, or restore, temporary files of killed processes in a folder, for the names that `ours` accepts.

    Call under the lock of all writers of the folder, as a live process may use such a file."""
    for left in list(folder.iterdir()) if folder.is_dir() else []:
        found = _LEFTOVER_NAME.fullmatch(left.name)
        if found and ours(found[1]):
            if found[2] == "old":
                _restore(left, folder / found[1])
            else:
                remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link(source: Path, to: Path) -> None:
    """Hard-link a file, or copy it on a file system without hard links."""
    try:
        os.link(source.resolve(), to)  # not another name of a symbolic link
    except OSError:
        shutil.copyfile(source, to)


def link_tree(source: Path, to: Path) -> None:
    """Hard-link `source` as `to`: a file atomically, a folder file by file. If `source` does not exist, remove `to`.

    Raises OSError."""
    if source.is_file():
        temporary = temporary_path(to)
        link(source, temporary)
        os.replace(temporary, to)
        temporary.unlink(missing_ok=True)  # two names of one file: then a rename does nothing
        return
    remove(to)
    if source.is_dir():
        shutil.copytree(source, to, copy_function=lambda a, b: link(Path(a), Path(b)))


def check_name(name: Path | str) -> None:
    """Raise RunError for a name that is not UTF-8, or has characters that the locale cannot encode.

    A path is checked from the root."""
    text = name if isinstance(name, str) else str(name.absolute())
    try:
        text.encode()
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        hint = "rename it, or choose another" if encoding == "utf-8" else f"names are {encoding}: set PYTHONUTF8=1"
        shown = text.encode(errors="backslashreplace").decode()
        raise RunError(f"{shown}: no UTF-8 in this locale; {hint}") from None


def cache_folder() -> Path:
    """Return the folder of this package in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twotower"


@contextmanager
def writing_cache(folder: Path, error: Callable[[str], RunError] = RunError) -> Iterator[None]:
    """Make a folder in the user's cache, and run the block, whose OSErrors become an `error` with a hint."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield
    except OSError as e:
        what = f"{e.filename or folder}: the cache cannot be written ({e.strerror})"
        raise error(f"{what}; make room, or name another folder in XDG_CACHE_HOME") from e


def check_writable(folder: Path) -> None:
    """Create `folder` and write a test file in it. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ".probe"
        file.write_bytes(b"\0" * 65_536)
        file.unlink()
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another `folder`") from e


def check_file(path: Path) -> None:
    """Raise RunError if no file can be written at `path`; an earlier one stays as it is."""
    if path.is_dir():
        raise RunError(f"{path}: a folder; name a file")
    if not path.parent.is_dir():
        raise RunError(f"{path}: the folder {path.parent} does not exist; make it first, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"{path}: cannot be written (no write permission in {path.parent}); name another file")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder where the system can, to the disk."""
    if not _SYNCS_FOLDERS and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if _SYNCS_FOLDERS else READ_WRITE)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
