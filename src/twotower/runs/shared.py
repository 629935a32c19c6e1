"""Files of a run in a bucket, through which hosts that share no disk load it.

URL/<digest>/…             the files of a run; the digest is that of their list
CACHE/runs/<digest>/…      the copy of a host, which its processes share; kept for a day after its last use
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from twotower import files
from twotower.errors import ConfigError, RunError
from twotower.files import layout, locks
from twotower.files.object_stores import TRANSFERS, ObjectClient, ObjectError
from twotower.files.readers import file_digest
from twotower.files.urls import Url, is_url
from twotower.runs.folder import reading_folder, run_stamp

log = logging.getLogger(__name__)

KEPT_SECONDS = 86_400
"""Seconds for which the copy of a host stays after its last use."""


class RunFile(NamedTuple):
    """A file of a run: path in its folder, size in bytes, digest."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SharedRun:
    """A run whose files are in a bucket."""

    at: Url
    files: tuple[RunFile, ...]

    @classmethod
    def put(cls, folder: Path, share: Path | str, unfinished: bool) -> SharedRun:
        """Write the files of a run below a URL, but those that are there; of an unfinished one with its checkpoints. Raises ConfigError for another place
        than one in an object store, RunError if the run is replaced meanwhile."""
        client, url = ObjectClient(share_url(share)), share_url(share)
        stamp, source = run_stamp(folder), reading_folder(folder)
        try:
            listed = tuple(_listed(source, unfinished))
        except OSError as e:
            raise RunError(f"{e.filename or source}: cannot be read ({e.strerror}); load the run again") from e
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]
        shared = cls(url / digest, listed)
        there = {o.key: o.size for o in client.list(shared.at.key)}
        missing = [f for f in listed if there.get((shared.at / f.path).key) != f.size]
        if missing:
            log.info(f"putting the run, {sum(f.size for f in missing) / 1e6:,.1f} MB, into {shared.at}")
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda f: client.upload((shared.at / f.path).key, source / f.path), missing))
        if run_stamp(folder) != stamp:
            raise RunError(f"{folder}: another run has replaced it; load the run again")
        return shared

    @property
    def copy(self) -> Path:
        """The folder of this host's copy."""
        return files.cache_folder() / "runs" / self.at.name

    def fetch(self) -> Path:
        """Return the folder of this host's copy, with files as they were put, of which the missing and the damaged ones are fetched. Raises RunError."""
        client, copy = ObjectClient(self.at), self.copy
        try:
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locks.wait_for_lock(_lock(copy)), ThreadPoolExecutor(TRANSFERS) as pool:
                list(
                    pool.map(
                        lambda f: client.fetch((self.at / f.path).key, copy / f.path, f.size, f.sha256), self.files
                    )
                )
                os.utime(copy)
            _remove_old(copy.parent)
        except ObjectError as e:
            if e.cause in ("size", "checksum"):
                raise RunError(f"{e}; remove {self.at}, then call again") from e
            raise
        except OSError as e:
            raise RunError(
                f"{e.filename or copy}: cannot be written ({e.strerror}); make room, or name another folder in XDG_CACHE_HOME"
            ) from e
        return copy


def share_url(share: Path | str) -> Url:
    """Return the place of shared runs. Raises ConfigError for another one than in an object store."""
    url = Url.parse(share) if is_url(share) else None
    if url is None or not url.is_object_store:
        raise ConfigError(
            f"`share` is '{share}', expected a prefix in an object store, such as s3://BUCKET/RUNS; hosts that have the run at the same path "
            "need none"
        )
    return url


def _listed(folder: Path, unfinished: bool) -> Iterator[RunFile]:
    """Yield the files that loading a run reads."""
    for name in sorted(layout.RUN_FILES - {layout.REPORT} - ({layout.CHECKPOINTS} if not unfinished else set())):
        found = [folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*"))
        for path in found:
            if path.is_file():
                yield RunFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path))


def _lock(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}-lock")


def _remove_old(folder: Path) -> None:
    """Remove the copies of runs that no process has used for long."""
    for copy in folder.iterdir():
        with suppress(locks.LockHeld, FileNotFoundError):
            if not copy.name.startswith(".") and _is_old(copy):
                with locks.lock(_lock(copy)):  # its file stays, as others may wait for it
                    if not _is_old(copy):  # another process has taken it meanwhile
                        continue
                    shutil.rmtree(copy, ignore_errors=True)


def _is_old(copy: Path) -> bool:
    return copy.stat().st_mtime < time.time() - KEPT_SECONDS
