"""A published model: an immutable folder with a manifest of its files.

MANIFEST.json    facts about the model, and path, size and SHA-256 of all other files; its digest is part of the folder's name

The module does not depend on the content of the files. A bundle is verified as a whole before a file of it is parsed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from twotower import files
from twotower.errors import RunError

MANIFEST = "MANIFEST.json"
SCHEMA_VERSIONS = (4,)
"""Versions of the manifest that can be read; the last is written."""
MANIFEST_FIELDS: dict[str, type] = {
    "bundle": str, "created": str, "versions": dict, "dims": int, "metric": str, "counts": dict, "schema": dict,
    "split": dict, "similarity": str, "bias": bool, "schema_hash": str,
    "vocab_hash": str, "recall_check": dict, "forced": bool, "files": list,
}  # fmt: skip

_MANIFEST_MAX_BYTES = 16 << 20


class BundleError(RunError):
    """A store or bundle is unusable.

    `reason` labels counters: store, locked, write, recall, probe, current, missing, unreadable, manifest,
    schema_version, path, unlisted, size, checksum, mismatch, tower.
    """

    def __init__(self, message: str, reason: str = "bundle") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: folder and manifest."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str, *, checksums: bool = True) -> Bundle:
        """Verify a bundle before a file of it is parsed. Raises BundleError.

        `checksums=False` compares names and sizes only, which suffices for lists.
        """
        folder = Path(folder).absolute()
        try:
            bundle = cls(folder, _read_manifest(folder))
            bundle._verify(checksums)
        except OSError as e:
            reason = "missing" if isinstance(e, FileNotFoundError) else "unreadable"
            raise BundleError(f"{e.filename or folder}: cannot be read ({e.strerror})", reason) from e
        return bundle

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def size(self) -> int:
        """Size of all files. Bytes."""
        return sum(entry["size"] for entry in self.manifest["files"])

    def check_consistency(self, sources: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise BundleError if two files, or a file and the manifest, differ in the value of a field.

        `sources` maps files to the fields that they hold: `{"config.toml": {"dims": 64}, "index": {"dims": 64, "items": 3706}}`.
        """
        seen: dict[str, tuple[str, Any]] = {}
        for source, facts in {MANIFEST: self.manifest | self.manifest["counts"], **sources}.items():
            for field, value in facts.items():
                first, expected = seen.setdefault(field, (source, value))
                if value != expected:
                    raise BundleError(
                        f"{self.folder}: {field} is {expected!r} in {first}, {value!r} in {source}", "mismatch"
                    )

    @contextmanager
    def lease(self) -> Iterator[Bundle]:
        """Keep `gc` of all processes from removing the bundle within the block. Raises BundleError if it is removed."""
        with ExitStack() as held:
            try:
                handle = os.open(self.folder / MANIFEST, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                held.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                # If it was removed between open and lock, stat raises.
                (self.folder / MANIFEST).stat()
            except OSError as e:
                removed = isinstance(e, FileNotFoundError | BlockingIOError)
                what = "it was removed" if removed else e.strerror
                raise BundleError(f"{self.folder}: no lease ({what})", "missing" if removed else "unreadable") from e
            yield self

    def _verify(self, checksums: bool) -> None:
        listed: dict[str, dict[str, Any]] = {}
        for entry in self.manifest["files"]:
            fields = [type(entry.get(n)) for n in ("path", "size", "sha256")] if isinstance(entry, dict) else None
            if fields != [str, int, str]:
                raise BundleError(
                    f"{self.folder}: {MANIFEST}: files: {entry!r}, expected path, size and sha256", "manifest"
                )
            if not _is_plain(entry["path"]) or entry["path"] == MANIFEST or entry["path"] in listed:
                raise BundleError(f"{self.folder}: {MANIFEST}: files: path {entry['path']!r} is not allowed", "path")
            listed[entry["path"]] = entry
        found = dict(_walk(self.folder))
        found.pop(MANIFEST, None)
        if missing := sorted(listed.keys() - found.keys()):
            raise BundleError(f"{self.folder / missing[0]}: missing", "missing")
        if unlisted := sorted(found.keys() - listed.keys()):
            raise BundleError(f"{self.folder / unlisted[0]}: not listed in {MANIFEST}", "unlisted")
        for path, entry in listed.items():
            if found[path].st_size != entry["size"]:
                sizes = f"{found[path].st_size} bytes, {entry['size']} in {MANIFEST}"
                raise BundleError(f"{self.folder / path}: damaged ({sizes})", "size")
        for path, entry in listed.items() if checksums else ():
            if _sha256(self.folder / path) != entry["sha256"]:
                raise BundleError(f"{self.folder / path}: damaged, or of another bundle (checksum)", "checksum")


def seal(folder: Path, stamp: str, facts: dict[str, Any]) -> str:
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
        listed.append({"path": name, "size": info.st_size, "sha256": _sha256(folder / name)})
    for root, _, _ in os.walk(folder, topdown=False):
        Path(root).chmod(0o755)
        files.sync(Path(root))
        files.point("bundle.folder")
    manifest = {"schema_version": SCHEMA_VERSIONS[-1], "bundle": ""} | facts | {"files": listed}
    manifest["bundle"] = name = f"{stamp}-{_digest(manifest)}"
    files.write_json(folder / MANIFEST, manifest, 0o644)
    return name


def _digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "bundle"}
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:6]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, with fields of the expected types. Raises BundleError, OSError."""
    if folder.is_symlink():
        raise BundleError(f"{folder}: a symbolic link, not a bundle", "path")
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle", "missing")
    path = folder / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise BundleError(f"{folder}: {MANIFEST} is missing: not a bundle, or an incomplete one", "manifest")
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{path}: not a regular file", "path")
    if info.st_size > _MANIFEST_MAX_BYTES:
        raise BundleError(f"{path}: {info.st_size} bytes, expected at most {_MANIFEST_MAX_BYTES}", "manifest")
    try:
        manifest = parse_json(files.read_regular(path, _MANIFEST_MAX_BYTES))
        json.dumps(manifest, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path}: not JSON ({e})", "manifest") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: not a JSON object", "manifest")
    version = manifest.get("schema_version")
    if type(version) is not int or version not in SCHEMA_VERSIONS:
        known = ", ".join(map(str, SCHEMA_VERSIONS))
        raise BundleError(
            f"{path}: schema_version is {version!r}, this version reads {known}; publish the run with this version",
            "schema_version",
        )
    for name, kind in MANIFEST_FIELDS.items():
        if type(manifest.get(name)) is not kind:
            what = f"is {manifest[name]!r:.80}, expected {kind.__name__}" if name in manifest else "is missing"
            raise BundleError(f"{path}: {name} {what}", "manifest")
    if error := _invalid_value(manifest):
        raise BundleError(f"{path}: {error}", "manifest")
    if manifest["bundle"] != folder.name:
        raise BundleError(f"{path}: of another bundle ({manifest['bundle']!r:.80})", "mismatch")
    if folder.name[-6:] != _digest(manifest):
        raise BundleError(f"{path}: damaged or edited (its digest is not that of the id)", "checksum")
    return manifest


def _invalid_value(manifest: dict[str, Any]) -> str:
    """Name the first unusable value within a field; an empty string if there is none."""
    recall_check, counts = manifest["recall_check"], manifest["counts"]
    for name in ("recall", "threshold"):
        if type(recall_check.get(name)) not in (int, float) or not math.isfinite(recall_check[name]):
            return f"recall_check.{name} is {recall_check.get(name)!r:.80}, expected a number"
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            return f"counts.{name} is {count!r:.80}, expected a number"
    if not isinstance(manifest.get("index", {}), dict):
        return f"index is {manifest['index']!r:.80}, expected dict"
    return ""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON with finite numbers of up to 19 digits. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _parse_int(text: str) -> int:
    if len(text) > 19:  # more than a JSON reply can hold
        raise ValueError(f"{text:.19}… has more than 19 digits")
    return int(text)


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
    # Two changes within one tick of the file system's clock look equal, so digests of recent files are not cached.
    settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > 2_000_000_000
    return _sha256_of(*seen) if settled else _sha256_of.__wrapped__(*seen)


@functools.lru_cache(maxsize=4096)
def _sha256_of(path: str, *_: int) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb", buffering=0) as f:  # copies of a buffer would take a third of the digest's time
        return hashlib.file_digest(f, "sha256").hexdigest()
