"""Copies of the bundles of a store on the local disk, shared by the processes of a machine.

<id>/                 a bundle; its manifest is written last, and a download without one is continued
twotower-publish-…    the files of a new bundle, before they are published
.<id>.copying         held while the copy of a bundle is made
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from twotower import files
from twotower.errors import BundleError
from twotower.files import layout, locks
from twotower.store.bundle import Bundle, is_bundle_id, remove_bundle
from twotower.store.manifest import Manifest

log = logging.getLogger(__name__)

KEPT_BUNDLES = 3
"""Number of bundles of one store in the cache."""


class BundleCache:
    """Copies of the bundles of one store. Raises BundleError "cache" if the disk cannot be written."""

    def __init__(self, store: str, folder: Path | None = None, kept: int = KEPT_BUNDLES) -> None:
        """Keep the last `kept` used bundles of the store at the URL `store` in `folder` (default: the user's cache)."""
        name = hashlib.sha256(store.encode()).hexdigest()[:16]
        self.folder, self._kept = (folder or files.cache_folder() / layout.BUNDLES) / name, kept

    def find(self, name: str, manifest: Manifest) -> Bundle | None:
        """Return the verified bundle `name` with this manifest, or None. Remove a damaged copy."""
        folder = self.folder / name
        if not (folder / layout.MANIFEST).exists():
            return None
        try:
            bundle = Bundle.open(folder)
            if bundle.manifest != manifest:
                raise BundleError(f"{folder}: of another bundle with this id", "mismatch")
        except BundleError as e:
            log.warning(f"the copy of a bundle is damaged and is fetched again ({e})")
            self.remove(name)
            return None
        with suppress(OSError):
            os.utime(folder)
        return bundle

    @contextmanager
    def locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """Keep others from making or removing the copy of a bundle within the block, after waiting for one who does.

        Without `wait` raises LockHeld."""
        with self._writing(), locks.lock(self.folder / f".{name}{layout.CACHE_LOCK}", keep=False, wait=wait):
            yield

    def complete(self, name: str, manifest: bytes) -> Bundle:
        """Write the manifest of a bundle with all files, and verify it. Call under the lock."""
        half = self.folder / name / f".{layout.MANIFEST}.tmp"
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(manifest)
        os.replace(half, half.with_name(layout.MANIFEST))
        return self._newest(name)

    def add(self, made: Path, name: str) -> Bundle:
        """Move a folder to the place of the bundle `name`, and verify it."""
        with self.locked(name):
            self.remove(name)
            os.replace(made, self.folder / name)
            files.point("cache.renamed")
            files.sync(self.folder)
            return self._newest(name)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a new folder, which is removed at the end; after a kill, a later call removes it."""
        with self._writing(), locks.scratch_folder(self.folder, "publish") as folder:
            yield folder

    def remove(self, name: str) -> None:
        """Remove a copy, unless a process reads it."""
        with suppress(FileNotFoundError):
            remove_bundle(self.folder / name)

    def _newest(self, name: str) -> Bundle:
        """Return a verified bundle, and remove the least recently used ones."""
        os.utime(self.folder / name)
        bundle = Bundle.open(self.folder / name)
        others = list[tuple[int, str]]()
        for folder in self.folder.iterdir():
            if is_bundle_id(folder.name) and folder.name != name:
                with suppress(FileNotFoundError):  # another process has removed it meanwhile
                    others.append((folder.stat().st_mtime_ns, folder.name))
        for _, other in sorted(others)[: max(0, len(others) + 1 - self._kept)]:
            with suppress(locks.LockHeld), self.locked(other, wait=False):
                self.remove(other)
        return bundle

    def _writing(self) -> AbstractContextManager[None]:
        return files.writing_cache(self.folder, partial(BundleError, reason="cache"))
