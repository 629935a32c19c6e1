"""Folders that hold shards, on a disk or in a bucket, as `ShardedWork` reads and writes them.

A call on a disk holds a lock of the kernel, and files are renamed into its folder. In a bucket nobody holds a lock: a plan is written
only where none is, and an object of a shard only where none is, or in the place of one that stood there while the plan was still the
writer's, so what a lost host sends late replaces nothing of another plan.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from twotower import files
from twotower.errors import ConfigError, RunError
from twotower.files import locks
from twotower.files.object_stores import Content, ObjectClient, ObjectError
from twotower.files.readers import file_digest, read_json
from twotower.files.urls import Url, is_url

JsonObject: TypeAlias = dict[str, Any]
"""An object of parsed JSON."""
FileEntry: TypeAlias = tuple[str, int, str]
"""A file of a shard: name, size in bytes, and digest or tag, which another content would change."""

_MAX_JSON_BYTES = 1 << 28
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
    def names(self) -> list[str]:
        """Return the names of the files and folders in it, sorted; none of a folder that does not exist."""

    @abstractmethod
    def read(self, path: str) -> JsonObject | None:
        """Return an object of JSON, {} for any other value, None if the file is missing. Raises RunError for no JSON."""

    @abstractmethod
    def write(self, path: str, value: files.JsonData) -> None:
        """Replace a file of JSON. Raises RunError."""

    @abstractmethod
    def create(self, path: str, value: files.JsonData) -> None:
        """Write a file of JSON that is missing. Raises RunError if another process has just done so."""

    @abstractmethod
    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, if they exist."""

    @abstractmethod
    def clear(self, first: str, last: str) -> None:
        """Remove the files of shards and their records, after the file `first` and before the file `last`."""

    @abstractmethod
    def alone(self, work: str) -> AbstractContextManager[None]:
        """Create the folder, and hold its lock, if it has one, within the block. Raises LockHeld, OSError."""

    @abstractmethod
    def remove_leftovers(self, work: str) -> None:
        """Remove what a killed call has left half-made."""

    @abstractmethod
    def scratch(self, work: str, prefix: str) -> AbstractContextManager[str]:
        """Return a temporary folder on a disk, which is removed after the block; its name begins with `prefix`."""

    @abstractmethod
    def prepare(self, made: Path) -> str:
        """Make a file of `scratch` ready for `put`, and return its digest, if the folder keeps it."""

    @abstractmethod
    def put(self, made: Path, name: str, digest: str, check: Callable[[], None]) -> FileEntry:
        """Move a file into the folder, and return its entry. `check` raises if the folder is of another plan by now; what stands in the
        file's place is replaced only if it stood there before that check."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until the names of files are kept."""

    @abstractmethod
    def holds(self, name: str, size: int, digest: str) -> bool:
        """Return True if the folder has the file of an entry as it was written."""

    @abstractmethod
    def fetched(self, name: str, scratch: Path) -> Path:
        """Return the path of a file on a disk, to read it; `scratch` is for a copy."""

    @abstractmethod
    def failed(self, error: OSError) -> RunError:
        """Return the error for one of writing into it or into `scratch`."""


