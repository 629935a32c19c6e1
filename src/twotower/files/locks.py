"""File locks, and temporary folders under a lock: the kernel releases a lock when its holder dies.

Exclusive locks are by filelock: `flock`, or `LockFileEx` on Windows. A shared lock keeps a file from being
removed; Windows does that for every open file.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from twotower.errors import RunError
from twotower.files import READ_WRITE

try:
    import fcntl

    HAS_SHARED_LOCKS = True
except ImportError:
    HAS_SHARED_LOCKS = False
"""False where an open file cannot be renamed or removed, nor its folder: on Windows."""

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.05
"""Pause between two tries of a lock."""
_RANDOM_BYTES = 8
"""Random part of the name of a temporary folder."""
_OPEN_FILE_STAYS: tuple[type[OSError], ...] = () if HAS_SHARED_LOCKS else (PermissionError,)
"""Errors of removing a file that is open."""


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
        self._file.write(f"{action} {os.getpid()} {platform.node()} {detail}\n".encode())

    def clear(self) -> None:
        self._file.truncate(0)


@contextmanager
def lock(path: Path, keep: bool = True, wait: bool = False) -> Iterator[Lock]:
    """Hold an exclusive file lock while the block runs. Raises LockHeld, which names the holder, or OSError.

    A holder that ends empties the file, so text in the file of a free lock is of a killed holder. Without `keep` a
    holder that ends removes the file. `wait` waits for another holder instead of raising LockHeld."""
    file = _open_lock(path)
    try:
        while True:
            while not try_lock(file.fileno(), path):
                if wait:
                    time.sleep(WAIT_SECONDS)
                    continue
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
                with suppress(*_OPEN_FILE_STAYS):
                    path.unlink(missing_ok=True)
            file.truncate(0)
    except LockHeld:
        keep = True
        raise
    finally:
        file.close()
        if not keep and not HAS_SHARED_LOCKS:  # Windows removes no open file
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def held_by_call(path: Path, action: str, what: Path, hint: str) -> Iterator[None]:
    """Make the folder of a lock file, and hold the lock for an action while the block runs.

    Raises RunError about the file or folder `what`: if another process holds the lock, and for an OSError, with a hint.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path) as held:
            held.write_holder(action)
            yield
    except LockHeld as e:
        raise RunError(f"{what}: {e}; let it end, or stop it") from None
    except OSError as e:
        raise RunError(f"{what}: cannot be written ({e.strerror or e}); {hint}") from e


def _open_lock(path: Path) -> BinaryIO:
    handle = os.open(path, READ_WRITE | os.O_CREAT | os.O_APPEND, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "a+b", buffering=0)


def is_locked(path: Path) -> bool:
    """Return True if a process, on this host or another, holds the lock. Raises OSError."""
    try:
        with path.open("r+b") as file:  # NFS locks only what may be written
            return not try_lock(file.fileno(), path)
    except FileNotFoundError:
        return False


def try_lock(handle: int, path: Path) -> bool:
    """Take the exclusive lock of an open file until the handle is closed; return False if another process has a lock.

    Raises OSError. On a system without file locks it logs a warning: one process at a time may write there."""
    from filelock import lock_descriptor  # which is slow to import

    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as e:
        if e.errno != errno.ENOSYS or HAS_SHARED_LOCKS or sys.platform == "win32":
            raise
        log.warning(f"{path}: this system has no file locks; let one process at a time write there")
        return True


def share(handle: int) -> None:
    """Take the shared lock of a file that is open for reading, until the handle is closed.

    Raises BlockingIOError if another process has the exclusive lock, OSError."""
    if HAS_SHARED_LOCKS:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _read_holder(file: BinaryIO) -> LockHolder | None:
    file.seek(0)
    try:
        text = file.read(1000).decode(errors="replace")
    except PermissionError:  # Windows: what is locked is not read
        return LockHolder()
    parts = text.split()
    return LockHolder(*parts) if len(parts) == 4 else LockHolder() if text else None


@contextmanager
def scratch_folder(at: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `at`, "twotower-NAME-" and a random number, that is removed afterwards. Raises OSError.

    The lock file "….held" is in the same folder. Folders of killed processes are removed first."""
    _remove_left(at)
    with ExitStack() as held:
        while True:
            folder = at / f"twotower-{name}-{secrets.token_hex(_RANDOM_BYTES)}"
            with suppress(LockHeld):  # by a process that removes folders of killed ones
                held.enter_context(lock(folder.with_name(f"{folder.name}.held"), keep=False))
                break
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left(at: Path) -> None:
    for path in at.glob(f"twotower-*-{'[0-9a-f]' * 2 * _RANDOM_BYTES}.held"):
        with suppress(LockHeld, OSError):  # OSError: of another user
            if is_locked(path):
                continue
            with lock(path, keep=False):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
