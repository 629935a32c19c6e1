"""Passed inspections of untrusted files, kept in the user's cache: an empty file for each, named by a digest.

Only a pass is kept, so a missing cache costs an inspection and nothing else. The folder must belong to the user, and no
other user may write to it; else it is neither read nor written. Windows does not show this, so nothing is kept there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from twotower.files import READ_ONLY, JsonData, cache_folder
from twotower.version import __version__

FOLDER = "inspected"
MAX_PASSES = 1_000
"""Most passes in the folder."""
_here: set[str] = set()
"""Names of the passes of this process."""


def pass_name(check: str, code: Path, facts: Sequence[JsonData]) -> str:
    """Return the name of a pass of `check` ("module:name"), a SHA-256. `facts` describe the content and the arguments.

    It depends on the version of this package and on the modules in the folder `code`, so that another check starts
    anew."""
    modules = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(code.glob("*.py"))]
    return hashlib.sha256(json.dumps([check, __version__, modules, facts], sort_keys=True).encode()).hexdigest()


def has_passed(name: str) -> bool:
    """Return True if this process, or the folder, has the pass `name`."""
    if name in _here:
        return True
    with suppress(OSError, RuntimeError), _own_folder() as folder:
        return _is_own(os.stat(name, dir_fd=folder, follow_symlinks=False), stat.S_IFREG)
    return False


def keep_pass(name: str, most: int = MAX_PASSES) -> None:
    """Keep a pass, and remove the oldest files above `most`. If the folder cannot be written, only this process
    keeps it."""
    _here.add(name)
    with suppress(OSError, RuntimeError), _own_folder() as folder:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=folder))
        with os.scandir(folder) as entries:
            kept = sorted(entries, key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns)
        for oldest in kept[:-most]:
            os.unlink(oldest.name, dir_fd=folder)


@contextmanager
def _own_folder() -> Iterator[int]:
    """Make the folder of passes and open it. Raises OSError if another user can write to it, RuntimeError without a
    home."""
    folder = cache_folder() / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder, READ_ONLY)
    try:
        if not _is_own(os.fstat(handle), stat.S_IFDIR):
            raise PermissionError(f"{folder}: others can write to it")
        yield handle
    finally:
        os.close(handle)


def _is_own(info: os.stat_result, kind: int) -> bool:
    """Return True for a file or folder of this user that no other user can write to."""
    return (stat.S_IFMT(info.st_mode), info.st_uid, info.st_mode & 0o022) == (kind, os.geteuid(), 0)
