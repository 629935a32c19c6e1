"""A store in a folder: changes hold the kernel's lock, files are replaced by renaming.

bundles/<id>/    a bundle (bundle.py): the publisher's files and the manifest
CURRENT          the id of the served bundle (current.py)
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
from twotower.store.bundle import Bundle, is_bundle_id, next_stamp, remove_bundle, stamp_of, stray_ids
from twotower.store.current import CurrentPointer, read_store_file
from twotower.store.history import History, new_line
from twotower.store.manifest import JsonObject, Manifest, read_manifest
from twotower.store.place import Change, StorePlace


class FolderPlace(StorePlace):
    """The folder of a store."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.bundles = path / layout.BUNDLES
        self.pointer, self.history = CurrentPointer(path), History(path)

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
        return self.pointer.read()

    def stamp(self, serving: str) -> tuple[str, int | str]:
        return self.pointer.stamp()

    def touch(self) -> None:
        self.pointer.touch()

    def lines(self) -> list[JsonObject]:
        return self.history.lines()

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
        return read_store_file(self.path / name, max_bytes)

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        path = self.path / name
        files.write(path, change(path.read_bytes() if path.exists() else b""), 0o644)

    @contextmanager
    def changing(self, action: str) -> Iterator[Change]:
        """Hold the store's lock within the block, after recovery from a killed process.

        Kernel locks are released when a process dies. A process that ends normally empties LOCK, so text in a free LOCK
        means that its holder was killed.
        """
        try:
            with locks.lock(self.path / layout.STORE_LOCK) as lock:
                left = lock.killed_holder
                self._recover(f"{left.action} {left.process} died" if left else "", left.detail if left else "")
                lock.clear()
                stamp = "-"
                if action == "publish":
                    served = {self.current(), *self.history.current_ids()}
                    stamp = next_stamp({*self.ids(), *served} - stray_ids(self.ids(), served))
                lock.write_holder(action, stamp)
                files.point("store.locked")
                yield _LockedChange(self, stamp)
        except locks.LockHeld as e:
            raise BundleError(f"{self.path}: {e}", "locked") from None
        except OSError as e:
            raise BundleError(f"{e.filename or self.path}: cannot be changed ({e.strerror})", "write") from e

    def _recover(self, died: str, stamp: str) -> None:
        """Remove the remains of a killed process, among them a bundle that never became current, and log the recovery."""
        current = self.current()
        known = {current, *self.history.bundles()}
        never_current = [name for name in self.ids() if stamp_of(name) == stamp and name not in known]
        for path in [*self.bundles.glob(".tmp-*"), *(self.bundles / name for name in never_current)]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (layout.CURRENT, layout.HISTORY, layout.COLLECTIONS):
            for file in self.path.glob(f".{name}.*.tmp"):
                file.unlink(missing_ok=True)
        logged = ["", *self.history.current_ids()][-1]
        if died or logged != current:
            reason = died or "CURRENT was changed without an entry in HISTORY.jsonl"
            self.history.append(new_line("recover", current, logged, reason))


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

    def store(self, bundle: Bundle) -> None:
        """Do nothing: `complete` has put them there."""

    def hold(self, name: str) -> None:
        """Do nothing: the lock keeps all bundles."""

    def make_current(self, name: str, line: JsonObject) -> None:
        self._place.pointer.write(name)

    def discard(self) -> None:
        current = self._place.current()
        for path in self._made:
            if path.name != current:  # else only the sync of the folder of CURRENT failed
                shutil.rmtree(path, ignore_errors=True)

    def log(self, line: JsonObject) -> None:
        self._place.history.append(line)

    def remove(self, name: str) -> bool:
        return remove_bundle(self._place.bundles / name)
