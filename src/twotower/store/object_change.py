"""A change of a store in an object store: what it writes, in which order, and what it finds of killed ones."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from twotower import files
from twotower.errors import BundleError, warn_once
from twotower.files import layout
from twotower.files.object_stores import TRANSFERS, Content, ObjectError
from twotower.store.bundle import Bundle, check_sizes, is_bundle_id, listed_files, next_stamp, stray_ids
from twotower.store.history import current_ids, new_line, read_lines, with_line
from twotower.store.leases import FoundLease, Lease
from twotower.store.manifest import MAX_MANIFEST_BYTES, FileEntry, JsonObject
from twotower.store.place import Change

if TYPE_CHECKING:
    from twotower.store.object_place import ObjectPlace

CHANGE = "change"
"""Name of the field of a line that tells it from all others."""


class ObjectChange(Change):
    """A change of an object store."""

    def __init__(self, place: ObjectPlace, lease: Lease, held: ExitStack) -> None:
        self._place, self._lease, self._held = place, lease, held
        self.old, self._line, self._before = place.read_current()
        self.stamp = "-"
        self._leases, self._now = list[FoundLease](), 0.0
        self._own: list[Lease] = [lease]
        self._made: tuple[str, str] | None = None
        """The digest of the manifest and the id of a new bundle."""
        self._is_unsure = False
        """True while it is unknown if the write of CURRENT took place."""

    def recover(self, action: str) -> None:
        """Complete the history, remove what killed publishers have left, and end their leases. Raises ObjectError, BundleError."""
        place = self._place
        if self._line is not None:
            self.log(self._line)
        known, current = place.lines(), self.old
        logged = ["", *current_ids(known)][-1]
        # If CURRENT is another one by now, the history that was read after it may have more.
        if self._line is None and logged != current and place.read_current()[2].data == self._before.data:
            self.log(new_line("recover", current, logged, "CURRENT was changed without an entry in HISTORY.jsonl"))
        self._leases, self._now = place.leases.found(self._lease)
        ended = [lease for lease in self._leases if not lease.is_live]
        names = {current, *(str(line["bundle"]) for line in known)}
        for lease in ended:
            if lease.action == "publish" and lease.bundle and lease.bundle not in names | self._leased():
                died = f"publish {place.leases.holder(lease)} died"
                self._delete(lease.bundle)
                self.log(new_line("recover", current, current, died))
        place.leases.clear(ended)
        if action == "publish":
            ids, served = place.ids(), {current, *current_ids(known)}
            self.stamp = next_stamp({*ids, *served} - stray_ids(ids, served))
        if action == "gc":
            self._delete_remains()
        files.point("store.locked")

    def stage(self) -> Path:
        folder = self._held.enter_context(self._place.cache.staging())
        folder.mkdir()
        return folder

    def complete(self, folder: Path, name: str) -> Bundle:
        digest = hashlib.sha256((folder / layout.MANIFEST).read_bytes()).hexdigest()
        self._made = digest, name
        return self._place.cache.add(folder, digest, name)

    def store(self, bundle: Bundle) -> None:
        place, at = self._place, self._place.path / layout.BUNDLES / bundle.id
        with place.errors("write"):
            self.hold(bundle.id)
            files.point("bucket.held")

            def upload(entry: FileEntry) -> None:
                place.client.upload((at / entry.path).key, bundle.folder / entry.path)
                files.point("bucket.file")

            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(upload, bundle.manifest.files))
            data = (bundle.folder / layout.MANIFEST).read_bytes()
            try:
                place.client.write((at / layout.MANIFEST).key, data, Content())
            except ObjectError as e:
                if (
                    e.cause == "changed"
                    and place.read(f"{layout.BUNDLES}/{bundle.id}/{layout.MANIFEST}", len(data)) != data
                ):
                    self._made = None  # its files are those of the other process
                    raise BundleError(f"{at}: another process has published it meanwhile; call again", "locked") from e
                if e.cause != "changed":
                    raise
            files.point("bucket.manifest")
        check_sizes(at, listed_files(at, bundle.manifest), place.sizes(bundle.id))

    def hold(self, name: str) -> None:
        with self._place.errors("write"):
            lease = self._place.leases.new("publish" if self._made else "hold", name)
            self._own.append(self._held.enter_context(self._place.leases.held(lease)))

    def make_current(self, name: str, line: JsonObject) -> None:
        place = self._place
        line[CHANGE] = uuid.uuid4().hex
        if not all(lease.is_live for lease in self._own):
            raise BundleError(f"{place.path}: a lease could not be renewed in time; call again", "store")
        self._is_unsure = True
        try:
            place.client.write(place.key(layout.CURRENT), current_bytes(name, line), self._before)
            self._is_unsure = False
            files.point("bucket.current")
        except ObjectError as e:
            name_now, line_now, _ = place.read_current()
            if line_now is not None and line_now.get(CHANGE) == line[CHANGE]:
                self._is_unsure = False  # an earlier try took place, and its answer was lost
            elif e.cause == "changed":
                self._is_unsure = False
                raise BundleError(
                    f"{place.path}: another process has made {name_now or 'nothing'} current meanwhile; call again",
                    "locked",
                ) from e
            else:
                self._is_unsure = e.cause != "refused"
                raise BundleError(str(e), "write" if e.cause == "refused" else "store") from e

    def discard(self) -> None:
        if self._made is None:
            return
        digest, name = self._made
        with suppress(BundleError, ObjectError):
            if self._is_unsure or self._place.current() == name:
                return  # a later change removes it, if it is not current then
            self._delete(name)
        self._place.cache.remove(digest, name)

    def log(self, line: JsonObject) -> None:
        line.setdefault(CHANGE, uuid.uuid4().hex)
        place, kept = self._place, {name: value for name, value in line.items() if name != "touched"}

        def append(data: bytes) -> bytes:
            return data if has_line(read_lines(data, place.path / layout.HISTORY), line) else with_line(data, kept)

        place.edit(layout.HISTORY, append)
        files.point("bucket.logged")

    def remove(self, name: str) -> bool:
        """Remove a bundle and return True, unless a process has a lease on it, or has made it current meanwhile."""
        if name in self._leased():
            return False
        place, manifest = self._place, f"{layout.BUNDLES}/{name}/{layout.MANIFEST}"
        with place.errors("write"):
            data = place.read(manifest, MAX_MANIFEST_BYTES)
            place.client.delete([place.key(manifest)])
            files.point("bucket.unlisted")
            # Whoever took a lease before the manifest was gone has a right to the files.
            self._leases, self._now = place.leases.found(self._lease)
            if name in self._leased() or place.current() == name:
                place.client.write(place.key(manifest), data)
                return False
            self._delete(name)
        return True

    @property
    def is_unsure(self) -> bool:
        return self._is_unsure

    def _leased(self) -> set[str]:
        return {lease.bundle for lease in self._leases if lease.is_live}

    def _delete(self, name: str) -> None:
        """Delete the objects of a bundle, the manifest first."""
        prefix = self._place.key(f"{layout.BUNDLES}/{name}")
        keys = [o.key for o in self._place.client.list(prefix, warn_once)]
        manifest = f"{prefix}/{layout.MANIFEST}"
        self._place.client.delete([manifest] if manifest in keys else [])
        files.point("bucket.deleting")
        self._place.client.delete([key for key in keys if key != manifest])
        files.point("bucket.deleted")

    def _delete_remains(self) -> None:
        """Delete objects without a manifest: those of a bundle that was published, which a killed `gc` was removing, and those that
        no process has touched for the life of a lease."""
        place, times = self._place, self._place.leases.times
        prefix = place.key(layout.BUNDLES)
        found: dict[str, list[tuple[str, float]]] = {}
        published = {str(line["bundle"]) for line in place.lines()}
        for o in place.client.list(prefix, warn_once):
            name, _, path = o.key[len(prefix) + 1 :].partition("/")
            if is_bundle_id(name):
                found.setdefault(name, []).append((path, o.changed))
        for name, objects in found.items():
            latest = max(changed for _, changed in objects)
            is_old = self._now > latest + times.seconds + times.margin
            if layout.MANIFEST not in dict(objects) and (is_old or name in published) and name not in self._leased():
                self._delete(name)


def current_bytes(name: str, line: JsonObject) -> bytes:
    return f"{name}\n".encode() + json.dumps(line).encode() + b"\n"


def has_line(lines: list[JsonObject], line: JsonObject) -> bool:
    """Return True if a line of the history is among others."""
    return any(other.get(CHANGE) == line.get(CHANGE) for other in lines)


@contextmanager
def suppress_changed() -> Iterator[None]:
    """Suppress the error of a conditional write that found another content."""
    try:
        yield
    except ObjectError as e:
        if e.cause != "changed":
            raise
