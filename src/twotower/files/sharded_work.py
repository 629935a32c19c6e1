"""Folders of shards: written by one call, or by the processes of its engine, and continued by a later call.

WORK/plan.json          what the shards are made of: another call of the same plan goes on
WORK/done-00000.json    record of a finished shard, written after its files
WORK/shard-00000-…/     temporary files of a shard in progress
WORK/lock               kernel lock of the call

The format gives the name of WORK. A list of all shards is written when the last is finished.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

from twotower import files
from twotower.errors import RunError
from twotower.files import locks
from twotower.files.readers import file_digest, read_json

log = logging.getLogger(__name__)

JsonObject: TypeAlias = dict[str, Any]
"""An object of parsed JSON."""

HOW_TO_OVERWRITE = "choose another folder, or start over with `overwrite=True`"


@dataclass(frozen=True)
class ShardFormat:
    """Files of one kind of sharded folder, and the words of its messages."""

    version: int
    noun: str
    """Content in plural: "vectors"."""
    work_folder: str
    """Name of the folder of plan, records, temporary files and the lock."""
    list_file: str
    """Name of the list of all shards."""
    shard_files: re.Pattern[str]
    """Names of the files of shards."""
    differences: Mapping[str, str]
    """Key of a plan -> words for another value of it: "of another model"."""
    other_files: frozenset[str] = frozenset()
    """Names of further files that such a folder may hold."""


@dataclass(frozen=True)
class MadeShard:
    """A finished shard: its number, its record, and the part of this call."""

    number: int
    record: JsonObject
    is_new: bool
    was_damaged: bool = False

    def log_damage(self) -> None:
        """Log that the files of an earlier call were damaged, if they were."""
        if self.was_damaged:
            log.info(f"shard {self.number + 1} was damaged and is made again")


class ShardedWork:
    """The shards that a plan describes, in a folder. A subclass has a `format`. Every process that makes shards has such an object."""

    format: ClassVar[ShardFormat]

    def __init__(self, out: Path, plan: JsonObject) -> None:
        self.out, self.folder = out, out / self.format.work_folder
        self.plan: JsonObject = {"format": self.format.version} | plan

    @classmethod
    @contextmanager
    def begin(cls, out: Path, plan: JsonObject, overwrite: bool) -> Iterator[Self]:
        """Start or continue the work that `plan` describes; its `table` are the states of the files of a table.

        Raises RunError if the folder holds other files, or shards of another plan, which `overwrite` removes, or if another
        call is writing into it."""
        cls.check_folder(out)
        work = cls(out, plan)
        with cls._alone(out):
            _remove_leftovers(out, work.folder)
            if why := work._difference():
                if not overwrite:
                    raise RunError(f"{out}: {why}; {HOW_TO_OVERWRITE}")
                cls._clear(out)
            if not (work.folder / "plan.json").exists():
                files.write_json(work.folder / "plan.json", work.plan)
            yield work

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
        with cls._alone(out):
            cls._clear(out)
            shutil.rmtree(
                out / cls.format.work_folder, ignore_errors=not locks.HAS_SHARED_LOCKS
            )  # Windows keeps the open lock

    @classmethod
    @contextmanager
    def _alone(cls, out: Path) -> Iterator[None]:
        """Hold the lock of the folder within the block. Raises RunError if another call holds it, or nothing can be written."""
        work = out / cls.format.work_folder
        try:
            work.mkdir(parents=True, exist_ok=True)
            with locks.lock(work / "lock") as held:
                held.write_holder("call")
                yield
        except locks.LockHeld as e:
            raise RunError(f"{out}: {e}; let it end, or stop it") from None
        except OSError as e:
            raise _unwritable(out, e) from e

    def check_seen(self) -> None:
        """Raise RunError if this process sees another folder than the one of its call: on another host, or after its call was killed and
        another one began."""
        if not (self.folder / "plan.json").exists() or self._difference():
            raise RunError(
                f"{self.out}: the host {platform.node()} sees another folder of that name, or one of another call; name a table, a model and a folder on a file "
                "system that all hosts share, at the same paths"
            )

    def make(self, number: int, write: Callable[[Path], tuple[Mapping[str, str], JsonObject]]) -> MadeShard:
        """Return the shard `number`, which is made if it is missing or its files are damaged.

        `write` writes files into a folder, and returns the names of those that it made, each with its name in the result, and facts of
        the record. Files are renamed and then recorded: any number of processes may make a shard, which ends as that of one. Raises
        RunError."""
        found = self.record(number)
        if found and self._is_intact(found):
            return MadeShard(number, found, is_new=False)
        try:
            if found:
                (self.out / self.format.list_file).unlink(missing_ok=True)
                self._record(number).unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f"shard-{number:05d}-", dir=self.folder, ignore_cleanup_errors=True
            ) as folder:
                names, facts = write(Path(folder))
                record = self._publish(number, Path(folder), names, facts)
        except OSError as e:
            raise _unwritable(self.out, e) from e
        return MadeShard(number, record, is_new=True, was_damaged=bool(found))

    def record(self, number: int) -> JsonObject | None:
        """Return the record of a finished shard, None without one."""
        try:
            found = read_json(self._record(number))
        except RunError:
            return None
        return found if isinstance(found, dict) else None

    def write_record(self, number: int, record: JsonObject) -> None:
        """Replace the record of a shard."""
        files.write_json(self._record(number), record)

    def write_list(self, content: JsonObject) -> None:
        """Write the list of shards, unless it is so already."""
        path = self.out / self.format.list_file
        if not path.exists() or read_json(path) != content:
            files.write_json(path, content)

    def _is_intact(self, record: JsonObject) -> bool:
        """Return True if the files of a finished shard have the sizes and digests of its record."""
        return all(
            (path := self.out / name).is_file() and path.stat().st_size == size and file_digest(path) == digest
            for name, size, digest in record.get("files", [["", 0, ""]])
        )

    def _publish(self, number: int, folder: Path, names: Mapping[str, str], facts: JsonObject) -> JsonObject:
        """Move files of a shard to their names in the result, and write its record: facts, and their names, sizes and digests."""
        written: list[files.JsonData] = []
        for made, name in names.items():
            files.sync(folder / made)
            written.append([name, (folder / made).stat().st_size, file_digest(folder / made)])
        self.check_seen()
        for made, name in names.items():
            files.point("shard.file")
            os.replace(folder / made, self.out / name)
        files.point("shard.files")
        files.sync(self.out)
        self.write_record(number, record := facts | {"files": written})
        return record

    def _record(self, number: int) -> Path:
        return self.folder / f"done-{number:05d}.json"

    def _difference(self) -> str:
        """Return the difference between the plan and that of the folder, as words; an empty string if both agree."""
        path, noun = self.folder / "plan.json", self.format.noun
        if not path.exists():
            work = self.format.work_folder
            present = [p.name for p in self.out.iterdir() if p.name != work and not p.name.startswith(".")]
            return f"holds other {noun} ({min(present)})" if present else ""
        try:
            then = read_json(path)
        except RunError as e:
            return str(e)
        if not isinstance(then, dict) or then.get("format") != self.format.version:
            return f"its {noun} were made by another version"
        for key, words in self.format.differences.items():
            if then.get(key) != self.plan.get(key):
                return f"its {noun} are {words} ({_shown(then.get(key))} then, {_shown(self.plan.get(key))} now)"
        before, now = ({s[0]: s[1:] for s in table} for table in (then["table"], self.plan["table"]))
        for name in sorted({*before, *now}):
            if name not in before or name not in now:
                return f"its {noun} are of another table ({name} is {'new' if name in now else 'missing'})"
            if before[name] != now[name]:
                labels = ("size or version", "time of change", "rows")
                what = next(w for w, a, b in zip(labels, before[name], now[name], strict=True) if a != b)
                return f"its {noun} are of another table ({name} has another {'number of rows' if what == 'rows' else what})"
        return ""

    @classmethod
    def _clear(cls, out: Path) -> None:
        """Remove the shards of a folder, the plan last: after a kill in between the other files are still recognised."""
        (out / cls.format.list_file).unlink(missing_ok=True)
        for path in (*out.iterdir(), *(out / cls.format.work_folder).glob("done-*")):
            if path.is_file():
                path.unlink()
        (out / cls.format.work_folder / "plan.json").unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> RunError:
    no_locks = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    hint = "; choose a folder on a file system with locks" if no_locks else ""
    return RunError(f"{out}: cannot be written ({error.strerror or error}){hint}")


def _shown(value: object) -> str:
    """Return a value of a plan in a message: a digest by its beginning, others whole up to 60 characters."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text[:60]


def _remove_leftovers(out: Path, work: Path) -> None:
    for path in work.glob("shard-*"):
        shutil.rmtree(path)
    for path in (*out.glob(".*.tmp"), *work.glob(".*.tmp")):
        path.unlink()
