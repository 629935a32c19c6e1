"""Zip archives on the network: download with a checksum, and reading without harm."""

from __future__ import annotations

import hashlib
import http.client
import io
import logging
import struct
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from twotower import files
from twotower.errors import DataError, RunError

log = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 200_000_000  # the largest real member is 25 MB


@dataclass(frozen=True)
class Archive:
    """Address, size and digest of an official archive."""

    url: str
    size: int
    sha256: str


def cache_path(archive: Archive) -> Path:
    """Return the path of the verified download in the user's cache."""
    return files.cache_folder() / f"{archive.sha256[:16]}.zip"


def download(archive: Archive, timeout: float) -> bytes:
    """Return the bytes of an archive, with size and SHA-256 checked, and keep them in the user's cache."""
    kept = cache_path(archive)
    if kept.is_file():
        data = kept.read_bytes()
        if hashlib.sha256(data).hexdigest() == archive.sha256:
            log.info(f"using {kept}, downloaded from {archive.url} before")
            return data
    log.info(f"downloading {archive.url} ({archive.size / 1e6:.1f} MB)")
    request = urllib.request.Request(archive.url, headers={"User-Agent": "twotower"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            data = bytes(reply.read(archive.size + 1))
    except (OSError, http.client.HTTPException) as e:
        if isinstance(e, urllib.error.HTTPError):
            e.close()
        reason = str(getattr(e, "reason", e)).strip() or type(e).__name__
        raise DataError(f"cannot reach {archive.url} ({reason.splitlines()[0]})") from None
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != archive.size or digest != archive.sha256:
        raise DataError(
            f"{archive.url}: got {len(data)} bytes with SHA-256 {digest[:12]}…, expected {archive.size} with "
            f"{archive.sha256[:12]}…"
        )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write(kept, data)
    except (OSError, RunError):
        log.info(f"{kept} cannot be written; the next command will download again")
    return data


# Errors of zipfile for damaged archives; RuntimeError also for encryption and unknown compression.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)


def open_zip(data: bytes, what: str, max_member_bytes: int = MAX_MEMBER_BYTES) -> zipfile.ZipFile:
    """Open an archive, whose members are read into memory and never written as files. Raises DataError for damage, and
    for a member that is too large."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _DAMAGE as e:
        raise DataError(f"{what}: not a complete zip archive ({e}); fetch it again") from None
    for entry in archive.infolist():
        if entry.file_size > max_member_bytes:
            raise DataError(f"{what}: entry '{entry.filename}' unpacks to {entry.file_size} bytes; refused")
    return archive


def read_member(archive: zipfile.ZipFile, name: str, what: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise DataError(f"{what}: no entry '{name}' (found: {', '.join(archive.namelist()[:5])}, …)") from None
    except _DAMAGE as e:
        raise DataError(f"{what}: entry '{name}' is damaged ({e}); fetch the archive again") from None
