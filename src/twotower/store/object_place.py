"""A store in an object store: immutable objects of bundles, and a pointer that a conditional write moves.

bundles/<id>/    the files of a bundle; its manifest is written last and deleted first: with a manifest all files exist
CURRENT          the id of the served bundle, and the line of the history that belongs to it
HISTORY.jsonl    the changes of the store (history.py)
leases/          which bundles are read and published (leases.py)

Of two changes at once one is refused: its write of CURRENT finds another content than it has read. Readers keep copies
of bundles on their disk (cache.py).
"""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from twotower import files
from twotower.errors import BundleError, warn_once
from twotower.files import layout
from twotower.files.object_stores import Content, ObjectClient, ObjectError, ObjectInfo, RemoteLimits
from twotower.files.urls import Url
from twotower.store.bundle import Bundle, check_sizes, is_bundle_id, listed_files
from twotower.store.cache import BundleCache
from twotower.store.history import MAX_HISTORY_BYTES, new_line, parse_line, read_lines, with_line
from twotower.store.leases import FoundLease, Lease, Leases, LeaseTimes
from twotower.store.manifest import MAX_MANIFEST_BYTES, JsonObject, Manifest, parse_manifest
from twotower.store.place import Change, StorePlace

log = logging.getLogger(__name__)

POLL_LIMITS = RemoteLimits(connect_seconds=2.0, silence_seconds=2.0, request_seconds=3.0, retries=1, retry_seconds=1.0)
"""Limits of a read of CURRENT that is repeated soon anyway."""
_EDITS = 50
"""Attempts to replace a file that other processes replace at the same time."""
_MAX_CURRENT_BYTES = 100_000
_REASONS = {"unreachable": "store", "bucket": "store", "changed": "locked"}
"""Reasons of BundleErrors by the cause of an ObjectError."""


