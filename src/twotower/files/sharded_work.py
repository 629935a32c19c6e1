"""Folders of shards: written by one call, or by the processes of its engine, and continued by a later call. On a disk or in a bucket
(shard_folders.py).

WORK/plan.json          what the shards are made of: another call of the same plan goes on
WORK/done-00000.json    record of a finished shard, written after its files
WORK/shard-00000-…/     temporary files of a shard in progress, on a disk
WORK/lock               kernel lock of the call, on a disk

The format gives the name of WORK. A list of all shards is written when the last is finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from twotower import files
from twotower.errors import RunError, TwoTowerError
from twotower.files import locks
from twotower.files.object_stores import ObjectError
from twotower.files.shard_folders import FileEntry, JsonObject, ShardFolder

log = logging.getLogger(__name__)

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

    def __init__(self, at: ShardFolder, plan: JsonObject) -> None:
        self.at = at
        self.plan: JsonObject = {"format": self.format.version} | plan

    @classmethod
    @contextmanager
    def begin(cls, at: ShardFolder, plan: JsonObject, overwrite: bool) -> Iterator[Self]:
        """Start or continue the work that `plan` describes; its `table` are the states of the files of a table.

        Raises RunError if the folder holds other files, or shards of another plan, which `overwrite` removes, or, on a disk, if another
        call is writing into it. In a bucket two calls of one plan make the same. An error before a shard is there leaves no plan."""
        cls.check_folder(at)
        work = cls(at, plan)
        with cls._alone(at):
            at.remove_leftovers(cls.format.work_folder)
            if why := work._difference():
                if not overwrite:
                    raise RunError(f"{at}: {why}; {HOW_TO_OVERWRITE}")
                at.clear(cls.format.list_file, cls._work("plan.json"))
            if at.read(cls._work("plan.json")) is None:
                try:
                    at.create(cls._work("plan.json"), work.plan)
                except ObjectError as e:
                    if e.cause != "changed":
                        raise
                    raise RunError(f"{at}: another call begins at the same time; let it end, or stop it") from None
            try:
                yield work
            except TwoTowerError:
                if not any(cls.format.shard_files.fullmatch(name) for name in at.names()):  # a table may be corrected
                    at.remove([cls._work("plan.json")])
                raise

    @classmethod
    def check_folder(cls, at: ShardFolder) -> None:
        """Raise RunError unless the folder is new, empty, or holds shards and no other files."""
        known = {cls.format.list_file, cls.format.work_folder}
        ours = re.compile(rf"{cls.format.shard_files.pattern}|\.{re.escape(cls.format.list_file)}\.\d+\.tmp")
        foreign = [name for name in at.names() if not (name in known or ours.fullmatch(name))]
        if foreign:
            raise RunError(f"{at}: not a folder of {cls.format.noun} (it holds {foreign[0]}); choose another folder")

    @classmethod
    @contextmanager
    def _alone(cls, at: ShardFolder) -> Iterator[None]:
        """Hold the lock of the folder within the block. Raises RunError if another call holds it, or nothing can be written."""
        try:
            with at.alone(cls.format.work_folder):
                yield
        except locks.LockHeld as e:
            raise RunError(f"{at}: {e}; let it end, or stop it") from None
        except OSError as e:
            raise at.failed(e) from e

    def check_seen(self) -> None:
        """Raise RunError if this process sees another folder than the one of its call: on another host, or after its call was killed and
        another one began."""
        if self.at.read(self._work("plan.json")) is None or self._difference():
            raise RunError(
                f"{self.at}: the host {platform.node()} sees another folder of that name, or one of another call; name a table, a model and a folder on a file "
                "system that all hosts share, at the same paths, or in a bucket"
            )

    def make(self, number: int, write: Callable[[Path], tuple[Mapping[str, str], JsonObject]]) -> MadeShard:
        """Return the shard `number`, which is made if it is missing or its files are damaged.

        `write` writes files into a folder, and returns the names of those that it made, each with its name in the result, and facts of
        the record. Files are put in their places and then recorded: any number of processes may make a shard, which ends as that of one.
        Raises RunError."""
        found = self.record(number)
        if found and self._is_intact(found):
            return MadeShard(number, found, is_new=False)
        try:
            if found:
                self.at.remove([self.format.list_file, self._record(number)])
            with self.scratch(f"shard-{number:05d}-") as folder:
                names, facts = write(folder)
                if (other := self.record(number)) and self._is_intact(other):  # this host was taken for lost
                    return MadeShard(number, other, is_new=False)
                record = self._publish(number, folder, names, facts)
        except OSError as e:
            raise self.at.failed(e) from e
        return MadeShard(number, record, is_new=True, was_damaged=bool(found))

    @contextmanager
    def scratch(self, prefix: str) -> Iterator[Path]:
        """Yield a temporary folder on a disk; its name begins with `prefix`, of a shard with "shard-"."""
        with self.at.scratch(self.format.work_folder, prefix) as folder:
            yield Path(folder)

    def record(self, number: int) -> JsonObject | None:
        """Return the record of a finished shard of this plan, None without one. Raises ObjectError."""
        try:
            found = self.at.read(self._record(number))
        except ObjectError:
            raise
        except RunError:
            return None
        return found if found and found.get("plan") == self._identity else None

    def write_record(self, number: int, record: JsonObject) -> None:
        """Replace the record of a shard."""
        self.at.write(self._record(number), record)

    def replace_file(self, made: Path, name: str) -> FileEntry:
        """Put a file of `scratch` in the place of one of a shard, and return its entry in the record."""
        return self.at.put(made, name, self.at.prepare(made), self.check_seen)

    def read_list(self) -> JsonObject | None:
        """Return the list of shards, None if it is missing."""
        return self.at.read(self.format.list_file)

    def write_list(self, content: JsonObject) -> None:
        """Write the list of shards, unless it is so already. Raises RunError if the folder is of another call by now."""
        self.check_seen()
        if self.read_list() != content:
            self.at.write(self.format.list_file, content)

    def _is_intact(self, record: JsonObject) -> bool:
        """Return True if the files of a finished shard are as its record has them."""
        return all(self.at.holds(*entry) for entry in record.get("files", [["", 0, ""]]))

    def _publish(self, number: int, folder: Path, names: Mapping[str, str], facts: JsonObject) -> JsonObject:
        """Move files of a shard to their names in the result, and write its record: facts, and their names, sizes and digests."""
        prepared = {made: self.at.prepare(folder / made) for made in names}
        self.check_seen()
        written: list[files.JsonData] = []
        for made, name in names.items():
            files.point("shard.file")
            written.append([*self.at.put(folder / made, name, prepared[made], self.check_seen)])
        files.point("shard.files")
        self.at.sync()
        self.check_seen()
        self.write_record(number, record := facts | {"files": written, "plan": self._identity})
        return record

    @classmethod
    def _work(cls, name: str) -> str:
        return f"{cls.format.work_folder}/{name}"

    def _record(self, number: int) -> str:
        return self._work(f"done-{number:05d}.json")

    @property
    def _identity(self) -> str:
        """Digest of what makes two plans differ, which the records of their shards hold."""
        told = [
            self.format.version,
            [self.plan.get(key) for key in self.format.differences],
            sorted(self.plan["table"]),
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _difference(self) -> str:
        """Return the difference between the plan and that of the folder, as words; an empty string if both agree."""
        noun = self.format.noun
        try:
            then = self.at.read(self._work("plan.json"))
        except ObjectError:
            raise
        except RunError as e:
            return str(e)
        if then is None:
            present = [name for name in self.at.names() if name != self.format.work_folder and name[:1] != "."]
            return f"holds other {noun} ({present[0]})" if present else ""
        if then.get("format") != self.format.version:
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


def _shown(value: object) -> str:
    """Return a value of a plan in a message: a digest by its beginning, others whole up to 60 characters."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text[:60]
