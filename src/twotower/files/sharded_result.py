"""Results in shards: a folder on a disk, or below a prefix of an object store, into which the processes of a job write
a file a shard.

part-00000-0123456789abcdef.parquet   rows of a shard, with its plan and facts in the metadata. The name ends with the
SHA-256 of the file:
                                      what is damaged is no shard, and what a lost host sends late replaces none
_plan_RESULT.json, _lock              what the shards are made of; kernel lock of the call, on a disk
_RESULT.json                          plan, facts and names of all shards, written last; the kind of result gives both
names
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import polars as pl

from twotower import files
from twotower.errors import RunError
from twotower.files import locks, places
from twotower.files.places import JsonObject
from twotower.files.urls import Url

_ABOUT, _DIGITS, _LONG = "twotower", 16, re.compile(r"(?<=\b[0-9a-f]{12})[0-9a-f]{20,}\b")
_SHARD, _LEFT = re.compile(rf"part-\d{{5,}}-[0-9a-f]{{{_DIGITS}}}\.parquet"), re.compile(r"\..+\.\d+\.tmp")


class MadeShard(NamedTuple):
    """A finished shard. `is_new`: this call has made it."""

    number: int
    file: str
    facts: JsonObject
    is_new: bool


class ShardedResult:
    """The shards that a plan describes. The call, and each process that makes shards for it, has such an object."""

    def __init__(self, place: Path | Url, noun: str, list_file: str, plan: JsonObject) -> None:
        """Take what the shards depend on, by words for messages; `noun` is their content in plural: "vectors"."""
        self.place, self.noun, self.list_file, self._plan_file = place, noun, list_file, f"_plan{list_file}"
        self.plan: JsonObject = json.loads(json.dumps(plan))
        self._plan_bytes, self._there = files.json_bytes(self.plan), dict[str, list[str]]()
        self._identity = hashlib.sha256(self._plan_bytes).hexdigest()

    @contextmanager
    def writing(self, overwrite: bool) -> Iterator[None]:
        """Begin or continue within the block. Raises RunError if the folder holds other files, or shards of another
        plan, which `overwrite` removes, or, on a disk, if another call is writing into it. A plan without a shard gives
        way."""
        known = re.compile(rf"{_SHARD.pattern}|{self._plan_file}|{self.list_file}|[._](?!.*\.json$).*", re.DOTALL)
        if other := [name for name in places.names(self.place) if not known.fullmatch(name)]:
            raise RunError(f"{self.place}: not a folder of {self.noun} (it holds {other[0]}); choose another folder")
        at, hint = self.place, "choose another folder"
        with locks.held_by_call(at / "_lock", "call", at, hint) if isinstance(at, Path) else nullcontext():
            places.remove(at, filter(_LEFT.fullmatch, names := places.names(at)))
            there = [name for name in names if name == self.list_file or _SHARD.fullmatch(name)]
            if there and (why := self._difference(places.read_json(at / self._plan_file) or {})):
                if not overwrite:
                    raise RunError(f"{at}: {why}; choose another folder, or start over with `overwrite=True`")
                places.remove(at, [self.list_file])  # first, also where many objects are deleted in no order
                places.remove(at, there)
            places.write(at / self._plan_file, self._plan_bytes)
            yield

    def look(self) -> None:
        """Look for shards that are there. Raises RunError as `check` does."""
        self.check()
        self._there.clear()
        for name in places.names(self.place):
            self._there.setdefault(name.rpartition("-")[0] or name, []).append(name)

    def check(self) -> None:
        """Raise RunError if this process sees another plan than its call: on another host, or after another call
        began."""
        if places.read(self.place / self._plan_file) != self._plan_bytes:
            raise RunError(
                f"{self.place}: the host {platform.node()} sees another folder of that name, or one of another call; "
                "name one that all hosts share"
            )

    def make(self, number: int, rows: Callable[[], tuple[pl.DataFrame, JsonObject]]) -> MadeShard:
        """Return the shard `number`. Unless it was there, it is made of the rows and facts that `rows` returns. Any
        number of processes may make a shard. Raises RunError."""
        for name in self._there.get(f"part-{number:05d}", ()):
            if (facts := self._facts(name)) is not None:
                return MadeShard(number, name, facts, is_new=False)
        if self.list_file in self._there:
            places.remove(self.place, [self.list_file])
        frame, facts = rows()
        files.point(f"shard:{number}")
        about = {_ABOUT: json.dumps({"plan": self._identity, "facts": facts})}
        file, dense = io.BytesIO(), "vector" in frame.columns  # numbers that hardly compress
        frame.write_parquet(file, compression="uncompressed" if dense else "zstd", metadata=about, statistics=False)
        name = shard_name(number, hashlib.sha256(data := file.getvalue()).hexdigest())
        files.point("shard.made")
        self.check()
        places.write(self.place / name, data)
        return MadeShard(number, name, facts, is_new=True)

    def finish(self, shards: list[MadeShard], about: JsonObject) -> None:
        """Remove files of no shard, and write the list of all. Raises RunError if the folder is of another call by now,
        or a shard is gone."""
        self.check()
        there, listed = set(filter(_SHARD.fullmatch, places.names(self.place))), {shard.file for shard in shards}
        if lost := [name for name in sorted(listed - there) if places.read(self.place / name) is None]:
            raise RunError(f"{self.place}: {lost[0]} was removed meanwhile, as by a call at the same time; call again")
        if there - listed or places.read_json(self.place / self.list_file) != self.plan | about:
            places.remove(self.place, [self.list_file])  # first, since it may name the others
            places.remove(self.place, there - listed)
            places.write(self.place / self.list_file, files.json_bytes(self.plan | about))

    def _facts(self, name: str) -> JsonObject | None:
        """Return the facts of an intact shard of this plan, None for another file."""
        if (data := places.read(self.place / name)) is None or hashlib.sha256(data).hexdigest()[:_DIGITS] not in name:
            return None
        about = json.loads(pl.read_parquet_metadata(io.BytesIO(data))[_ABOUT])
        return about["facts"] if about["plan"] == self._identity else None

    def _difference(self, then: JsonObject) -> str:
        """Return the first difference between this plan and another, as words; an empty text without one."""
        for key in then | self.plan:
            if then.get(key) != self.plan.get(key):
                before, now = (_LONG.sub("", str(plan.get(key, "none")))[:60] for plan in (then, self.plan))
                return f"its {self.noun} are of another `{key.replace(', ', '`, `')}` ({before} then, {now} now)"
        return ""


def shard_name(number: int, digest: str = "0" * _DIGITS) -> str:
    """Return the name of a shard's file by the SHA-256 of its content."""
    return f"part-{number:05d}-{digest[:_DIGITS]}.parquet"