class ObjectPlace(StorePlace):
    """The prefix of a store in an object store."""

    def __init__(self, url: Url, times: LeaseTimes = LeaseTimes(), cache: BundleCache | None = None) -> None:
        """Address the store at `url`. Raises BundleError for HTTP, which cannot be written."""
        if not url.is_object_store:
            raise BundleError(f"{url}: a store needs a folder or an object store, such as s3://BUCKET/PREFIX", "store")
        self.path: Url = url
        self.cache = cache or BundleCache(str(url))
        self.leases = Leases(ObjectClient(url), self.key, times)
        self._serving_leases = Leases(ObjectClient(url, POLL_LIMITS), self.key, times)
        self._serving: tuple[str, Lease] | None = None
        self._changing: Lease | None = None

    @property
    def client(self) -> ObjectClient:
        return ObjectClient(self.path)

    def key(self, path: str) -> str:
        return "/".join([*self.path.parts, path])

    # ---- reading

    def exists(self) -> bool:
        with self.errors("unreadable"):
            return any(self.client.head(self.key(name)) for name in (layout.HISTORY, layout.CURRENT))

    def create(self) -> None:
        with self.errors("store"):
            if found := self.client.list(self.path.key):
                inner = found[0].key.split("/")[len(self.path.parts)]
                raise BundleError(
                    f"{self.path}: not empty and not a store (it holds {inner}); choose another prefix", "store"
                )
            with _suppress_changed():  # another process creates it too
                self.client.write(self.key(layout.HISTORY), b"", Content())

    def ids(self) -> list[str]:
        with self.errors("unreadable"):
            paths = [o.key.split("/") for o in self.objects(layout.BUNDLES)]
        return sorted(path[0] for path in paths if path[1:] == [layout.MANIFEST] and is_bundle_id(path[0]))

    def objects(self, below: str) -> list[ObjectInfo]:
        """Return the objects below a path, with their paths from there as keys. Raises ObjectError."""
        prefix = self.key(below)
        return [replace(o, key=o.key[len(prefix) + 1 :]) for o in self.client.list(prefix, warn_once)]

    def current(self) -> str:
        return self.read_current()[0]

    def read_current(self, limits: RemoteLimits = RemoteLimits()) -> tuple[str, JsonObject | None, Content]:
        """Return the id in CURRENT, the line of the history that belongs to it, if any, and the content of CURRENT."""
        with self.errors("unreadable"):
            content = ObjectClient(self.path, limits).read(self.key(layout.CURRENT), _MAX_CURRENT_BYTES)
        name, text, *_ = [*content.data.decode(errors="replace").split("\n"), ""]
        line = parse_line(text)
        return name.strip(), line if line and line["bundle"] == name.strip() else None, content

    def stamp(self, serving: str) -> tuple[str, int | str]:
        name, _, content = self.read_current(POLL_LIMITS)
        self._hold_serving(serving)
        return name, content.info.tag if content.info else ""

    def _hold_serving(self, name: str) -> None:
        """Keep a lease on the bundle that this process serves. Without the right to write it has no lease."""
        if self._serving is not None and self._serving[0] != name:
            self._serving[1].end()
            self._serving = None
        if name:
            if self._serving is None:
                self._serving = name, self._serving_leases.new("serve", name)
            try:
                self._serving[1].renew_if_due()
            except ObjectError as e:
                log.debug(f"no lease ({e})")

    def touch(self) -> None:
        with self.errors("unreadable"):
            name, line, content = self.read_current()
            if not name:
                raise BundleError(f"{self.path}: no bundle is current", "unreadable")
            data = _current_bytes(name, line, touched=uuid.uuid4().hex)
            with _suppress_changed():  # it has another mark already
                self.client.write(self.key(layout.CURRENT), data, content)

    def lines(self) -> list[JsonObject]:
        lines = super().lines()
        _, line, _ = self.read_current()
        return lines if line is None or line in lines else [*lines, line]

    def glance(self, name: str) -> Manifest:
        manifest = self.manifest(name)
        check_sizes(self._at(name), listed_files(self._at(name), manifest), self.sizes(name))
        return manifest

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes of the objects of a bundle in bytes, by path."""
        with self.errors("unreadable"):
            return {o.key: o.size for o in self.objects(f"{layout.BUNDLES}/{name}")}

    def manifest(self, name: str) -> Manifest:
        return self._parsed(name, self._manifest_bytes(name))

    def read(self, name: str, max_bytes: int) -> bytes:
        with self.errors("unreadable"):
            return self.client.read(self.key(name), max_bytes).data

    def open(self, name: str) -> Bundle:
        data = self._manifest_bytes(name)
        manifest = self._parsed(name, data)
        listed = listed_files(self._at(name), manifest)
        if found := self.cache.find(name, manifest):
            return found
        with ExitStack() as held, self.cache.locked(name):
            if found := self.cache.find(name, manifest):  # another process has made it meanwhile
                return found
            lease = self.leases.new("read", name)
            try:
                held.enter_context(self.leases.held(lease))
            except ObjectError as e:
                log.debug(f"no lease while {name} is fetched ({e})")
            self._manifest_bytes(name)  # whoever removes the bundle sees the lease, or has deleted the manifest
            log.info(f"fetching bundle {name}, {manifest.size / 1e6:,.1f} MB, from {self.path}")
            with self.errors("unreadable"):
                self.client.fetch(self._at(name), listed.values(), self.cache.folder / name)
            return self.cache.complete(name, data)

    def _at(self, name: str) -> Url:
        return self.path / layout.BUNDLES / name

    def _manifest_bytes(self, name: str) -> bytes:
        at = self._at(name)
        with self.errors("unreadable"):
            content = self.client.read((at / layout.MANIFEST).key, MAX_MANIFEST_BYTES)
        if content.info is None:
            raise BundleError(f"{at}: no such bundle", "missing")
        return content.data

    def _parsed(self, name: str, data: bytes) -> Manifest:
        return parse_manifest(data, self._at(name) / layout.MANIFEST, name)

    # ---- changing

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        with self.errors("write"):
            for n in range(_EDITS):
                content = self.client.read(self.key(name), MAX_HISTORY_BYTES)
                data = change(content.data)
                if data == content.data:
                    return
                try:
                    self.client.write(self.key(name), data, content)
                    return
                except ObjectError as e:
                    if e.cause != "changed" or n == _EDITS - 1:
                        raise
                    time.sleep(random.uniform(0, 0.01 * (n + 1)))

    def log(self, line: JsonObject) -> None:
        def append(data: bytes) -> bytes:
            read_back = parse_line(with_line(b"", line).decode())
            return data if read_back in read_lines(data, self.path / layout.HISTORY) else with_line(data, line)

        self.edit(layout.HISTORY, append)
        files.point("bucket.logged")

    def is_published_to(self) -> bool:
        with self.errors("write"), ExitStack() as held:
            own = self._changing or held.enter_context(self.leases.held(self.leases.new("look")))
            return any(other.action == "publish" and other.is_live for other in self.leases.found(own)[0])

    @contextmanager
    def changing(self, action: str) -> Iterator[Change]:
        """Change the store within the block, after recovery from killed processes.

        Nobody waits for another: the write of CURRENT decides which of two changes takes place."""
        with ExitStack() as held, self.errors("write"):
            lease = held.enter_context(self.leases.held(self.leases.new(action)))
            change = ObjectChange(self, lease, held)
            change.recover(action)
            self._changing = lease
            held.callback(setattr, self, "_changing", None)
            yield change

    @contextmanager
    def errors(self, reason: str) -> Iterator[None]:
        """Turn ObjectErrors into BundleErrors. A store that does not answer has the reason "store"."""
        try:
            yield
        except ObjectError as e:
            others = dict.fromkeys(("refused", "foreign", "other"), reason)
            raise BundleError(str(e), (_REASONS | others).get(e.cause, e.cause)) from e


class ObjectChange(Change):
    """A change of a store in an object store."""

    def __init__(self, place: ObjectPlace, lease: Lease, held: ExitStack) -> None:
        self._place, self._lease, self._held = place, lease, held
        self.old, self._line, self._before = place.read_current()
        self.stamp = "-"
        self._leases, self._now = list[FoundLease](), 0.0
        self._own: list[Lease] = [lease]
        self._made = ""
        """The id of a new bundle."""

    def recover(self, action: str) -> None:
        """Complete the history, remove the remains of killed publishers, and end their leases.

        Raises ObjectError, BundleError."""
        place = self._place
        if self._line is not None:
            place.log(self._line)
        known, current = place.lines(), self.old
        # If CURRENT has changed since, the history that was read after it may have more lines.
        if self._line is None and place.read_current()[2].data == self._before.data:
            place.log_recovery(known, current)
        self._leases, self._now = place.leases.found(self._lease)
        ended = [lease for lease in self._leases if not lease.is_live]
        names = {current, *(str(line["bundle"]) for line in known)}
        for lease in ended:
            if lease.action == "publish" and lease.bundle and lease.bundle not in names | self._leased():
                died = f"publish {place.leases.holder(lease)} died"
                self._delete(lease.bundle)
                place.log(new_line("recover", current, current, died))
        place.leases.clear(ended)
        if action == "publish":
            self.stamp = place.next_stamp(known, current)
        if action == "gc":
            self._delete_remains()
        files.point("store.locked")

    def stage(self) -> Path:
        return self._held.enter_context(self._place.cache.staging())

    def complete(self, folder: Path, name: str) -> Bundle:
        self._made = name
        return self._place.cache.add(folder, name)

    def store(self, bundle: Bundle) -> None:
        place, at = self._place, self._place.path / layout.BUNDLES / bundle.id
        with place.errors("write"):
            self.hold(bundle.id)
            files.point("bucket.held")
            place.client.upload_all(at, [entry.path for entry in bundle.manifest.files], bundle.folder)
            data = (bundle.folder / layout.MANIFEST).read_bytes()
            manifest = f"{layout.BUNDLES}/{bundle.id}/{layout.MANIFEST}"
            try:
                place.client.write(place.key(manifest), data, Content())
            except ObjectError as e:
                if e.cause != "changed":
                    raise
                if place.read(manifest, len(data)) != data:
                    self._made = ""  # the files are those of the other process
                    raise BundleError(f"{at}: another process has published it meanwhile; call again", "locked") from e
            files.point("bucket.manifest")
        check_sizes(at, listed_files(at, bundle.manifest), place.sizes(bundle.id))

    def hold(self, name: str) -> None:
        with self._place.errors("write"):
            lease = self._place.leases.new("publish" if self._made else "hold", name)
            self._own.append(self._held.enter_context(self._place.leases.held(lease)))

    def make_current(self, name: str, line: JsonObject) -> None:
        place = self._place
        if not all(lease.is_live for lease in self._own):
            raise BundleError(f"{place.path}: a lease could not be renewed in time; call again", "store")
        self.is_unsure = True
        try:
            place.client.write(place.key(layout.CURRENT), _current_bytes(name, line), self._before)
            self.is_unsure = False
            files.point("bucket.current")
        except ObjectError as e:
            name_now, line_now, _ = place.read_current()
            if line_now == line:
                self.is_unsure = False  # an earlier try took place, and its answer was lost
            elif e.cause == "changed":
                self.is_unsure = False
                what = f"another process has made {name_now or 'nothing'} current meanwhile; call again"
                raise BundleError(f"{place.path}: {what}", "locked") from e
            else:
                self.is_unsure = e.cause != "refused"
                raise BundleError(str(e), "write" if e.cause == "refused" else "store") from e

    def discard(self) -> None:
        if not self._made:
            return
        with suppress(BundleError, ObjectError):
            if self.is_unsure or self._place.current() == self._made:
                return  # a later change removes it, if it is not current then
            self._delete(self._made)
        self._place.cache.remove(self._made)

    def remove(self, name: str) -> bool:
        """Remove a bundle and return True, unless a process has a lease on it, or has made it current meanwhile."""
        if name in self._leased():
            return False
        place, manifest = self._place, f"{layout.BUNDLES}/{name}/{layout.MANIFEST}"
        with place.errors("write"):
            data = place.read(manifest, MAX_MANIFEST_BYTES)
            place.client.delete([place.key(manifest)])
            files.point("bucket.unlisted")
            # A process that took a lease before the manifest was gone has a right to the files.
            self._leases, self._now = place.leases.found(self._lease)
            if name in self._leased() or place.current() == name:
                place.client.write(place.key(manifest), data)
                return False
            self._delete(name)
        return True

    def _leased(self) -> set[str]:
        return {lease.bundle for lease in self._leases if lease.is_live}

    def _delete(self, name: str) -> None:
        """Delete the objects of a bundle, the manifest first."""
        place, at = self._place, self._place.path / layout.BUNDLES / name
        paths = {o.key for o in place.objects(f"{layout.BUNDLES}/{name}")}
        place.client.delete([(at / path).key for path in paths & {layout.MANIFEST}])
        files.point("bucket.deleting")
        place.client.delete([(at / path).key for path in sorted(paths - {layout.MANIFEST})])
        files.point("bucket.deleted")

    def _delete_remains(self) -> None:
        """Delete the objects of bundles without a manifest.

        A killed `gc` leaves objects of a published bundle; other objects go if they are older than a lease."""
        place, times = self._place, self._place.leases.times
        found: dict[str, list[tuple[str, float]]] = {}
        published = {str(line["bundle"]) for line in place.lines()}
        for o in place.objects(layout.BUNDLES):
            name, _, path = o.key.partition("/")
            if is_bundle_id(name):
                found.setdefault(name, []).append((path, o.changed))
        for name, objects in found.items():
            latest = max(changed for _, changed in objects)
            is_old = self._now > latest + times.seconds + times.margin
            if layout.MANIFEST not in dict(objects) and (is_old or name in published) and name not in self._leased():
                self._delete(name)


def _current_bytes(name: str, line: JsonObject | None, touched: str = "") -> bytes:
    return f"{name}\n{json.dumps(line) if line else ''}\n{touched}".encode()


@contextmanager
def _suppress_changed() -> Iterator[None]:
    """Suppress the error of a conditional write that found another content."""
    try:
        yield
    except ObjectError as e:
        if e.cause != "changed":
            raise
