"""A published model: an immutable folder of files and their manifest, whose digest ends the folder's name.

The module does not depend on the content of the files. A bundle is verified as a whole before one of its files is
parsed. Its id is a time, later than the times of all earlier ids, and a digest of the manifest.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

from twotower import files
from twotower.errors import BundleError
from twotower.escaping import representation
from twotower.files import layout, locks
from twotower.files.object_stores import FileEntry
from twotower.files.urls import Url
from twotower.store.manifest import BundleFacts, Manifest, read_manifest, write_manifest

_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}")
_STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: folder and manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, *, checksums: bool = True) -> Bundle:
        """Verify a bundle. Raises BundleError. `checksums=False` compares names and sizes only."""
        folder = Path(folder).absolute()
        try:
            bundle = cls(folder, read_manifest(folder))
            bundle._verify(checksums)
        except OSError as e:
            reason = "missing" if isinstance(e, FileNotFoundError) else "unreadable"
            raise BundleError(f"{e.filename or folder}: cannot be read ({e.strerror})", reason) from e
        return bundle

    def __repr__(self) -> str:
        counts = self.manifest.counts
        return representation(type(self), f"{self.id}: {counts.users:,} users, {counts.items:,} items")

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def size(self) -> int:
        return self.manifest.size

    def check_consistency(self, sources: Mapping[str, Mapping[str, str | int | None]]) -> None:
        """Raise BundleError if two files, or a file and the manifest, differ in the value of a field.

        `sources` maps files to their fields: `{"user_tower.onnx": {"dims": 64}, "index": {"dims": 64, "items": 3706}}`.
        """
        m = self.manifest
        stated = {"model": m.model, "dims": m.dims, "metric": m.metric, "vocab_hash": m.vocab_hash, **dict(m.counts)}
        seen: dict[str, tuple[str, str | int | None]] = {}
        for source, facts in {layout.MANIFEST: stated, **sources}.items():
            for field, value in facts.items():
                first, expected = seen.setdefault(field, (source, value))
                if value != expected:
                    raise BundleError(
                        f"{self.folder}: {field} is {expected!r} in {first}, {value!r} in {source}", "mismatch"
                    )

    @contextmanager
    def lease(self) -> Iterator[Bundle]:
        """Keep `gc` of all processes from removing the bundle within the block. Raises BundleError."""
        with ExitStack() as held:
            try:
                handle = os.open(self.folder / layout.MANIFEST, files.READ_ONLY)
                held.callback(os.close, handle)
                locks.share(handle)
                # stat raises if it was removed between open and lock
                (self.folder / layout.MANIFEST).stat()
            except OSError as e:
                removed = isinstance(e, FileNotFoundError | BlockingIOError)
                what = "it was removed" if removed else e.strerror
                raise BundleError(f"{self.folder}: no lease ({what})", "missing" if removed else "unreadable") from e
            yield self

    def _verify(self, checksums: bool) -> None:
        listed = listed_files(self.folder, self.manifest)
        check_sizes(self.folder, listed, {path: info.st_size for path, info in _walk(self.folder)})
        for path, entry in listed.items() if checksums else ():
            if _sha256(self.folder / path) != entry.sha256:
                raise BundleError(f"{self.folder / path}: damaged, or of another bundle (checksum)", "checksum")


def listed_files(where: Path | Url, manifest: Manifest) -> dict[str, FileEntry]:
    """Return the files of a manifest by path. Raises BundleError for a repeated path, or one outside the folder."""
    listed: dict[str, FileEntry] = {}
    for entry in manifest.files:
        if not _is_plain(entry.path) or entry.path == layout.MANIFEST or entry.path in listed:
            raise BundleError(f"{where}: {layout.MANIFEST}: files: path {entry.path!r} is not allowed", "path")
        listed[entry.path] = entry
    return listed


def check_sizes(where: Path | Url, listed: Mapping[str, FileEntry], found: Mapping[str, int]) -> None:
    """Raise BundleError if the `found` sizes in bytes, by path, differ from the listed files."""
    others = found.keys() - {layout.MANIFEST}
    if missing := sorted(listed.keys() - others):
        raise BundleError(f"{where / missing[0]}: missing", "missing")
    if unlisted := sorted(others - listed.keys()):
        raise BundleError(f"{where / unlisted[0]}: not listed in {layout.MANIFEST}", "unlisted")
    for path, entry in listed.items():
        if found[path] != entry.size:
            raise BundleError(
                f"{where / path}: damaged ({found[path]} bytes, {entry.size} in {layout.MANIFEST})", "size"
            )


def seal(folder: Path, stamp: str, facts: BundleFacts, created: str, forced: bool) -> str:
    """Sync all files and folders to disk, write the manifest, and return the id of the bundle."""
    listed = []
    for name, info in sorted(_walk(folder), key=lambda found: found[0]):
        if stat.S_IMODE(info.st_mode) != 0o644:
            if info.st_nlink > 1:  # hard links of a run, or of the user, keep their mode
                shutil.copyfile(folder / name, folder / f"{name}.tmp")
                os.replace(folder / f"{name}.tmp", folder / name)
            (folder / name).chmod(0o644)
        files.point("bundle.mode")
        files.sync(folder / name)
        files.point("bundle.file")
        listed.append(FileEntry(path=name, size=info.st_size, sha256=_sha256(folder / name)))
    for root, _, _ in os.walk(folder, topdown=False):
        Path(root).chmod(0o755)
        files.sync(Path(root))
        files.point("bundle.folder")
    return write_manifest(folder, stamp, facts, created, forced, listed)


def remove_bundle(folder: Path) -> bool:
    """Remove a bundle and return True, unless a reader has a lease on it."""
    removed = folder.with_name(f".tmp-{folder.name}")
    with ExitStack() as held:
        if locks.HAS_SHARED_LOCKS:
            with suppress(FileNotFoundError, IsADirectoryError):  # a folder without a manifest has no lease
                handle = os.open(folder / layout.MANIFEST, files.READ_WRITE)
                held.callback(os.close, handle)
                if not locks.try_lock(handle, folder):
                    return False
        shutil.rmtree(removed, ignore_errors=True)  # of a process that was killed here
        try:
            os.replace(folder, removed)  # an id never names half a bundle
        except PermissionError:
            if locks.HAS_SHARED_LOCKS:
                raise
            return False  # Windows: a reader has it open
    files.point("store.removed")
    files.sync(folder.parent)
    files.point("store.synced")
    shutil.rmtree(removed, ignore_errors=True)
    files.point("store.cleared")
    return True


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of each file below `folder`. Raises BundleError for links, sockets and devices."""

    def fail(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=fail):
        for name in [*folders, *names]:
            path = Path(root, name)
            info = path.lstat()
            if stat.S_ISREG(info.st_mode):
                yield path.relative_to(folder).as_posix(), info
            elif not stat.S_ISDIR(info.st_mode):
                raise BundleError(f"{path}: neither a regular file nor a folder (a link?)", "path")


