"""A store in a folder: changes hold the kernel's lock, files are replaced by renaming.

bundles/<id>/    a bundle (bundle.py): the publisher's files and the manifest
CURRENT          the id of the served bundle
HISTORY.jsonl    the changes of the store (history.py)
LOCK             locked by the process that changes the store, with the name of that process
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower import files
from twotower.errors import BundleError
from twotower.files import layout, locks
from twotower.files.readers import read_regular
from twotower.store.bundle import Bundle, is_bundle_id, remove_bundle, stamp_of
from twotower.store.history import MAX_HISTORY_BYTES
from twotower.store.manifest import JsonObject, Manifest, read_manifest
from twotower.store.place import Change, StorePlace

_MAX_CURRENT_BYTES = 1000


class FolderPlace(StorePlace):
    """The folder of a store."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.bundles = path / layout.BUNDLES
        self._current = path / layout.CURRENT

    def exists(self) -> bool:
        return self.bundles.is_dir() and any((self.path / name).is_file() for name in layout.STORE_FILES)

    def create(self) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = (p.name for p in path.iterdir())
            foreign = sorted(n for n in names if not n.startswith(".") and n not in layout.STORE_FILES)
            if foreign:
                raise BundleError(f"{path}: not empty and not a store (it holds {foreign[0]}); choose another", "store")
            self.bundles.mkdir(exist_ok=True)
            (path / layout.STORE_LOCK).touch()
            files.sync(path)
            files.sync(path.absolute().parent)
        except OSError as e:
            raise BundleError(f"{path}: cannot create a store ({e.strerror})", "store") from e

    def ids(self) -> list[str]:
        found = (p for p in self.bundles.iterdir() if is_bundle_id(p.name))
        return sorted(p.name for p in found if p.is_dir() and not p.is_symlink())

    def current(self) -> str:
        return self.read(layout.CURRENT, _MAX_CURRENT_BYTES).decode(errors="replace").strip()

    def stamp(self, serving: str) -> tuple[str, int | str]:
        name = self.current()
        try:
            return name, self._current.stat().st_mtime_ns
        except OSError:
            return name, 0

    def touch(self) -> None:
        try:
            os.utime(self._current)
        except OSError as e:
            raise BundleError(f"{self._current}: cannot be touched ({e.strerror})", "unreadable") from e

    def open(self, name: str) -> Bundle:
        return Bundle.open(self.bundles / name)

    def glance(self, name: str) -> Manifest:
        return Bundle.open(self.bundles / name, checksums=False).manifest

    def manifest(self, name: str) -> Manifest:
        try:
            return read_manifest(self.bundles / name)
        except OSError as e:
            raise BundleError(f"{e.filename}: cannot be read ({e.strerror})", "unreadable") from e

    def read(self, name: str, max_bytes: int) -> bytes:
        path = self.path / name
        try:
            return read_regular(path, max_bytes)
        except FileNotFoundError:
            return b""
        except OSError as e:
            what = f"cannot be read ({e.strerror}); restore it, or move it away"
            raise BundleError(f"{path}: {what}", "unreadable") from e

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        files.write(self.path / name, change(self.read(name, MAX_HISTORY_BYTES)), 0o644)

    @contextmanager
    def changing(self, action: str) -> Iterator[Change]:
        """Hold the store's lock within the block, after recovery from a killed process.

        Kernel locks are released when a process dies. A process that ends normally empties LOCK, so text in a free LOCK
        is of a killed process."""
        try:
            with locks.lock(self.path / layout.STORE_LOCK) as lock:
                left = lock.killed_holder
                self._recover(f"{left.action} {left.process} died" if left else "", left.detail if left else "")
                lock.clear()
                stamp = self.next_stamp(self.lines(), self.current()) if action == "publish" else "-"
                lock.write_holder(action, stamp)
                files.point("store.locked")
                yield _LockedChange(self, stamp)
        except locks.LockHeld as e:
            raise BundleError(f"{self.path}: {e}", "locked") from None
        except OSError as e:
            raise BundleError(f"{e.filename or self.path}: cannot be changed ({e.strerror})", "write") from e

    def _recover(self, died: str, stamp: str) -> None:
        """Remove the remains of a killed process, with a bundle that never became current, and log the recovery."""
        current, lines = self.current(), self.lines()
        known = {current, *(str(line["bundle"]) for line in lines)}
        never_current = [name for name in self.ids() if stamp_of(name) == stamp and name not in known]
        for path in [*self.bundles.glob(".tmp-*"), *(self.bundles / name for name in never_current)]:
            shutil.rmtree(path, ignore_errors=True)
        files.remove_leftovers(self.path, {layout.CURRENT, layout.HISTORY, layout.COLLECTIONS}.__contains__)
        self.log_recovery(lines, current, died)


class _LockedChange(Change):
    """A change of a folder, under its lock."""

    def __init__(self, place: FolderPlace, stamp: str) -> None:
        self._place, self.stamp, self.old = place, stamp, place.current()
        self._made: list[Path] = []

    def stage(self) -> Path:
        folder = self._place.bundles / f".tmp-{self.stamp}"
        self._made.append(folder)
        folder.mkdir()
        return folder

    def complete(self, folder: Path, name: str) -> Bundle:
        final = self._place.bundles / name
        self._made.append(final)
        os.replace(folder, final)
        files.point("store.renamed")
        files.sync(final.parent)
        files.point("store.synced")
        return Bundle.open(final)

    def make_current(self, name: str, line: JsonObject) -> None:
        files.write(self._place.path / layout.CURRENT, f"{name}\n", 0o644)

    def discard(self) -> None:
        current = self._place.current()
        for path in self._made:
            if path.name != current:  # else only the sync of the folder of CURRENT failed
                shutil.rmtree(path, ignore_errors=True)

    def remove(self, name: str) -> bool:
        return remove_bundle(self._place.bundles / name)
