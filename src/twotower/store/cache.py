"""Copies of the bundles of a store on the local disk, shared by the processes of a machine.

<digest of the manifest>/<id>/    a bundle; the last ones used are kept
.making-<digest>/                 a download; a killed one is continued by the next
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
"""Bundles of one store that stay in the cache."""


class BundleCache:
    """The copies of the bundles of one store. Raises BundleError "cache" if the disk cannot be written."""

    def __init__(self, store: str, folder: Path | None = None, kept: int = KEPT_BUNDLES) -> None:
        """Keep the `kept` bundles used last of the store at the URL `store`, in `folder`, by default the user's cache."""
        self.folder = (folder or files.cache_folder() / layout.BUNDLES) / hashlib.sha256(store.encode()).hexdigest()[
            :16
        ]
        self._kept = kept

    def find(self, digest: str, name: str) -> Bundle | None:
        """Return a bundle by the digest of its manifest and its id, verified; None if it is not there. A damaged copy is removed."""
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
        """Yield a folder for the files of a bundle while no other process makes the same, with what a killed one has left."""
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locks.wait_for_lock(self.folder / f".{digest}{_LOCK}"):
                folder = self.folder / f".making-{digest}"
                folder.mkdir(exist_ok=True)
                yield folder

    def add(self, folder: Path, digest: str, name: str) -> Bundle:
        """Give a whole folder the place of a bundle, verify it, and remove those that were not used for longest."""
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
        """Yield a name for a new folder; what is left of it is removed at the end, and after a kill by a later call."""
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
        """Remove a copy, unless it is read."""
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
        """Remove copies beyond the number that is kept, and downloads that nobody continues."""
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
            raise BundleError(
                f"{e.filename or self.folder}: the cache of bundles cannot be written ({e.strerror}); make room, or name another folder "
                "in XDG_CACHE_HOME",
                "cache",
            ) from e