class DiskFolder(ShardFolder):
    """A folder on a disk, or on a file system that several hosts share."""

    def __init__(self, place: Path) -> None:
        self.place: Path = place

    def names(self) -> list[str]:
        if self.place.exists() and not self.place.is_dir():
            return [self.place.name]
        return sorted(p.name for p in self.place.iterdir()) if self.place.exists() else []

    def read(self, path: str) -> JsonObject | None:
        at = self.place / path
        if not at.exists():
            return None
        return found if isinstance(found := read_json(at), dict) else {}

    def write(self, path: str, value: files.JsonData) -> None:
        files.write_json(self.place / path, value)

    def create(self, path: str, value: files.JsonData) -> None:
        self.write(path, value)  # under the lock

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            (self.place / path).unlink(missing_ok=True)

    def clear(self, first: str, last: str) -> None:
        (self.place / first).unlink(missing_ok=True)
        for path in (*self.place.iterdir(), *(self.place / last).parent.glob("done-*")):
            if path.is_file():
                path.unlink()
        (self.place / last).unlink(missing_ok=True)

    @contextmanager
    def alone(self, work: str) -> Iterator[None]:
        (self.place / work).mkdir(parents=True, exist_ok=True)
        with locks.lock(self.place / work / "lock") as held:
            held.write_holder("call")
            yield

    def remove_leftovers(self, work: str) -> None:
        for path in (self.place / work).glob("shard-*"):
            shutil.rmtree(path)
        for path in (*self.place.glob(".*.tmp"), *(self.place / work).glob(".*.tmp")):
            path.unlink()

    def scratch(self, work: str, prefix: str) -> AbstractContextManager[str]:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=self.place / work, ignore_cleanup_errors=True)

    def prepare(self, made: Path) -> str:
        files.sync(made)
        return file_digest(made)

    def put(self, made: Path, name: str, digest: str, check: Callable[[], None]) -> FileEntry:
        size = made.stat().st_size
        os.replace(made, self.place / name)
        return name, size, digest

    def sync(self) -> None:
        files.sync(self.place)

    def holds(self, name: str, size: int, digest: str) -> bool:
        path = self.place / name
        return path.is_file() and path.stat().st_size == size and file_digest(path) == digest

    def fetched(self, name: str, scratch: Path) -> Path:
        return self.place / name

    def failed(self, error: OSError) -> RunError:
        no_locks = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        hint = "; choose a folder on a file system with locks" if no_locks else ""
        return RunError(f"{self.place}: cannot be written ({error.strerror or error}){hint}")


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
        return "/".join([*self.place.parts, path])

    def _paths(self) -> list[str]:
        depth = len(self.place.parts)
        paths = ("/".join(o.key.split("/")[depth:]) for o in self._client.list(self.place.key))
        return [path for path in paths if path and path[-1] != "/"]  # others mark folders, and hold nothing

    def names(self) -> list[str]:
        return sorted({path.partition("/")[0] for path in self._paths()})

    def read(self, path: str) -> JsonObject | None:
        content = self._client.read(self._key(path), _MAX_JSON_BYTES)
        if content.info is None:
            return None
        try:
            found = json.loads(content.data)
        except (ValueError, RecursionError) as e:
            raise RunError(f"{self.place / path}: not readable as JSON ({e})") from None
        return found if isinstance(found, dict) else {}

    def write(self, path: str, value: files.JsonData) -> None:
        self._client.write(self._key(path), _json(value))

    def create(self, path: str, value: files.JsonData) -> None:
        self._client.write(self._key(path), _json(value), Content())

    def remove(self, paths: Iterable[str]) -> None:
        self._client.delete([self._key(path) for path in paths])

    def clear(self, first: str, last: str) -> None:
        self.remove([first])
        self.remove([path for path in self._paths() if path != last])
        self.remove([last])

    def alone(self, work: str) -> AbstractContextManager[None]:
        return nullcontext()

    def remove_leftovers(self, work: str) -> None:
        """Leave objects of shards without a record: the shard that is made again replaces them."""

    def scratch(self, work: str, prefix: str) -> AbstractContextManager[str]:
        return tempfile.TemporaryDirectory(prefix=f"twotower-{prefix}", ignore_cleanup_errors=True)

    def prepare(self, made: Path) -> str:
        if (size := made.stat().st_size) > _MAX_OBJECT_BYTES:
            raise RunError(
                f"{self.place}: a file of a shard has {size:,} bytes, and an object at most {_MAX_OBJECT_BYTES:,}; choose smaller shards "
                "(`shard_rows`)"
            )
        return ""

    def put(self, made: Path, name: str, digest: str, check: Callable[[], None]) -> FileEntry:
        data, key, seen = made.read_bytes(), self._key(name), Content()
        for _ in range(PUTS - 1):
            try:
                return name, len(data), self._client.write(key, data, seen)
            except ObjectError as e:
                if e.cause != "changed":
                    raise
            # of a process that was lost before it recorded the shard, that makes the same, or of an earlier plan
            seen = Content(info=self._client.head(key))
            check()
        return name, len(data), self._client.write(key, data, seen)

    def sync(self) -> None:
        """Do nothing: an object that is written is kept."""

    def holds(self, name: str, size: int, digest: str) -> bool:
        found = self._client.head(self._key(name))
        return found is not None and (found.size, found.tag) == (size, digest)

    def fetched(self, name: str, scratch: Path) -> Path:
        info = self._client.head(self._key(name))
        with (scratch / f"copy-{name}").open("wb") as file:
            file.writelines(self._client.chunks(self._key(name), info.size if info else 0))
        return scratch / f"copy-{name}"

    def failed(self, error: OSError) -> RunError:
        return RunError(f"{tempfile.gettempdir()}: cannot be written ({error.strerror or error}); free some space")


def shard_folder(place: Path | str | Url) -> ShardFolder:
    """Return the folder at a path or URL. Raises ConfigError for a URL that cannot be written."""
    if isinstance(place, Url) or is_url(place):
        return BucketFolder(place if isinstance(place, Url) else Url.parse(place))
    return DiskFolder(Path(place))


def _json(value: files.JsonData) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
