"""Protocol of the place of a store: its files, and who may change them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from twotower.files.urls import Url
from twotower.store.bundle import Bundle
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
        """Return what CURRENT says, an empty string if there is none."""

    @abstractmethod
    def stamp(self, serving: str) -> tuple[str, int | str]:
        """Return what CURRENT says, and a mark that changes with each change of it. A server says which bundle it is `serving`."""

    @abstractmethod
    def touch(self) -> None:
        """Change the mark of CURRENT, so that readers load again."""

    @abstractmethod
    def lines(self) -> list[JsonObject]:
        """Return the lines of the history, the oldest first."""

    @abstractmethod
    def open(self, name: str) -> Bundle:
        """Return a bundle on the disk, verified."""

    @abstractmethod
    def glance(self, name: str) -> Manifest:
        """Return the manifest of a bundle, whose files are compared by name and size."""

    @abstractmethod
    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a bundle."""

    @abstractmethod
    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a file by its path within the store, empty if it is missing."""

    @abstractmethod
    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Replace a file of the store by what `change`, which may be called again, makes of it."""

    def is_published_to(self) -> bool:
        """Return True if a process may be publishing while the caller changes the store, and use what no bundle names yet."""
        return False

    @abstractmethod
    def changing(self, action: str) -> AbstractContextManager[Change]:
        """Change the store within the block, after recovery from killed processes."""


class Change(ABC):
    """A change of a store. Of two at once, one is refused."""

    stamp: str
    """Time of the next id."""
    old: str
    """The bundle that was current when the change began."""

    @abstractmethod
    def stage(self) -> Path:
        """Return a new folder for the files of a new bundle."""

    @abstractmethod
    def complete(self, folder: Path, name: str) -> Bundle:
        """Give a sealed folder the name of its bundle, and return it, verified."""

    @abstractmethod
    def store(self, bundle: Bundle) -> None:
        """Put the files of a new bundle where all readers find them."""

    @abstractmethod
    def hold(self, name: str) -> None:
        """Keep a bundle from being removed until the change ends."""

    @abstractmethod
    def make_current(self, name: str, line: JsonObject) -> None:
        """Make a bundle current; `line` is about to be in the history."""

    @abstractmethod
    def discard(self) -> None:
        """Remove the files of a new bundle, unless it may be current."""

    @abstractmethod
    def log(self, line: JsonObject) -> None:
        """Add a line to the history, unless it has it."""

    @abstractmethod
    def remove(self, name: str) -> bool:
        """Remove a bundle and return True, unless a reader has a lease on it."""

    @property
    def is_unsure(self) -> bool:
        """True while it is unknown if the new bundle is current."""
        return False
