"""Temporary folders whose locks tell whether their processes live: the next process removes what killed ones have left."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from twotower.files import locks

_RANDOM_BYTES = 8


@contextmanager
def scratch_folder(at: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `at` that is removed afterwards, "twotower-NAME-" and a random number. Beside it lies its lock,
    "….held". Folders whose locks nobody holds are removed first. Raises OSError."""
    _remove_left(at)
    with ExitStack() as held:
        while True:
            folder = at / f"twotower-{name}-{secrets.token_hex(_RANDOM_BYTES)}"
            with suppress(locks.LockHeld):  # by a process that removes what others have left
                held.enter_context(locks.lock(folder.with_name(f"{folder.name}.held"), keep=False))
                break
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left(at: Path) -> None:
    for lock in at.glob(f"twotower-*-{'[0-9a-f]' * 2 * _RANDOM_BYTES}.held"):
        with suppress(locks.LockHeld, OSError):  # OSError: of another user
            if locks.is_locked(lock):
                continue
            with locks.lock(lock, keep=False):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
