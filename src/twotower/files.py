"""Atomic writes of files and folders (temporary name, sync, rename), and file locks."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from twotower.errors import RunError

if TYPE_CHECKING:
    import numpy.typing as npt

_LEFTOVER_NAME = re.compile(r"\.(.+)\.\d+\.(tmp|old)", re.DOTALL)


class Hooks(Protocol):
    """Calls at named points between two steps of a write, a training or an embedding."""

    def point(self, name: str) -> None:
        """Run at the point `name`."""


class NoHooks:
    """Hooks that do nothing."""

    def point(self, name: str) -> None:
        """Do nothing."""


hooks: Hooks = NoHooks()
"""The hooks of this process. Tests of recovery put their own here, which end the process at a point."""


def point(name: str) -> None:
    """Call the hooks at a named point."""
    hooks.point(name)


def write(path: Path, data: bytes | str, mode: int | None = None) -> None:
    """Replace `path` by `data` in one step; on failure the old file stays. Raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            point("file.opened")
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            point("file.written")
            if mode is not None:
                os.fchmod(f.fileno(), mode)
            os.fsync(f.fileno())
        point("file.synced")
        os.replace(temporary, path)
        point("file.renamed")
        sync(path.parent)
        point("file.folder_synced")
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({e.strerror})") from e


def write_json(path: Path, value: Any, mode: int | None = None) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", mode)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes. Raises OSError, at once, for a pipe, a link or a larger file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
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


def read_json(path: Path, max_bytes: int = 0) -> Any:
    """Return the value in a JSON file, with or without a byte order mark.

    With `max_bytes` above 0 the file must be a regular one of at most that size. Raises RunError if the file is missing
    or no JSON."""
    try:
        data = read_regular(path, max_bytes) if max_bytes else path.read_bytes()
        return json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as e:
        raise RunError(f"{path}: not readable as JSON ({e})") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block succeeds, and is removed when it fails.

    The former content of `path` is removed as a whole, and only on success; a symbolic link is kept. Raises RunError."""
    check_name(path)
    path = path.resolve()
    if path.exists() and path.samefile("."):  # its replacement would leave the shell in a removed folder
        raise RunError(
            f"{path}: the current folder cannot be replaced; choose another folder, or start from another one"
        )
    if path.is_mount():
        raise RunError(f"{path}: a mounted disk cannot be replaced; choose a folder in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    before = path.with_name(f".{path.name}.{os.getpid()}.old")
    for left in path.parent.glob(
        f".{glob.escape(path.name)}.*.old"
    ):  # of a process that was killed between two renames
        _restore(left, path)
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
        _restore(before, path)
        shutil.rmtree(temporary, ignore_errors=True)


def _restore(before: Path, path: Path) -> None:
    """Move the former content back to `path`, or remove it if `path` exists."""
    if not path.exists() and before.exists():
        os.replace(before, path)
    shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(folder: Path, ours: Callable[[str], bool]) -> None:
    """Remove, or restore, temporary files of killed processes in a folder, for the names that `ours` accepts.

    Call under the lock of all writers of the folder: a living process may use such a file."""
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
        temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        link(source, temporary)
        os.replace(temporary, to)
        temporary.unlink(missing_ok=True)  # two names of one file: then a rename does nothing
        return
    remove(to)
    if source.is_dir():
        shutil.copytree(source, to, copy_function=lambda a, b: link(Path(a), Path(b)))


@dataclass(frozen=True)
class LockHolder:
    """The process that wrote the text of a lock."""

    action: str = "process"
    pid: str = "?"
    host: str = "?"
    detail: str = ""

    @property
    def process(self) -> str:
        return f"(pid {self.pid} on {self.host})"


class LockHeld(RunError):
    """The lock is held by another process."""


class Lock:
    """A held lock. `killed_holder` is the previous holder, if it was killed."""

    def __init__(self, file: BinaryIO, killed_holder: LockHolder | None) -> None:
        self._file, self.killed_holder = file, killed_holder

    def write_holder(self, action: str, detail: str = "-") -> None:
        """Write the action and process of the holder into the lock file."""
        self.clear()
        self._file.write(f"{action} {os.getpid()} {os.uname().nodename} {detail}\n".encode())

    def clear(self) -> None:
        self._file.truncate(0)


@contextmanager
def lock(path: Path, keep: bool = True) -> Iterator[Lock]:
    """Hold an exclusive file lock while the block runs. Raises LockHeld, which names the holder, or OSError.

    The kernel releases the lock when its holder dies. A holder that ends empties the file, so text in the file of a free
    lock is of a killed holder; without `keep` it removes the file.
    """
    file = _open_lock(path)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_holder(file)
                for _ in range(20):  # it may not have written its name yet
                    if holder is None:
                        time.sleep(0.01)
                        holder = _read_holder(file)
                holder = holder or LockHolder()
                raise LockHeld(f"another {holder.action} is running {holder.process}") from None
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break
            file.close()  # it was removed by its holder in between
            file = _open_lock(path)
        try:
            yield Lock(file, _read_holder(file))
        finally:
            if not keep:
                path.unlink(missing_ok=True)
            file.truncate(0)
    finally:
        file.close()


def _open_lock(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "a+b", buffering=0)


def is_locked(path: Path) -> bool:
    """Return True if a process, on this host or another, holds the lock. Raises OSError."""
    try:
        with path.open("r+b") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _read_holder(file: BinaryIO) -> LockHolder | None:
    file.seek(0)
    text = file.read(1000).decode(errors="replace")
    parts = text.split()
    return LockHolder(*parts) if len(parts) == 4 else LockHolder() if text else None


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


def check_writable(folder: Path) -> None:
    """Create `folder` and write a test file in it. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ".probe"
        file.write_bytes(b"\0" * 65_536)
        file.unlink()
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another `folder`") from e


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_array(path: Path, mode: Any = None) -> npt.NDArray[Any]:
    """Return the array of a .npy file, loaded, or memory-mapped with `mode`.

    Raises OSError, and ValueError for any other content; archives and pickles are not opened."""
    import numpy as np  # imported late: a store needs no arrays

    found: npt.NDArray[Any]
    if mode is not None:
        found = np.lib.format.open_memmap(path, mode)
        return found
    with path.open("rb") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
    return found
