"""The folder of a run: its lock, and the replacement of a complete run by a new one in one step.

A new run is written into `.next` of the folder. When it is complete, readers use it while its files move to the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from twotower import files
from twotower.errors import RunError
from twotower.files import layout, locks
from twotower.train import checkpoint


def check_folder(folder: Path) -> None:
    """Raise RunError unless `folder` is new, empty, or holds a run and no other files."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder}: is a file; choose another folder")
    found = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    foreign = sorted(found if layout.ENCODERS not in found else found - layout.RUN_FILES)
    if foreign:
        raise RunError(f"{folder}: not empty and not a run (it holds {foreign[0]}); choose another folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for writing a run, and complete or remove the files of a killed writer.

    Raises RunError if another process holds the lock, or if `folder` is not new, empty or a run. A new folder that
    stays empty is removed."""
    files.check_name(folder)
    check_folder(folder)
    made = not folder.exists()
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if made:
                held.callback(_remove_empty, folder)
            lock = held.enter_context(locks.lock(folder / layout.RUN_LOCK, keep=False))
            lock.write_holder("training")
            for place in (folder, folder / layout.NEXT_RUN):
                files.remove_leftovers(place, {*layout.RUN_FILES, layout.NEXT_RUN}.__contains__)
                checkpoint.remove_leftovers(place / layout.CHECKPOINTS)
        except locks.LockHeld as e:
            raise RunError(f"{folder}: {e}; wait for it, or choose another `folder`") from None
        except OSError as e:
            raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another `folder`") from e
        replace_run(folder)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def is_complete(folder: Path) -> bool:
    """Return True if the folder holds a complete run."""
    return (reading_folder(folder) / layout.METRICS).exists()


def writing_folder(folder: Path) -> Path:
    """Return the folder to write the run to: `.next` while the folder holds a complete run."""
    return folder / layout.NEXT_RUN if is_complete(folder) else folder


def reading_folder(folder: Path) -> Path:
    """Return the folder to read the run from."""
    return folder / layout.NEXT_RUN if (folder / layout.NEXT_RUN / layout.METRICS).exists() else folder


def run_stamp(folder: Path) -> tuple[Path, int, int]:
    """Return path, inode and time of metrics.json, to detect another run between the reads of several files."""
    metrics = reading_folder(folder) / layout.METRICS
    try:
        info = metrics.stat()
    except OSError:
        return metrics, 0, 0
    return metrics, info.st_ino, info.st_mtime_ns


def replace_run(folder: Path) -> None:
    """Move the files of a complete run in `.next` to `folder`. Call under the lock. Raises RunError.

    `.next` stays complete until all files are linked and is removed in one step: after a kill readers use `.next`, and
    the next holder of the lock starts the move again."""
    new = reading_folder(folder)
    if new == folder:
        return
    removed = files.temporary_path(folder / layout.NEXT_RUN)
    try:
        # A reader that does not know `.next` sees an incomplete run.
        (folder / layout.METRICS).unlink(missing_ok=True)
        for name in sorted(layout.RUN_FILES, key=lambda name: name == layout.METRICS):
            files.point("run.file")
            files.link_tree(new / name, folder / name)
        files.sync(folder)
        files.point("run.synced")
        os.replace(new, removed)
        files.point("run.renamed")
        files.remove(removed)
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); the new run is complete in {new}") from e
