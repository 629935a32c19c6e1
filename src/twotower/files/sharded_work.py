"""Folders of shards: written by one call, or by the processes of its engine, and continued by a later call. On a disk or in a bucket
(shard_folders.py).

WORK/plan.json          what the shards are made of: another call of the same plan goes on
WORK/done-00000.json    record of a finished shard, written after its files
WORK/twotower-…         temporary folder of a shard in progress and its lock, on a disk
WORK/lock               kernel lock of the call, on a disk

The kind of work gives the name of WORK. A list of all shards is written when the last is finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

from twotower import files
from twotower.errors import DataError, RunError
from twotower.files import locks
from twotower.files.object_stores import ObjectError
from twotower.files.scratch import scratch_folder
from twotower.files.shard_folders import FileEntry, ShardFolder

log = logging.getLogger(__name__)

JsonObject: TypeAlias = dict[str, Any]
"""An object of parsed JSON."""


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
    """The shards that a plan describes, in a folder. Every process that makes shards has such an object."""

    version: ClassVar[int]
    noun: ClassVar[str]
    """Content in plural: "vectors"."""
    work_folder: ClassVar[str]
    """Name of the folder of plan, records, temporary files and the lock."""
    list_file: ClassVar[str]
    """Name of the list of all shards."""
    shard_files: ClassVar[str]
    """Pattern of the names of the files of shards."""

    def __init__(self, at: ShardFolder, plan: JsonObject) -> None:
        """Take what the shards depend on, by the names of arguments; `table` are the states of the files of a table, each a list that begins
        with a name."""
        self.at = at
        self.plan: JsonObject = {"format": self.version} | plan
        self._plan_file = f"{self.work_folder}/plan.json"

    @classmethod
    @contextmanager
    def begin(cls, at: ShardFolder, plan: JsonObject, overwrite: bool) -> Iterator[Self]:
        """Start or continue the work that `plan` describes.

        Raises RunError if the folder holds other files, or shards of another plan, which `overwrite` removes, or, on a disk, if another
        call is writing into it. In a bucket two calls of one plan make the same. On a disk another plan without a finished shard gives way,
        so that a table or a model can be corrected; in a bucket it may be that of a call at work, and needs `overwrite`."""
        work, half = cls(at, plan), rf"\.{re.escape(cls.list_file)}\.\d+\.tmp"
        known = rf"{cls.shard_files}|{re.escape(cls.list_file)}|{half}|{cls.work_folder}(/.*)?"
        if foreign := [path for path in at.paths() if not re.fullmatch(known, path)]:
            raise RunError(f"{at}: not a folder of {cls.noun} (it holds {foreign[0]}); choose another folder")
        with work._written(), at.alone(cls.work_folder):
            work._remove_all(rf"{half}|{cls.work_folder}/(twotower-.*|\..*\.tmp)")
            if why := work._difference():
                if not (overwrite or work._is_unused()):
                    raise RunError(f"{at}: {why}; choose another folder, or start over with `overwrite=True`")
                at.remove([cls.list_file])
                work._remove_all(rf"{cls.shard_files}|{cls.work_folder}/done-.*")
                at.remove([work._plan_file])
            if work._read(work._plan_file) is None:
                try:
                    at.write(work._plan_file, work._plan_bytes, is_new=True)
                except ObjectError as e:
                    if e.cause != "changed":
                        raise
                    raise RunError(f"{at}: another call begins at the same time; let it end, or stop it") from None
            try:
                yield work
            except DataError:
                if work._is_unused():
                    at.remove([work._plan_file])
                raise

    def check_seen(self) -> None:
        """Raise RunError if this process sees another folder than the one of its call: on another host, or after its call was killed and
        another one began."""
        plan = self.at.read(self._plan_file)
        if plan is None or (plan != self._plan_bytes and self._difference()):
            raise RunError(
                f"{self.at}: the host {platform.node()} sees another folder of that name, or one of another call; name a table, a model and a folder on a file "
                "system that all hosts share, at the same paths, or in a bucket"
            )

    def make(self, number: int, write: Callable[[Path], JsonObject]) -> MadeShard:
        """Return the shard `number`, which is made if it is missing or its files are damaged.

        `write` writes the files into a folder, and returns facts of the record. Files are put in their places and then recorded: any
        number of processes may make a shard, which ends as that of one. Raises RunError."""
        with self._written():
            found = self.record(number)
            if found and self._is_intact(found):
                return MadeShard(number, found, is_new=False)
            if found:
                self.at.remove([self.list_file, self._record_file(number)])
            with self.scratch(f"shard-{number:05d}") as folder:
                facts = write(folder)
                if (other := self.record(number)) and self._is_intact(other):  # this host was taken for lost
                    return MadeShard(number, other, is_new=False)
                entries = [self.put(made) for made in sorted(folder.iterdir()) if made.is_file()]
            files.point("shard.files")
            self.check_seen()
            record = self.write_record(number, facts | {"files": entries, "plan": self._identity})
        return MadeShard(number, record, is_new=True, was_damaged=bool(found))

    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """Return a context with a temporary folder on a disk, as `scratch_folder` names it."""
        return scratch_folder(self.at.scratch(self.work_folder), name)

    def put(self, made: Path) -> FileEntry:
        """Move a file of `scratch` to its name in the folder, and return its entry in the record."""
        files.point("shard.file")
        return self.at.put(made, made.name, self.check_seen)

    def record(self, number: int) -> JsonObject | None:
        """Return the record of a finished shard of this plan, None without one. Raises RunError."""
        found = self._read(self._record_file(number))
        return found if found and found.get("plan") == self._identity else None

    def write_record(self, number: int, record: JsonObject) -> JsonObject:
        """Replace the record of a shard, and return it."""
        self.at.write(self._record_file(number), files.json_bytes(record))
        return record

    def read_list(self) -> JsonObject | None:
        """Return the list of shards, None if it is missing, and {} for a damaged one."""
        return self._read(self.list_file)

    def write_list(self, content: JsonObject) -> None:
        """Write the list of shards, unless it is so already. Raises RunError if the folder is of another call by now."""
        self.check_seen()
        if self.read_list() != content:
            self.at.write(self.list_file, files.json_bytes(content))

    def _read(self, path: str) -> JsonObject | None:
        """Return an object of JSON, {} for anything else, None if the file is missing. Raises RunError."""
        if (data := self.at.read(path)) is None:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remove_all(self, pattern: str) -> None:
        self.at.remove([path for path in self.at.paths() if re.fullmatch(pattern, path)])

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Raise RunError if another call holds the lock of the folder, or for an OSError of writing into it."""
        try:
            yield
        except locks.LockHeld as e:
            raise RunError(f"{self.at}: {e}; let it end, or stop it") from None
        except OSError as e:
            no_locks = e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
            hint = "choose a folder on a file system with locks" if no_locks else "make room, or choose another one"
            at = self.at.scratch(self.work_folder)
            raise RunError(f"{at}: cannot be written ({e.strerror or e}); {hint}") from e

    def _record_file(self, number: int) -> str:
        return f"{self.work_folder}/done-{number:05d}.json"

    def _is_intact(self, record: JsonObject) -> bool:
        """Return True if the files of a finished shard are as its record has them."""
        return all(self.at.entry(name) == (name, *rest) for name, *rest in record["files"])

    def __getstate__(self) -> JsonObject:
        """Return what another process needs: not what it computes itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_plan_bytes", "_identity")}

    @cached_property
    def _plan_bytes(self) -> bytes:
        """Content of the file of the plan, which grows with the table's files."""
        return files.json_bytes(self.plan)

    @cached_property
    def _identity(self) -> str:
        """Digest of the plan, which the records of its shards hold."""
        return hashlib.sha256(json.dumps(self.plan).encode()).hexdigest()

    def _is_unused(self) -> bool:
        """Return True on a disk, where the lock is held, if no shard of the folder's plan has been made. In a bucket another call may be
        making its first."""
        made = rf"{self.shard_files}|{self.list_file}|{self.work_folder}/done-.*"
        return isinstance(self.at.place, Path) and not any(re.fullmatch(made, path) for path in self.at.paths())

    def _difference(self) -> str:
        """Return the difference between the plan and that of the folder, as words; an empty string if both agree."""
        if (then := self._read(self._plan_file)) is None:
            present = [path for path in self.at.paths() if not re.fullmatch(rf"{self.work_folder}(/.*)?", path)]
            return f"holds other {self.noun} ({present[0]})" if present else ""
        if then.get("format") != self.plan["format"] or then.keys() != self.plan.keys():
            return f"its {self.noun} are of another version of twotower, or {self._plan_file} is damaged"
        for key in self.plan:
            if key != "table" and then[key] != self.plan[key]:
                option = key if key in _CONTENTS else f"`{key.replace(', ', '`, `')}`"
                return f"its {self.noun} are of another {option} ({_shown(str(then[key]))} then, {_shown(str(self.plan[key]))} now)"
        before, now = ({name: state for name, *state in plan.get("table", [])} for plan in (then, self.plan))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                how = "is missing" if name not in now else "is new" if name not in before else "has changed"
                return f"its {self.noun} are of another table ({name} {how})"
        return ""


_CONTENTS = ("model", "schema", "bundle")
"""Keys of plans that are digests of what an argument names; the others are arguments."""


def _shown(text: str) -> str:
    """Return a value of a plan as a message has it: a digest by its beginning, others whole up to 60 characters."""
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text[:60]