def _is_plain(path: str) -> bool:
    """Return True for a normalised relative path within the folder."""
    parts = PurePosixPath(path).parts
    return path == "/".join(parts) and bool(parts) and ".." not in parts and not {"\\", "\0"} & set(path)


def _sha256(path: Path) -> str:
    info = path.lstat()
    seen = str(path), info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size
    # Two changes within one tick of the file system's clock look equal: digests of recent files are not cached.
    settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > 2_000_000_000
    return _sha256_of(*seen) if settled else _sha256_of.__wrapped__(*seen)


@functools.lru_cache(maxsize=4096)
def _sha256_of(path: str, *_: int) -> str:
    handle = os.open(path, files.READ_ONLY)
    with os.fdopen(handle, "rb", buffering=0) as f:  # a buffer would take a third of the digest's time
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_bundle_id(name: str) -> bool:
    """Return True for a well-formed id with any time."""
    return _ID.fullmatch(name) is not None


def stamp_of(name: str) -> str:
    """Return the time in an id, as text."""
    return name[:16]


def next_stamp(ids: Iterable[str]) -> str:
    """Return the present time, or a second after the latest of `ids` if that is later."""
    return max([datetime.now(UTC), *filter(None, map(_next_second, ids))]).strftime(_STAMP)


def stray_ids(ids: Iterable[str], served: Collection[str]) -> set[str]:
    """Return ids with an invalid time, or a future one that is not in `served`: folders put there by hand."""
    soon = datetime.now(UTC) + timedelta(days=1)
    times = {name: _next_second(name) for name in ids}
    return {name for name, time in times.items() if time is None or (time > soon and name not in served)}


def _next_second(name: str) -> datetime | None:
    """Return a second after the time of an id, None for an invalid time or the last possible one."""
    try:
        return datetime.strptime(stamp_of(name), _STAMP).replace(tzinfo=UTC) + timedelta(seconds=1)
    except (ValueError, OverflowError):
        return None
