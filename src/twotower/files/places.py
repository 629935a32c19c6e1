"""Files of a folder on a disk, or below a prefix of an object store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from twotower import files
from twotower.errors import RunError
from twotower.files.object_stores import ObjectClient
from twotower.files.readers import read_checked
from twotower.files.urls import Url

JsonObject: TypeAlias = dict[str, Any]
"""An object of parsed JSON."""
_MAX_BYTES = 1 << 34


def names(folder: Path | Url) -> list[str]:
    """Return the names in a folder, sorted, or the keys of all objects below a prefix, which may have slashes.

    A missing folder is empty. Raises RunError."""
    if isinstance(folder, Path):
        try:
            return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        except OSError as e:
            raise RunError(f"{folder}: cannot be read ({e.strerror})") from None
    depth = len(folder.parts)
    keys = ("/".join(found.key.split("/")[depth:]) for found in ObjectClient(folder).list(folder.key))
    return [key for key in keys if key and key[-1] != "/"]  # others mark folders


def read(at: Path | Url) -> bytes | None:
    """Return the content of a file, None if it is missing. Raises RunError."""
    if isinstance(at, Path):
        return read_checked(at, lambda path: path.read_bytes() if path.exists() else None)
    content = ObjectClient(at).read(at.key, _MAX_BYTES)
    return content.data if content.info else None


def read_json(at: Path | Url) -> JsonObject | None:
    """Return the object in a file of JSON, None if it is missing, {} for anything else. Raises RunError."""
    if (data := read(at)) is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write(at: Path | Url, data: bytes) -> None:
    """Write or replace a file in one step. Raises RunError."""
    if isinstance(at, Path):
        files.write(at, data)
    else:
        ObjectClient(at).write(at.key, data)


def remove(folder: Path | Url, listed: Iterable[str]) -> None:
    """Remove files of a folder, if they exist. Raises OSError, ObjectError."""
    if isinstance(folder, Url):
        ObjectClient(folder).delete([(folder / name).key for name in listed])
    else:
        for name in listed:
            files.remove(folder / name)
