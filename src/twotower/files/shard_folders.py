"""Folders that hold shards, on a disk or in a bucket, as `ShardedWork` reads and writes them.

A call on a disk holds a lock of the kernel, and files are renamed into its folder. In a bucket nobody holds a lock: a plan is written
only where none is, and an object of a shard only where none is, or in the place of one that stood there while the plan was still the
writer's, so what a lost host sends late replaces nothing of another plan.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

from twotower import files
from twotower.errors import ConfigError, RunError
from twotower.files import locks
from twotower.files.object_stores import Content, ObjectClient, ObjectError
from twotower.files.readers import file_digest, read_checked
from twotower.files.urls import Url, is_url

FileEntry: TypeAlias = tuple[str, int, str]
"""A file of a shard: name, size in bytes, and digest or tag, which another content would change."""

_MAX_READ_BYTES = 1 << 28
PUTS = 5
"""Times that a file is put into a bucket, if other processes put theirs at the same time."""
_MAX_OBJECT_BYTES = 5 * 1000**3
"""Greatest size of an object that is written as a whole."""


class ShardFolder(ABC):
    """A folder of shards, with a folder for the work within. Paths are relative to it."""

    place: Path | Url

    def __str__(self) -> str:
        return str(self.place)

    @abstractmethod
    def paths(self) -> list[str]:
        """Return the paths of the files in it and in its folders, sorted; none of a folder that does not exist."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, None if it is missing. Raises RunError."""

    @abstractmethod
    def write(self, path: str, data: bytes, is_new: bool = False) -> None:
        """Replace a small file, or with `is_new` write one that is missing. Raises RunError, also if another process has just done so."""

    @abstractmethod
    def remove(self, paths: Iterable[str]) -> None:
        """Remove files and folders, if they exist."""

    @abstractmethod
    def put(self, made: Path, name: str, check: Callable[[], None]) -> FileEntry:
        """Move a file of `scratch` into the folder, and return its entry. `check` raises if the folder is of another plan by now; what
        stands in the file's place is replaced only if it stood there before that check."""

    @abstractmethod
    def entry(self, name: str) -> FileEntry | None:
        """Return the entry of a file as it is, None if it is missing."""

    @abstractmethod
    def alone(self, work: str) -> AbstractContextManager[None]:
        """Create the folder `work`, and hold its lock, if there is one, within the block. Raises LockHeld, OSError."""

    @abstractmethod
    def scratch(self, work: str) -> Path:
        """Return the folder on a disk for temporary files."""


class DiskFolder(ShardFolder):
    """A folder on a disk, or on a file system that several hosts share."""

    def __init__(self, place: Path) -> None:
        self.place: Path = place

    def paths(self) -> list[str]:
        if not self.place.is_dir():
            return []
        return sorted(p.relative_to(self.place).as_posix() for p in (*self.place.iterdir(), *self.place.glob("*/*")))

    def read(self, path: str) -> bytes | None:
        at = self.place / path
        return read_checked(at, Path.read_bytes) if at.exists() else None

    def write(self, path: str, data: bytes, is_new: bool = False) -> None:
        files.write(self.place / path, data)  # under the lock

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            files.remove(self.place / path)

    def put(self, made: Path, name: str, check: Callable[[], None]) -> FileEntry:
        files.sync(made)
        entry = name, made.stat().st_size, file_digest(made)
        check()
        os.replace(made, self.place / name)
        files.sync(self.place)
        return entry

    def entry(self, name: str) -> FileEntry | None:
        path = self.place / name
        return (name, path.stat().st_size, file_digest(path)) if path.is_file() else None

    @contextmanager
    def alone(self, work: str) -> Iterator[None]:
        (self.place / work).mkdir(parents=True, exist_ok=True)
        with locks.lock(self.place / work / "lock") as held:
            held.write_holder("call")
            yield

    def scratch(self, work: str) -> Path:
        return self.place / work


class BucketFolder(ShardFolder):
    """A prefix in an object store. Shards are made on the disk of each process."""

    def __init__(self, place: Url) -> None:
        """Raises ConfigError for an HTTP server, which cannot be written."""
        if not place.is_object_store:
            raise ConfigError(
                f"{place}: a server of {place.scheme}:// cannot be written; name a folder, or an object store, such as s3://BUCKET/FOLDER"
            )
        self.place: Url = place

    @property
    def _client(self) -> ObjectClient:
        return ObjectClient(self.place)

    def _key(self, path: str) -> str:
        return (self.place / path).key

    def paths(self) -> list[str]:
        depth = len(self.place.parts)
        paths = ("/".join(o.key.split("/")[depth:]) for o in self._client.list(self.place.key))
        return [path for path in paths if path and path[-1] != "/"]  # others mark folders, and hold nothing

    def read(self, path: str) -> bytes | None:
        content = self._client.read(self._key(path), _MAX_READ_BYTES)
        return content.data if content.info else None

    def write(self, path: str, data: bytes, is_new: bool = False) -> None:
        self._client.write(self._key(path), data, Content() if is_new else None)

    def remove(self, paths: Iterable[str]) -> None:
        self._client.delete([self._key(path) for path in paths])

    def put(self, made: Path, name: str, check: Callable[[], None]) -> FileEntry:
        if (size := made.stat().st_size) > _MAX_OBJECT_BYTES:
            raise RunError(
                f"{self}: a file of a shard has {size:,} bytes, and an object at most {_MAX_OBJECT_BYTES:,}; choose smaller shards "
                "(`shard_rows`)"
            )
        data, key, seen, puts = made.read_bytes(), self._key(name), Content(), 0
        while True:
            check()
            try:
                return name, size, self._client.write(key, data, seen)
            except ObjectError as e:
                puts += 1
                if e.cause != "changed" or puts == PUTS:
                    raise
            # of a process that was lost before it recorded the shard, that makes the same, or of an earlier plan
            seen = Content(info=self._client.head(key))

    def entry(self, name: str) -> FileEntry | None:
        found = self._client.head(self._key(name))
        return (name, found.size, found.tag) if found else None

    def alone(self, work: str) -> AbstractContextManager[None]:
        return nullcontext()

    def scratch(self, work: str) -> Path:
        return Path(tempfile.gettempdir())


def shard_folder(place: Path | str | Url) -> ShardFolder:
    """Return the folder at a path or URL. Raises ConfigError for a URL that cannot be written."""
    if isinstance(place, Url) or is_url(place):
        return BucketFolder(place if isinstance(place, Url) else Url.parse(place))
    return DiskFolder(Path(place))
