"""File locks that the kernel releases when their holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from twotower.errors import RunError


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
