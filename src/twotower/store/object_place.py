"""A store in an object store: immutable objects of bundles, and a pointer that a conditional write moves.

bundles/<id>/    the files of a bundle; its manifest is written last and deleted first, so whoever finds it finds the files
CURRENT          the id of the served bundle, and the line of the history that belongs to it
HISTORY.jsonl    the changes of the store (history.py)
leases/          which bundles are read and published (leases.py)

Of two changes at once, the one whose write of CURRENT finds another content than it has read is refused. Readers keep copies of
bundles on their disk (cache.py).
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from twotower import files
from twotower.errors import BundleError, warn_once
from twotower.files import layout
from twotower.files.object_stores import TRANSFERS, Content, ObjectClient, ObjectError, RemoteLimits
from twotower.files.urls import Url
from twotower.store.bundle import Bundle, check_sizes, is_bundle_id, listed_files
from twotower.store.cache import BundleCache
from twotower.store.history import MAX_HISTORY_BYTES, parse_line, read_lines
from twotower.store.leases import Lease, Leases, LeaseTimes
from twotower.store.manifest import MAX_MANIFEST_BYTES, FileEntry, JsonObject, Manifest, parse_manifest
from twotower.store.object_change import CHANGE, ObjectChange, current_bytes, has_line, suppress_changed
from twotower.store.place import Change, StorePlace

log = logging.getLogger(__name__)

POLL_LIMITS = RemoteLimits(connect_seconds=2.0, silence_seconds=2.0, request_seconds=3.0, retries=1, retry_seconds=1.0)
"""Ends of a look at CURRENT, which is repeated soon anyway."""
_EDITS = 50
"""Tries to replace a file that other processes replace too."""
_MAX_CURRENT_BYTES = 100_000


class ObjectPlace(StorePlace):
    """The prefix of a store in an object store."""

    def __init__(self, url: Url, times: LeaseTimes = LeaseTimes(), cache: BundleCache | None = None) -> None:
        """Address the store at `url`. Raises ConfigError for HTTP, which cannot be written."""
        if not url.is_object_store:
            raise BundleError(f"{url}: a store needs a folder or an object store, such as s3://BUCKET/PREFIX", "store")
        self.path: Url = url
        self.cache = cache or BundleCache(str(url))
        self.leases = Leases(ObjectClient(url), self.key, times)
        self._serving_leases = Leases(ObjectClient(url, POLL_LIMITS), self.key, times)
        self._serving: tuple[str, Lease] | None = None

    @property
    def client(self) -> ObjectClient:
        return ObjectClient(self.path)

    def key(self, path: str) -> str:
        """Return the key of a path within the store."""
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
            with suppress_changed():  # another process creates it too
                self.client.write(self.key(layout.HISTORY), b"", Content())

    def ids(self) -> list[str]:
        with self.errors("unreadable"):
            listed = self.client.list(self.key(layout.BUNDLES), warn_once)
        paths = (o.key.split("/")[len(self.path.parts) + 1 :] for o in listed)
        return sorted(path[0] for path in paths if path[1:] == [layout.MANIFEST] and is_bundle_id(path[0]))

    def current(self) -> str:
        return self.read_current()[0]

    def read_current(self, limits: RemoteLimits = RemoteLimits()) -> tuple[str, JsonObject | None, Content]:
        """Return what CURRENT says: the id, and the line of the history that belongs to it, if it has one; and its content."""
        with self.errors("unreadable"):
            content = ObjectClient(self.path, limits).read(self.key(layout.CURRENT), _MAX_CURRENT_BYTES)
        name, _, text = content.data.decode(errors="replace").partition("\n")
        line = parse_line(text)
        whole = line is not None and line["bundle"] == name.strip() and isinstance(line.get(CHANGE), str)
        return name.strip(), line if whole else None, content

    def stamp(self, serving: str) -> tuple[str, int | str]:
        name, _, content = self.read_current(POLL_LIMITS)
        self._say_serving(serving)
        return name, content.info.tag if content.info else ""

    def _say_serving(self, name: str) -> None:
        """Keep a lease on the bundle that this process serves. Without the right to write there is none."""
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
            data = current_bytes(name, {**(line or {"bundle": name, CHANGE: ""}), "touched": uuid.uuid4().hex})
            with suppress_changed():  # it has another mark already
                self.client.write(self.key(layout.CURRENT), data, content)

    def lines(self) -> list[JsonObject]:
        with self.errors("unreadable"):
            content = self.client.read(self.key(layout.HISTORY), MAX_HISTORY_BYTES)
        lines = read_lines(content.data, self.path / layout.HISTORY)
        _, line, _ = self.read_current()
        return lines if line is None or has_line(lines, line) else [*lines, line]

    def glance(self, name: str) -> Manifest:
        manifest = self.manifest(name)
        check_sizes(self._at(name), listed_files(self._at(name), manifest), self.sizes(name))
        return manifest

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes of the objects of a bundle in bytes, by path."""
        prefix = self.key(f"{layout.BUNDLES}/{name}")
        with self.errors("unreadable"):
            return {o.key[len(prefix) + 1 :]: o.size for o in self.client.list(prefix, warn_once)}

    def manifest(self, name: str) -> Manifest:
        return self._parsed(name, self._manifest_bytes(name))

    def read(self, name: str, max_bytes: int) -> bytes:
        with self.errors("unreadable"):
            return self.client.read(self.key(name), max_bytes).data

    def open(self, name: str) -> Bundle:
        data = self._manifest_bytes(name)
        digest = hashlib.sha256(data).hexdigest()
        if found := self.cache.find(digest, name):
            return found
        manifest = self._parsed(name, data)
        listed = listed_files(self._at(name), manifest)
        with ExitStack() as held, self.cache.making(digest) as folder:
            if found := self.cache.find(digest, name):  # another process has made it meanwhile
                return found
            lease = self.leases.new("read", name)
            try:
                held.enter_context(self.leases.held(lease))
            except ObjectError as e:
                log.debug(f"no lease while {name} is fetched ({e})")
            self._manifest_bytes(name)  # whoever removes the bundle sees the lease, or has deleted the manifest
            log.info(f"fetching bundle {name}, {manifest.size / 1e6:,.1f} MB, from {self.path}")
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(partial(self._fetch, name, folder), listed.values()))
            (folder / layout.MANIFEST).write_bytes(data)
            return self.cache.add(folder, digest, name)

    def _fetch(self, name: str, folder: Path, entry: FileEntry) -> None:
        """Write a file of a bundle into a folder, unless it is there. Raises BundleError if it is not as the manifest says."""
        with self.errors("unreadable"):
            self.client.fetch((self._at(name) / entry.path).key, folder / entry.path, entry.size, entry.sha256)
        files.point("cache.file")

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

    def is_published_to(self) -> bool:
        with self.errors("write"), self.leases.held(self.leases.new("look")) as lease:
            return any(other.action == "publish" and other.is_live for other in self.leases.found(lease)[0])

    @contextmanager
    def changing(self, action: str) -> Iterator[Change]:
        """Change the store within the block, after recovery from killed processes. Nobody is waited for: the write of CURRENT
        decides which of two changes holds."""
        with ExitStack() as held, self.errors("write"):
            lease = held.enter_context(self.leases.held(self.leases.new(action)))
            change = ObjectChange(self, lease, held)
            change.recover(action)
            yield change

    @contextmanager
    def errors(self, reason: str) -> Iterator[None]:
        """Turn ObjectErrors into BundleErrors. A store that does not answer has the reason "store"."""
        try:
            yield
        except ObjectError as e:
            reasons = {
                "unreachable": "store",
                "bucket": "store",
                "changed": "locked",
                "refused": reason,
                "foreign": reason,
                "other": reason,
            }
            raise BundleError(str(e), reasons.get(e.cause, e.cause)) from e
