"""Protocol of the place of a store: reads of its files, and a change by one process at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from twotower.files import layout
from twotower.files.urls import Url
from twotower.store.bundle import Bundle, next_stamp, stray_ids
from twotower.store.history import MAX_HISTORY_BYTES, current_ids, new_line, read_lines, with_line
from twotower.store.manifest import JsonObject, Manifest


class StorePlace(ABC):
    """Files of a store: bundles, CURRENT, HISTORY.jsonl. Errors are of type BundleError."""

    path: Path | Url

    @abstractmethod
    def exists(self) -> bool:
        """Return True if there is a store."""

    @abstractmethod
    def create(self) -> None:
        """Make a store in a new or empty place. Raises BundleError for any other."""

    @abstractmethod
    def ids(self) -> list[str]:
        """Return the ids of all bundles, ascending."""

    @abstractmethod
    def current(self) -> str:
        """Return the id in CURRENT, an empty string if the file is missing."""

    @abstractmethod
    def stamp(self, serving: str) -> tuple[str, int | str]:
        """Return the id in CURRENT, and a mark that changes with each change of the file.

        `serving` is the bundle that the caller serves, which `gc` then keeps; empty: none."""

    @abstractmethod
    def touch(self) -> None:
        """Change the mark of CURRENT, so that readers load again."""

    def lines(self) -> list[JsonObject]:
        """Return the lines of the history, the oldest first."""
        return read_lines(self.read(layout.HISTORY, MAX_HISTORY_BYTES), self.path / layout.HISTORY)

    def log(self, line: JsonObject) -> None:
        """Add a line to the history, within a change. Raises RunError."""
        self.edit(layout.HISTORY, lambda data: with_line(data, line))

    def log_recovery(self, lines: list[JsonObject], current: str, died: str = "") -> None:
        """Log that a process died, or that CURRENT is not the last of the history, if it is so."""
        logged = ["", *current_ids(lines)][-1]
        if died or logged != current:
            reason = died or "CURRENT was changed without an entry in HISTORY.jsonl"
            self.log(new_line("recover", current, logged, reason))

    def next_stamp(self, lines: list[JsonObject], current: str) -> str:
        """Return the time of the next id: the present, or later than all bundles, without strays."""
        ids, served = self.ids(), {current, *current_ids(lines)}
        return next_stamp({*ids, *served} - stray_ids(ids, served))

    @abstractmethod
    def open(self, name: str) -> Bundle:
        """Return a verified bundle on the local disk."""

    @abstractmethod
    def glance(self, name: str) -> Manifest:
        """Return the manifest of a bundle after comparing its files by name and size."""

    @abstractmethod
    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a bundle."""

    @abstractmethod
    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a file by its path within the store, empty if it is missing."""

    @abstractmethod
    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Replace the content of a file by the result of `change`, which may be called several times."""

    def is_published_to(self) -> bool:
        """Return True if another process may publish meanwhile, and use a collection that no bundle names yet."""
        return False

    @abstractmethod
    def changing(self, action: str) -> AbstractContextManager[Change]:
        """Change the store within the block, after recovery from killed processes."""


class Change(ABC):
    """A change of a store. Of two changes at once, one is refused."""

    stamp: str
    """Time of the next id."""
    old: str
    """The bundle that was current when the change began."""
    is_unsure = False
    """True while it is unknown if the new bundle is current."""

    @abstractmethod
    def stage(self) -> Path:
        """Return a new folder for the files of a new bundle."""

    @abstractmethod
    def complete(self, folder: Path, name: str) -> Bundle:
        """Give a sealed folder the name of its bundle, and return the verified bundle."""

    def store(self, bundle: Bundle) -> None:  # noqa: B027
        """Publish the files of a new bundle to all readers, if `complete` has not."""

    def hold(self, name: str) -> None:  # noqa: B027
        """Keep a bundle from being removed until the change ends, if no lock does."""

    @abstractmethod
    def make_current(self, name: str, line: JsonObject) -> None:
        """Make a bundle current. `line` is the line that the history gets next."""

    @abstractmethod
    def discard(self) -> None:
        """Remove the files of a new bundle, unless it may be current."""

    @abstractmethod
    def remove(self, name: str) -> bool:
        """Remove a bundle and return True, unless a reader has a lease on it."""
