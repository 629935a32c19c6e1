"""Folders of shards: written by processes that share one file system, and continued by a later call.

WORK/plan.json          what the shards are made of: another call of the same plan goes on
WORK/done-00000.json    record of a finished shard, written after its files
WORK/shard-00000/       temporary files of a shard in progress
WORK/lock               kernel locks: each shard has one byte

The format gives the name of WORK. A list of all shards is written when the last is finished. Kernel locks are released when a process dies.
A system that shares no locks (Windows) has one lock of the whole file: one process at a time works there.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, TypeAlias

from twotower import files
from twotower.errors import RunError
from twotower.files import locks
from twotower.files.readers import file_digest, read_json

if locks.HAS_SHARED_LOCKS:
    import fcntl

log = logging.getLogger(__name__)

JsonObject: TypeAlias = dict[str, Any]
"""An object of parsed JSON."""

HOW_TO_OVERWRITE = "choose another folder, or start over with `overwrite=True`"
_FOLDER_BYTE, _USERS_BYTE, _FIRST_SHARD_BYTE = 0, 1, 2
"""Bytes of the lock file: of the plan and the list; locked, shared, by all processes in the folder; of the first shard."""


@dataclass(frozen=True)
class ShardFormat:
    """Files of one kind of sharded folder, and the words of its messages."""

    version: int
    noun: str
    """Content in plural: "vectors"."""
    work_folder: str
    """Name of the folder of plan, records, temporary files and locks."""
    list_file: str
    """Name of the list of all shards."""
    shard_files: re.Pattern[str]
    """Names of the files of shards."""
    differences: Mapping[str, str]
    """Key of a plan -> words for another value of it: "of another model"."""
    other_files: frozenset[str] = frozenset()
    """Names of further files that such a folder may hold."""


class ShardedWork:
    """The work of one process in a folder of shards, within the block of `begin`. A subclass has a `format`."""

    format: ClassVar[ShardFormat]

    def __init__(self, out: Path, lock: BinaryIO, plan: JsonObject, shards: int) -> None:
        self.out, self.folder, self.plan, self.shards = out, self.work_folder(out), plan, shards
        self.complete = (out / self.format.list_file).exists()
        self._lock = lock

    @classmethod
    def work_folder(cls, out: Path) -> Path:
        """Return the folder of plan, records, temporary files and locks."""
        return out / cls.format.work_folder

    @classmethod
    @contextmanager
    def begin(cls, out: Path, plan: JsonObject, shards: int, overwrite: bool) -> Iterator[Self]:
        """Start or continue the work that `plan` describes; its `table` are the states of the files of a table.

        Raises RunError if the folder holds other files, or shards of another plan. With `overwrite` these are removed, unless
        a process is still writing them."""
        cls.check_folder(out)
        plan = {"format": cls.format.version} | plan
        work = cls.work_folder(out)
        try:
            work.mkdir(parents=True, exist_ok=True)
            with cls._opened_lock(out) as lock:
                with _locked(lock, _FOLDER_BYTE):
                    alone = _try_lock(lock, _USERS_BYTE)
                    if alone:  # incomplete files are of killed processes
                        _remove_leftovers(out, work)
                    if why := cls._difference(out, plan):
                        if not overwrite:
                            raise RunError(f"{out}: {why}; {HOW_TO_OVERWRITE}")
                        if not alone:
                            raise RunError(f"{out}: {why}, and another call is writing them; let it end, or stop it")
                        cls._clear(out)
                    if not (work / "plan.json").exists():
                        files.write_json(work / "plan.json", plan)
                    if locks.HAS_SHARED_LOCKS:
                        fcntl.lockf(lock, fcntl.LOCK_SH, 1, _USERS_BYTE)
                yield cls(out, lock, plan, shards)
        except OSError as e:
            no_locks = e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
            hint = "; choose a folder on a file system with locks" if no_locks else ""
            raise RunError(f"{out}: cannot be written ({e.strerror or e}){hint}") from e

    @classmethod
    def check_folder(cls, out: Path) -> None:
        """Raise RunError unless `out` is new, empty, or holds shards and no other files."""
        if not out.exists():
            return
        known = {*cls.format.other_files, cls.format.list_file, cls.format.work_folder}
        names = sorted(p.name for p in out.iterdir()) if out.is_dir() else [out.name]
        ours = re.compile(rf"{cls.format.shard_files.pattern}|\.{re.escape(cls.format.list_file)}\.\d+\.tmp")
        foreign = [n for n in names if not (out.is_dir() and (n in known or ours.fullmatch(n)))]
        if foreign:
            raise RunError(f"{out}: not a folder of {cls.format.noun} (it holds {foreign[0]}); choose another folder")

    @classmethod
    def clear_folder(cls, out: Path) -> None:
        """Remove all shards of a folder. Raises RunError if it holds other files, or a process is writing shards."""
        cls.check_folder(out)
        with cls._opened_lock(out) as lock, _locked(lock, _FOLDER_BYTE):
            if not _try_lock(lock, _USERS_BYTE):
                raise RunError(f"{out}: another call is writing into it; let it end, or stop it")
            cls._clear(out)
            shutil.rmtree(cls.work_folder(out), ignore_errors=not locks.HAS_SHARED_LOCKS)  # Windows keeps the open lock

    @classmethod
    @contextmanager
    def _opened_lock(cls, out: Path) -> Iterator[BinaryIO]:
        """Yield the open lock file. Raises RunError if the system locks it as a whole, and another process works there."""
        path = cls.work_folder(out) / "lock"
        with path.open("a+b") as lock:
            if not locks.HAS_SHARED_LOCKS and not locks.try_lock(lock.fileno(), path):
                raise RunError(
                    f"{out}: another call is writing into it, and here one at a time can; let it end, or stop it"
                )
            yield lock

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Yield True with the shard locked until the block ends, False if another process holds it."""
        if not _try_lock(self._lock, _FIRST_SHARD_BYTE + number):
            yield False
            return
        try:
            yield True
        finally:
            _unlock(self._lock, _FIRST_SHARD_BYTE + number)

    def record(self, number: int) -> JsonObject | None:
        """Return the record of a finished shard, None without one."""
        try:
            found = read_json(self._record(number))
        except RunError:
            return None
        return found if isinstance(found, dict) else None

    def records(self) -> list[JsonObject]:
        """Return the records of the finished shards, in their order."""
        return [record for number in range(self.shards) if (record := self.record(number))]

    def is_intact(self, number: int) -> bool:
        """Return True if the files of a finished shard have the sizes and digests of its record."""
        record = self.record(number)
        return record is not None and all(
            (path := self.out / name).is_file() and path.stat().st_size == size and file_digest(path) == digest
            for name, size, digest in record.get("files", [["", 0, ""]])
        )

    def discard(self, number: int) -> None:
        """Remove the record of a finished shard, so that it is made again."""
        with self.locked():
            (self.out / self.format.list_file).unlink(missing_ok=True)
            self._record(number).unlink(missing_ok=True)

    @contextmanager
    def unfinished(self, number: int, verify: bool) -> Iterator[Path | None]:
        """Yield a temporary folder for the files of a shard, with the shard locked until the block ends; None if the shard is
        finished, or another process makes it. With `verify`, a finished shard whose files are damaged is made again."""
        with self.claimed(number) as is_claimed:
            if is_claimed and self.record(number) and verify and not self.is_intact(number):
                log.info(f"shard {number + 1} is damaged, it is made again")
                self.discard(number)
            if not is_claimed or self.record(number):
                yield None
                return
            with self.temporary_folder(number) as folder:
                yield folder

    @contextmanager
    def temporary_folder(self, number: int) -> Iterator[Path]:
        """Yield a folder for the files of a shard, which is removed after the block."""
        folder = self.folder / f"shard-{number:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish_files(self, number: int, folder: Path, names: Mapping[str, str], facts: JsonObject) -> None:
        """Move files of a shard, by their names in `folder`, to their names in the result, and write its record: `facts`, and the
        names, sizes and digests of the files."""
        written: list[files.JsonData] = []
        for made, name in names.items():
            files.sync(folder / made)
            written.append([name, (folder / made).stat().st_size, file_digest(folder / made)])
            files.point("shard.file")
            os.replace(folder / made, self.out / name)
        files.point("shard.files")
        files.sync(self.out)
        self.write_record(number, facts | {"files": written})

    def write_record(self, number: int, record: JsonObject) -> None:
        """Replace the record of a shard."""
        files.write_json(self._record(number), record)

    def write_list(self, content: JsonObject) -> bool:
        """Write the list of shards, and return True unless it is so already. Call it within `locked`."""
        path = self.out / self.format.list_file
        if path.exists() and read_json(path) == content:
            return False
        files.write_json(path, content)
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the plan and the list within the block."""
        with _locked(self._lock, _FOLDER_BYTE):
            yield

    def _record(self, number: int) -> Path:
        return self.folder / f"done-{number:05d}.json"

    @classmethod
    def _difference(cls, out: Path, plan: JsonObject) -> str:
        """Return the difference between `plan` and that of the folder `out`, as words; an empty string if both agree."""
        path, noun = cls.work_folder(out) / "plan.json", cls.format.noun
        if not path.exists():
            work = cls.format.work_folder
            present = [p.name for p in out.iterdir() if p.name != work and not p.name.startswith(".")]
            return f"holds other {noun} ({min(present)})" if present else ""
        try:
            then = read_json(path)
        except RunError as e:
            return str(e)
        if not isinstance(then, dict) or then.get("format") != cls.format.version:
            return f"its {noun} were made by another version"
        for key, words in cls.format.differences.items():
            if then.get(key) != plan.get(key):
                return f"its {noun} are {words} ({_shown(then.get(key))} then, {_shown(plan.get(key))} now)"
        before, now = ({s[0]: s[1:] for s in p["table"]} for p in (then, plan))
        for name in sorted({*before, *now}):
            if name not in before or name not in now:
                return f"its {noun} are of another table ({name} is {'new' if name in now else 'missing'})"
            if before[name] != now[name]:
                labels = ("size", "time of change", "rows")
                what = next(w for w, a, b in zip(labels, before[name], now[name], strict=True) if a != b)
                return f"its {noun} are of another table ({name} has another {'number of rows' if what == 'rows' else what})"
        return ""

    @classmethod
    def _clear(cls, out: Path) -> None:
        """Remove the shards of a folder, the plan last: after a kill in between the other files are still recognised."""
        (out / cls.format.list_file).unlink(missing_ok=True)
        for path in (*out.iterdir(), *cls.work_folder(out).glob("done-*")):
            if path.is_file():
                path.unlink()
        (cls.work_folder(out) / "plan.json").unlink(missing_ok=True)


def _shown(value: object) -> str:
    """Return a value of a plan in a message: a digest by its beginning, others whole up to 60 characters."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text[:60]


def _remove_leftovers(out: Path, work: Path) -> None:
    for path in work.glob("shard-*"):
        shutil.rmtree(path)
    for path in (*out.glob(".*.tmp"), *work.glob(".*.tmp")):
        path.unlink()


@contextmanager
def _locked(lock: BinaryIO, byte: int) -> Iterator[None]:
    """Hold the exclusive lock of a byte within the block; wait for it."""
    if locks.HAS_SHARED_LOCKS:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, byte)
    try:
        yield
    finally:
        _unlock(lock, byte)


def _try_lock(lock: BinaryIO, byte: int) -> bool:
    """Take the exclusive lock of a byte, and return True; False if another process holds it."""
    if not locks.HAS_SHARED_LOCKS:
        return True
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(lock: BinaryIO, byte: int) -> None:
    if locks.HAS_SHARED_LOCKS:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)
