"""CURRENT: the file that names the served bundle, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path

from twotower import files
from twotower.errors import BundleError
from twotower.files import layout
from twotower.files.readers import read_regular

_MAX_BYTES = 1000


class CurrentPointer:
    """The id of the current bundle of a store."""

    def __init__(self, store: Path) -> None:
        self._path = store / layout.CURRENT

    def read(self) -> str:
        """Return the content of CURRENT, an empty string if the file does not exist. Raises BundleError."""
        return read_store_file(self._path, _MAX_BYTES).decode(errors="replace").strip()

    def write(self, name: str) -> None:
        """Make a bundle current. Raises RunError."""
        files.write(self._path, f"{name}\n", 0o644)

    def stamp(self) -> tuple[str, int]:
        """Return the content and the modification time (ns), to detect changes. Raises BundleError."""
        name = self.read()
        try:
            return name, self._path.stat().st_mtime_ns
        except OSError:
            return name, 0

    def touch(self) -> None:
        """Update the modification time, so that readers load again. Raises BundleError if no bundle is current."""
        try:
            os.utime(self._path)
        except OSError as e:
            raise BundleError(f"{self._path}: cannot be touched ({e.strerror})", "unreadable") from e


def read_store_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file of a store, empty if it does not exist.

    Raises BundleError for a file that is irregular, larger than `max_bytes`, or unreadable."""
    try:
        return read_regular(path, max_bytes)
    except FileNotFoundError:
        return b""
    except OSError as e:
        raise BundleError(f"{path}: cannot be read ({e.strerror}); restore it, or move it away", "unreadable") from e
