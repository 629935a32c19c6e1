"""Folders that a later call completes after a kill."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower import files
from twotower.errors import DataError
from twotower.files import locks
from twotower.files.readers import read_json
from twotower.machine import boot_id

log = logging.getLogger(__name__)

PLAN, LOCK, MADE, WORK = "plan.json", "lock", "made", "work"


@contextmanager
def resumable_folder(path: Path, action: str, plan: files.JsonData) -> Iterator[tuple[Path, Path]]:
    """Yield two folders: `made`, which replaces `path` when the block succeeds, and `work` for other files.

    They hold the files of a killed call if it had the same `plan`, the inputs on which all files depend, and the host
    has not restarted since: files are synced only when all are made. Else both are empty. A DataError leaves nothing.
    After an interruption or another error, such as of a full disk, the files stay for the next call. One process at a
    time may make a folder. Raises RunError."""
    path = files.replaceable(path)
    partial, removed = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.removed")
    hint = f"call again to go on, or remove {partial.name} in the same folder"
    with locks.held_by_call(partial / LOCK, action, path, hint):
        files.remove(removed)
        _begin(partial, {"boot": boot_id(), "inputs": plan})
        try:
            yield partial / MADE, partial / WORK
            for made in (partial / MADE).rglob("*"):
                files.sync(made)
            if path.exists():
                (partial / PLAN).unlink()  # after an exchange `made` is the former folder
            files.replace_folder(partial / MADE, path)
        except DataError:
            _remove(partial, removed)
            raise
        _remove(partial, removed)


def _begin(partial: Path, plan: files.JsonData) -> None:
    """Keep the files of an earlier call with the same plan, or make empty folders and write the plan."""
    before = read_json(partial / PLAN) if (partial / PLAN).exists() else None
    whole = all((partial / name).is_dir() for name in (MADE, WORK))  # else a call was killed when it was complete
    if before == plan and whole:
        for left in (partial / MADE).rglob(".*"):  # temporary files
            files.remove(left)
        log.info(f"{partial}: going on with what an earlier call has left")
        return
    if before is not None and whole:
        log.info(f"{partial}: left by a call with other data or settings; starting again")
    (partial / PLAN).unlink(missing_ok=True)
    files.sync(partial)
    for name in (MADE, WORK):
        files.point("resumable.cleared")
        files.remove(partial / name)
        (partial / name).mkdir()
    files.write_json(partial / PLAN, plan)


def _remove(partial: Path, removed: Path) -> None:
    """Remove a folder under its lock. It is renamed first, so that no other call finds half a folder."""
    if not locks.HAS_SHARED_LOCKS:  # Windows: the folder of the open lock keeps its name
        for name in (PLAN, MADE, WORK):
            files.remove(partial / name)
        return
    os.replace(partial, removed)
    files.point("resumable.renamed")
    shutil.rmtree(removed, ignore_errors=True)


def make_once(path: Path, write: Callable[[Path], object], scratch: Path | None = None) -> bool:
    """Make a file by `write`, which gets a temporary path, unless the file exists; return True if it was made.

    The file gets its name when it is complete. The temporary path is in the same folder, or in `scratch`, a folder of
    this process alone, if other processes may make the file too."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.tmp") if scratch is None else scratch / path.name
    write(temporary)
    files.point("made.written")
    os.replace(temporary, path)
    files.point("made.renamed")
    return True
