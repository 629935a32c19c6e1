"""Shards of a bulk embedding, shared by processes on one file system, and continued by a later call.

work/plan.json          table, model, schema and sizes of the embedding
work/done-00000.json    record of a finished shard, written after its files
work/shard-00000/       temporary files of a shard in progress
work/lock               kernel locks: each shard has one byte

All are in the folder of embeddings (folder.py). Kernel locks are released when a process dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from twotower import files
from twotower.embedding.folder import EMBEDDINGS_FORMAT, IDS_FILE, LIST_FILE, VECTORS_FILE, WORK_FOLDER, part_names
from twotower.errors import DataError, RunError
from twotower.files.readers import file_digest, read_json
from twotower.version import __version__

HOW_TO_OVERWRITE = "choose another folder, or start over with `overwrite=True`"
_SHARD_FILES = re.compile(r"part-\d+\.npy|ids-\d+\.parquet")
_FOLDER_BYTE, _USERS_BYTE, _FIRST_SHARD_BYTE = 0, 1, 2
"""Bytes of work/lock: of the plan and the list; locked, shared, by all processes in the folder; of the first shard."""


@dataclass(frozen=True)
class TableFile:
    """A file of a table: its path, its name within the table, and its number of rows (None for a text file)."""

    path: Path
    name: str
    rows: int | None

    def state(self) -> list[Any]:
        """Return name, size in bytes, modification time and rows, to detect changes."""
        found = self.path.stat()
        return [self.name, found.st_size, found.st_mtime_ns, self.rows]


@dataclass(frozen=True)
class TableShard:
    """Rows `start` to `start + rows` of a file, or with `rows` None a whole text file."""

    number: int
    file: TableFile
    start: int
    rows: int | None


def cut_into_shards(sources: list[TableFile], rows: int) -> list[TableShard]:
    """Return the shards of at most `rows` rows of the files, in their order; a file without rows has none."""
    shards: list[TableShard] = []
    for file in sources:
        if file.rows is None:
            shards.append(TableShard(len(shards), file, 0, None))
            continue
        for start in range(0, file.rows, rows):
            shards.append(TableShard(len(shards), file, start, min(rows, file.rows - start)))
    return shards


def check_folder(out: Path) -> None:
    """Raise RunError unless `out` is new, empty, or holds embeddings and no other files."""
    if not out.exists():
        return
    known = {VECTORS_FILE, IDS_FILE, LIST_FILE, WORK_FOLDER}
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else [out.name]
    foreign = [n for n in names if not (out.is_dir() and (n in known or _SHARD_FILES.fullmatch(n) or _is_temporary(n)))]
    if foreign:
        raise RunError(f"{out}: not a folder of vectors (it holds {foreign[0]}); choose another folder")


def _is_temporary(name: str) -> bool:
    return re.fullmatch(r"\.embedding\.json\.\d+\.tmp", name) is not None


def common_type(types: Collection[str]) -> pl.DataType:
    """Return the type that holds ids of all these types: text, if one of them is text."""
    if len(types) == 1:
        return pl.Int64() if "Int64" in types else pl.UInt64() if "UInt64" in types else pl.String()
    return pl.String() if "String" in types else pl.UInt64()


def save_ids(parts: list[Path], kind: pl.DataType, path: Path) -> None:
    """Write the concatenated column `id` of all parts with type `kind`. Raises DataError if the type cannot hold an id."""
    try:
        pl.concat([pl.scan_parquet(p, glob=False).select(pl.col("id").cast(kind)) for p in parts]).sink_parquet(path)
    except pl.exceptions.InvalidOperationError:
        raise DataError(
            "some ids are negative and some are from 2**63 on, which no integer type holds together; give them as text"
        ) from None


class ShardedWork:
    """The work of one process in a folder of embeddings, within the block of `begin`."""

    def __init__(self, out: Path, lock: BinaryIO, plan: dict[str, Any], shards: int) -> None:
        self.out, self.folder, self.plan, self.shards = out, out / WORK_FOLDER, plan, shards
        self.complete = (out / LIST_FILE).exists()
        self._lock = lock

    @classmethod
    @contextmanager
    def begin(cls, out: Path, plan: dict[str, Any], shards: int, overwrite: bool) -> Iterator[ShardedWork]:
        """Start or continue the embedding that `plan` describes.

        Raises RunError if the folder holds other files, or embeddings of another plan. With `overwrite` these are removed,
        unless a process is still writing them."""
        check_folder(out)
        plan = {"format": EMBEDDINGS_FORMAT} | plan
        try:
            (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
            with (out / WORK_FOLDER / "lock").open("a+b") as lock:
                with _locked(lock, _FOLDER_BYTE):
                    alone = _try_lock(lock, _USERS_BYTE)
                    if alone:  # incomplete files are of killed processes
                        _remove_leftovers(out)
                    if why := _difference(out, plan):
                        if not overwrite:
                            raise RunError(f"{out}: {why}; {HOW_TO_OVERWRITE}")
                        if not alone:
                            raise RunError(f"{out}: {why}, and another call is writing them; let it end, or stop it")
                        _clear(out)
                    if not (out / WORK_FOLDER / "plan.json").exists():
                        files.write_json(out / WORK_FOLDER / "plan.json", plan)
                    fcntl.lockf(lock, fcntl.LOCK_SH, 1, _USERS_BYTE)
                yield cls(out, lock, plan, shards)
        except OSError as e:
            no_locks = e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
            hint = "; choose a folder on a file system with locks" if no_locks else ""
            raise RunError(f"{out}: cannot be written ({e.strerror or e}){hint}") from e

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Yield True with the shard locked until the block ends, False if another process holds it."""
        if not _try_lock(self._lock, _FIRST_SHARD_BYTE + number):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _FIRST_SHARD_BYTE + number)

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the record of a finished shard, None without one."""
        try:
            found = read_json(self._record(number))
        except RunError:
            return None
        return found if isinstance(found, dict) else None

    def is_intact(self, number: int) -> bool:
        """Return True if the files of a finished shard have the sizes and digests of its record."""
        record = self.record(number)
        return record is not None and all(
            (path := self.out / name).is_file() and path.stat().st_size == size and file_digest(path) == digest
            for name, size, digest in record.get("files", [["", 0, ""]])
        )

    def discard(self, number: int) -> None:
        """Remove the record of a finished shard, so that it is embedded again."""
        with _locked(self._lock, _FOLDER_BYTE):
            (self.out / LIST_FILE).unlink(missing_ok=True)
            self._record(number).unlink(missing_ok=True)

    @contextmanager
    def temporary_folder(self, number: int) -> Iterator[Path]:
        """Yield a folder for a shard's vectors.npy and ids.parquet, which is removed after the block."""
        folder = self.folder / f"shard-{number:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish_shard(self, number: int, folder: Path, rows: int, width: int, kind: str) -> None:
        """Move the files of a shard to their place, and write its record; a shard of no rows has a record only."""
        written: list[files.JsonData] = []
        for made, name in zip((VECTORS_FILE, IDS_FILE), part_names(number), strict=True):
            if rows:
                files.sync(folder / made)
                written.append([name, (folder / made).stat().st_size, file_digest(folder / made)])
                files.point("shard.file")
                os.replace(folder / made, self.out / name)
        files.point("shard.files")
        files.sync(self.out)
        files.write_json(self._record(number), {"rows": rows, "width": width, "id": kind, "files": written})

    def finish(self, metric: str) -> tuple[int, bool]:
        """Write the list of shards if all are finished; return the number of finished rows, and True if it was written."""
        with _locked(self._lock, _FOLDER_BYTE):
            found = [self.record(i) for i in range(self.shards)]
            done = [r for r in found if r]
            rows = sum(r["rows"] for r in done)
            if len(done) < self.shards or not rows or not self._unify_id_types(done):
                return rows, False
            records = [r for i in range(self.shards) if (r := self.record(i)) and r["rows"]]
            about = self.plan | {
                "twotower": __version__, "metric": metric, "rows": rows, "width": records[0]["width"],
                "id": records[0]["id"],
                "shards": [{"vectors": r["files"][0][0], "ids": r["files"][1][0], "rows": r["rows"]} for r in records],
            }  # fmt: skip
            path = self.out / LIST_FILE
            if path.exists() and read_json(path) == about:
                return rows, False
            files.write_json(path, about)
            return rows, True

    def _unify_id_types(self, records: list[dict[str, Any]]) -> bool:
        """Convert the ids of all shards to one type, which holds all of them.

        Return False if another process has claimed a shard that needs conversion; that process calls this later."""
        types = {r["id"] for r in records if r["rows"]}
        if len(types) < 2:
            return True
        common = common_type(types)
        for number, record in enumerate(records):
            if not record["rows"] or record["id"] == str(common):
                continue
            with self.claimed(number) as is_claimed:
                if not is_claimed:
                    return False
                with self.temporary_folder(number) as folder:
                    path, name = folder / IDS_FILE, record["files"][1][0]
                    save_ids([self.out / name], common, path)
                    files.sync(path)
                    record["files"][1] = [name, path.stat().st_size, file_digest(path)]
                    files.point("shard.ids")
                    os.replace(path, self.out / name)
                    files.point("shard.ids_renamed")
                    files.write_json(self._record(number), record | {"id": str(common)})
        return True

    def _record(self, number: int) -> Path:
        return self.folder / f"done-{number:05d}.json"


