"""A run for other processes: its folder at the same path on every host, or its files in a bucket.

URL/<digest>/…             the files of a run; the digest is of their list
CACHE/runs/<digest>/…      the copy of a host, shared by its processes
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower import files
from twotower.engines.engine import JobEngine
from twotower.errors import ConfigError, RunError
from twotower.files import layout, locks
from twotower.files.object_stores import FileEntry, ObjectClient, ObjectError
from twotower.files.readers import file_digest
from twotower.files.urls import Url, is_url
from twotower.runs import Run, load
from twotower.runs.folder import reading_folder, run_stamp

log = logging.getLogger(__name__)

KEPT_SECONDS = 86_400
"""Seconds for which the copy of a host stays after its last use."""


def run_digests(run: Run) -> tuple[str, str]:
    """Return the digests of the weights and of the schema of a run."""
    schema = hashlib.sha256(run.dataset.schema.model_dump_json().encode()).hexdigest()
    if run.sha256:  # of the loaded model; the folder may hold another run by now
        return run.sha256, schema
    digest = hashlib.sha256()
    for name, weights in run.model.named_parameters():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights.detach().cpu().numpy()).data)
    return digest.hexdigest(), schema


def check_share(share: Path | str, engine: JobEngine) -> None:
    """Raise ConfigError if `share` is not in an object store, or if the engine has no other processes."""
    if share and not engine.is_remote:
        raise ConfigError(
            f"`share` is '{share}', and engine '{engine.name}' loads the run in no other process; leave it out"
        )
    if share:
        _share_url(share)


@dataclass(frozen=True)
class SharedRun:
    """A run with its files in a bucket."""

    at: Url
    files: tuple[FileEntry, ...]

    @classmethod
    def put(cls, folder: Path, share: Path | str, unfinished: bool) -> SharedRun:
        """Upload the files of a run that the bucket lacks; of an unfinished run with the checkpoints.

        Raises ConfigError if `share` is not in an object store, RunError if the run is replaced meanwhile."""
        url, stamp, source = _share_url(share), run_stamp(folder), reading_folder(folder)
        client = ObjectClient(url)
        try:
            listed = tuple(_listed(source, unfinished))
        except OSError as e:
            raise RunError(f"{e.filename or source}: cannot be read ({e.strerror}); load the run again") from e
        digest = hashlib.sha256(json.dumps([file.model_dump() for file in listed]).encode()).hexdigest()[:32]
        shared = cls(url / digest, listed)
        there = {o.key: o.size for o in client.list(shared.at.key)}
        missing = [f for f in listed if there.get((shared.at / f.path).key) != f.size]
        if missing:
            log.info(f"putting the run, {sum(f.size for f in missing) / 1e6:,.1f} MB, into {shared.at}")
        client.upload_all(shared.at, [f.path for f in missing], source)
        if run_stamp(folder) != stamp:
            raise RunError(f"{folder}: another run has replaced it; load the run again")
        return shared

    @property
    def copy(self) -> Path:
        """The folder of this host's copy."""
        return files.cache_folder() / "runs" / self.at.name

    def fetch(self) -> Path:
        """Download the files that this host's copy lacks, or has damaged, and return its folder. Raises RunError."""
        client, copy = ObjectClient(self.at), self.copy
        try:
            with files.writing_cache(copy.parent), locks.lock(copy.parent / layout.CACHE_LOCK, wait=True):
                client.fetch(self.at, self.files, copy)
                os.utime(copy)
                for other in copy.parent.iterdir():
                    if not other.name.startswith(".") and other.stat().st_mtime < time.time() - KEPT_SECONDS:
                        files.remove(other)
        except ObjectError as e:
            if e.cause in ("size", "checksum"):
                raise RunError(f"{e}; remove {self.at}, then call again") from e
            raise
        return copy


@dataclass(frozen=True)
class RunCopy:
    """The folder of a run, and the digests that a process compares after loading it."""

    folder: Path
    digests: tuple[str, str]
    shared: SharedRun | None = None

    @classmethod
    def of(cls, run: Run, share: Path | str = "") -> RunCopy:
        """Take the folder of a run, or upload its files below the URL `share`.

        Raises ConfigError for a run without a folder."""
        if run.folder is None:
            raise ConfigError(
                "the run has no folder from which other processes load it; save it, or choose `engine='local'`"
            )
        folder = run.folder.absolute()
        return cls(folder, run_digests(run), SharedRun.put(folder, share, bool(run.unfinished)) if share else None)

    def load(self) -> Run:
        """Load the run. Raises RunError if the folder is missing or holds another run."""
        folder = self.shared.fetch() if self.shared else self.folder
        if not folder.exists():
            raise RunError(
                f"{folder}: is not there on {platform.node()}; have the run at this path on every host, or name a "
                "prefix in a bucket through which they get it (`share`)"
            )
        run = load(folder)
        if run_digests(run) != self.digests:
            raise RunError(f"{folder}: holds another model than when the call began; call again when it is complete")
        return run


def _share_url(share: Path | str) -> Url:
    """Return the URL of shared runs. Raises ConfigError if it is not in an object store."""
    url = Url.parse(share) if is_url(share) else None
    if url is None or not url.is_object_store:
        raise ConfigError(
            f"`share` is '{share}', expected a prefix in an object store, such as s3://BUCKET/RUNS; hosts that have "
            "the run at the same path need none"
        )
    return url


def _listed(folder: Path, unfinished: bool) -> Iterator[FileEntry]:
    """Yield the files that loading a run reads."""
    for name in sorted(layout.RUN_FILES - {layout.REPORT} - ({layout.CHECKPOINTS} if not unfinished else set())):
        found = [folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*"))
        for path in found:
            if path.is_file():
                size, digest = path.stat().st_size, file_digest(path)
                yield FileEntry(path=path.relative_to(folder).as_posix(), size=size, sha256=digest)
