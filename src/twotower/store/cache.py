"""Copies of the bundles of a store on the local disk, shared by the processes of a machine.

<digest of the manifest>/<id>/    a bundle
.making-<digest>/                 a download; after a kill the next one continues it
.staging-<name>/                  the files of a new bundle, before they are published
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from twotower import files
from twotower.errors import BundleError
from twotower.files import layout, locks
from twotower.store.bundle import Bundle, remove_bundle

log = logging.getLogger(__name__)

_LOCK = "-lock"
KEPT_BUNDLES = 3
"""Number of bundles of one store in the cache."""


class BundleCache:
    """Copies of the bundles of one store. Raises BundleError "cache" if the disk cannot be written."""

    def __init__(self, store: str, folder: Path | None = None, kept: int = KEPT_BUNDLES) -> None:
        """Keep the last `kept` used bundles of the store at the URL `store` in `folder` (default: the user's cache)."""
        name = hashlib.sha256(store.encode()).hexdigest()[:16]
        self.folder, self._kept = (folder or files.cache_folder() / layout.BUNDLES) / name, kept

    def find(self, digest: str, name: str) -> Bundle | None:
        """Return the verified bundle with the manifest `digest` and the id `name`, or None. Remove a damaged copy."""
        folder = self.folder / digest / name
        if not (folder / layout.MANIFEST).exists():
            return None
        try:
            bundle = Bundle.open(folder)
        except BundleError as e:
            log.warning(f"the copy of a bundle is damaged and is fetched again ({e})")
            remove_bundle(folder)
            return None
        with suppress(OSError):
            os.utime(folder.parent)
        return bundle

    @contextmanager
    def making(self, digest: str) -> Iterator[Path]:
        """Lock and yield a folder for the files of a bundle; it holds the files that a killed process has left."""
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locks.wait_for_lock(self.folder / f".{digest}{_LOCK}"):
                folder = self.folder / f".making-{digest}"
                folder.mkdir(exist_ok=True)
                yield folder

    def add(self, folder: Path, digest: str, name: str) -> Bundle:
        """Move a complete folder to the place of a bundle, verify it, and remove the least recently used bundles."""
        with self._errors():
            final = self.folder / digest / name
            final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if final.exists():
                shutil.rmtree(folder)
            else:
                os.replace(folder, final)
                files.point("cache.renamed")
                files.sync(final.parent)
            os.utime(final.parent)
            bundle = Bundle.open(final)
            self._evict(digest)
            return bundle

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a path for a new folder, which is removed at the end; after a kill, a later call removes it."""
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._clear_staging()
            name = uuid.uuid4().hex
            held, folder = self.folder / f".staging-{name}{_LOCK}", self.folder / f".staging-{name}"
        with self._errors(), locks.wait_for_lock(held):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # Windows keeps open files
                    held.unlink(missing_ok=True)

    def remove(self, digest: str, name: str) -> None:
        """Remove a copy, unless a process reads it."""
        folder = self.folder / digest / name
        if folder.is_dir() and remove_bundle(folder):
            with suppress(OSError):
                folder.parent.rmdir()

    def _clear_staging(self) -> None:
        for held in self.folder.glob(f".staging-*{_LOCK}"):
            if not locks.is_locked(held):
                shutil.rmtree(held.with_name(held.name.removesuffix(_LOCK)), ignore_errors=True)
                held.unlink(missing_ok=True)

    def _evict(self, newest: str) -> None:
        """Remove copies beyond the kept number, and downloads that no process continues."""
        found = [p for p in self.folder.iterdir() if not p.name.startswith(".") and p.name != newest]
        found.sort(key=lambda p: p.stat().st_mtime_ns)
        for folder in found[: max(0, len(found) + 1 - self._kept)]:
            for inner in list(folder.iterdir()):
                self.remove(folder.name, inner.name)
        for left in self.folder.glob(".making-*"):
            held = self.folder / f".{left.name.removeprefix('.making-')}{_LOCK}"
            if left.name != f".making-{newest}" and not locks.is_locked(held):
                shutil.rmtree(left, ignore_errors=True)
                held.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            what = f"{e.filename or self.folder}: the cache of bundles cannot be written ({e.strerror})"
            raise BundleError(f"{what}; make room, or name another folder in XDG_CACHE_HOME", "cache") from e