def clear_folder(out: Path) -> None:
    """Remove all shards of a folder. Raises RunError if it holds other files, or a process is writing shards."""
    check_folder(out)
    with (out / WORK_FOLDER / "lock").open("a+b") as lock, _locked(lock, _FOLDER_BYTE):
        if not _try_lock(lock, _USERS_BYTE):
            raise RunError(f"{out}: another call is writing into it; let it end, or stop it")
        _clear(out)
        shutil.rmtree(out / WORK_FOLDER)


def _difference(out: Path, plan: dict[str, Any]) -> str:
    """Return the difference between `plan` and that of the folder `out`, as words; an empty string if both agree."""
    path = out / WORK_FOLDER / "plan.json"
    if not path.exists():
        present = [p.name for p in out.iterdir() if p.name != WORK_FOLDER and not p.name.startswith(".")]
        return f"holds other vectors ({min(present)})" if present else ""
    try:
        then = read_json(path)
    except RunError as e:
        return str(e)
    if not isinstance(then, dict) or then.get("format") != EMBEDDINGS_FORMAT:
        return "its vectors were made by another version"
    words = {
        "side": "of the other side", "model": "of another model", "schema": "of another schema",
        "precision": "in another precision", "shard_rows": "in shards of another size (`shard_rows`)",
    }  # fmt: skip
    for key, word in words.items():
        if then.get(key) != plan[key]:
            return f"its vectors are {word} ({str(then.get(key))[:12]} then, {str(plan[key])[:12]} now)"
    before, now = ({s[0]: s[1:] for s in p["table"]} for p in (then, plan))
    for name in sorted({*before, *now}):
        if name not in before or name not in now:
            return f"its vectors are of another table ({name} is {'new' if name in now else 'missing'})"
        if before[name] != now[name]:
            labels = ("bytes", "time of change", "rows")
            what = next(w for w, a, b in zip(labels, before[name], now[name], strict=True) if a != b)
            return f"its vectors are of another table ({name} has another {what})".replace(
                "another bytes", "another size"
            )
    return ""


def _clear(out: Path) -> None:
    """Remove the embeddings of a folder, the plan last: after a kill in between the other files are still recognised."""
    (out / LIST_FILE).unlink(missing_ok=True)
    for path in (*out.iterdir(), *(out / WORK_FOLDER).glob("done-*")):
        if path.is_file():
            path.unlink()
    (out / WORK_FOLDER / "plan.json").unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    for path in (out / WORK_FOLDER).glob("shard-*"):
        shutil.rmtree(path)
    for path in (*out.glob(".*.tmp"), *(out / WORK_FOLDER).glob(".*.tmp")):
        path.unlink()


@contextmanager
def _locked(lock: BinaryIO, byte: int) -> Iterator[None]:
    """Hold the exclusive lock of a byte within the block; wait for it."""
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, byte)
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)


def _try_lock(lock: BinaryIO, byte: int) -> bool:
    """Take the exclusive lock of a byte, and return True; False if another process holds it."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    return True
