"""Work in shards that processes on one file system share, and that a later call goes on with.

Under the folder of vectors: work/plan.json (what is embedded), work/done-00000.json (a shard's record, written after its
files), work/shard-00000/ (one being made), work/lock. A shard's lock is one
byte of work/lock. Kernel locks are released when a process dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

import twotower
from twotower import files
from twotower.embeddings_folder import EMBEDDINGS_FORMAT, IDS_FILE, LIST_FILE, VECTORS_FILE, WORK_FOLDER, part_names
from twotower.errors import DataError, RunError

HOW_TO_OVERWRITE = "choose another folder, or start over with `overwrite=True`"
_SHARD_FILES = re.compile(r"part-\d+\.npy|ids-\d+\.parquet")
_FOLDER, _USE, _SHARDS = (
    0,
    1,
    2,
)  # bytes of work/lock: plan and list; being at work here at all; from here on the shards


@dataclass(frozen=True)
class TableFile:
    """A file of a table: where it is, its name within the table, its rows (None for text, which has to be read for that)."""

    path: Path
    name: str
    rows: int | None

    def state(self) -> list[Any]:
        """Return name, bytes, time of change and rows, which change with the file."""
        found = self.path.stat()
        return [self.name, found.st_size, found.st_mtime_ns, self.rows]


@dataclass(frozen=True)
class TableShard:
    """Rows `start` to `start + rows` of a file; `rows` None is the whole of a text file."""

    number: int
    file: TableFile
    start: int
    rows: int | None


def cut_into_shards(sources: list[TableFile], rows: int) -> list[TableShard]:
    """Shards of at most `rows` rows, in the order of the files; none for a file without rows."""
    shards: list[TableShard] = []
    for file in sources:
        if file.rows is None:
            shards.append(TableShard(len(shards), file, 0, None))
            continue
        for start in range(0, file.rows, rows):
            shards.append(TableShard(len(shards), file, start, min(rows, file.rows - start)))
    return shards


def check_folder(out: Path) -> None:
    """Raises RunError unless `out` is new, empty, or holds vectors and nothing else."""
    if not out.exists():
        return
    known = {VECTORS_FILE, IDS_FILE, LIST_FILE, WORK_FOLDER}
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else [out.name]
    strange = [n for n in names if not (out.is_dir() and (n in known or _SHARD_FILES.fullmatch(n) or _temporary(n)))]
    if strange:
        raise RunError(f"{out}: not a folder of vectors (it holds {strange[0]}); choose another folder")


def _temporary(name: str) -> bool:
    return re.fullmatch(r"\.embedding\.json\.\d+\.tmp", name) is not None


def common_type(types: Collection[str]) -> pl.DataType:
    """The type that ids of all these can have: one that is no integer makes all of them text."""
    if len(types) == 1:
        return pl.Int64() if "Int64" in types else pl.UInt64() if "UInt64" in types else pl.String()
    return pl.String() if "String" in types else pl.UInt64()


def save_ids(parts: list[Path], kind: pl.DataType, path: Path) -> None:
    """The column `id` of all parts, one after the other. Raises DataError if `kind` does not hold them."""
    try:
        pl.concat([pl.scan_parquet(p, glob=False).select(pl.col("id").cast(kind)) for p in parts]).sink_parquet(path)
    except pl.exceptions.InvalidOperationError:
        raise DataError(
            "some ids are negative and some are from 2**63 on, which no type of integers holds; give them as text"
        ) from None


class Work:
    """Being at work in a folder of vectors, from `begin` until the block ends."""

    def __init__(self, out: Path, lock: BinaryIO, plan: dict[str, Any], shards: int) -> None:
        self.out, self.folder, self.plan, self.shards = out, out / WORK_FOLDER, plan, shards
        self.complete = (out / LIST_FILE).exists()
        self._lock = lock

    @classmethod
    @contextmanager
    def begin(cls, out: Path, plan: dict[str, Any], shards: int, overwrite: bool) -> Iterator[Work]:
        """Start on `plan`, or go on with it. Raises RunError if the folder holds anything else, or vectors of another
        plan: with `overwrite` they are removed, unless a process is still making them."""
        check_folder(out)
        plan = {"format": EMBEDDINGS_FORMAT} | plan
        try:
            (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
            with (out / WORK_FOLDER / "lock").open("a+b") as lock:
                with _held(lock, _FOLDER):
                    alone = _take(lock, _USE)
                    if alone:  # nobody else is at work: what is half made, a killed process left
                        _sweep(out)
                    if why := _difference(out, plan):
                        if not overwrite:
                            raise RunError(f"{out}: {why}; {HOW_TO_OVERWRITE}")
                        if not alone:
                            raise RunError(f"{out}: {why}, and another call is at work there; let it end, or stop it")
                        _clear(out)
                    if not (out / WORK_FOLDER / "plan.json").exists():
                        files.write_json(out / WORK_FOLDER / "plan.json", plan)
                    fcntl.lockf(lock, fcntl.LOCK_SH, 1, _USE)
                yield cls(out, lock, plan, shards)
        except OSError as e:
            no_locks = e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
            hint = "; choose a folder on a file system with locks" if no_locks else ""
            raise RunError(f"{out}: cannot be written ({e.strerror or e}){hint}") from e

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Yield True with the shard locked until the block ends, False if another process holds it."""
        if not _take(self._lock, _SHARDS + number):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _SHARDS + number)

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the record of a finished shard, None without one."""
        try:
            found = files.read_json(self._record(number))
        except RunError:
            return None
        return found if isinstance(found, dict) else None

    def sound(self, number: int) -> bool:
        """True if the digests of a finished shard's files are those of its record."""
        record = self.record(number)
        return record is not None and all(
            (path := self.out / name).is_file() and path.stat().st_size == size and _digest(path) == digest
            for name, size, digest in record.get("files", [["", 0, ""]])
        )

    def forget(self, number: int) -> None:
        """A finished shard that is to be made again."""
        with _held(self._lock, _FOLDER):
            (self.out / LIST_FILE).unlink(missing_ok=True)
            self._record(number).unlink(missing_ok=True)

    @contextmanager
    def making(self, number: int) -> Iterator[Path]:
        """A temporary folder for a shard's vectors.npy and ids.parquet."""
        folder = self.folder / f"shard-{number:05d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, number: int, folder: Path, rows: int, width: int, kind: str) -> None:
        """A made shard becomes a finished one; of no rows, only its record is kept."""
        written = []
        for made, name in zip((VECTORS_FILE, IDS_FILE), part_names(number), strict=True):
            if rows:
                files.sync(folder / made)
                written.append([name, (folder / made).stat().st_size, _digest(folder / made)])
                files.point("shard.file")
                os.replace(folder / made, self.out / name)
        files.point("shard.files")
        files.sync(self.out)
        record = {"rows": rows, "width": width, "id": kind, "files": written}
        files.write_json(self._record(number), record)

    def finish(self, metric: str) -> tuple[int, bool]:
        """Write the list if every shard is finished; gives the rows of those that are, and whether it was written now."""
        with _held(self._lock, _FOLDER):
            found = [self.record(i) for i in range(self.shards)]
            done = [r for r in found if r]
            rows = sum(r["rows"] for r in done)
            if len(done) < self.shards or not rows or not self._one_type(done):
                return rows, False
            records = [r for i in range(self.shards) if (r := self.record(i)) and r["rows"]]
            about = self.plan | {
                "twotower": twotower.__version__, "metric": metric, "rows": rows, "width": records[0]["width"],
                "id": records[0]["id"],
                "shards": [{"vectors": r["files"][0][0], "ids": r["files"][1][0], "rows": r["rows"]} for r in records],
            }  # fmt: skip
            path = self.out / LIST_FILE
            if path.exists() and files.read_json(path) == about:
                return rows, False
            files.write_json(path, about)
            return rows, True

    def _one_type(self, records: list[dict[str, Any]]) -> bool:
        """Make the ids of all shards of one type: an id that is no integer makes all of them text. False if another
        process is looking at a shard that would change: it comes here after us."""
        types = {r["id"] for r in records if r["rows"]}
        if len(types) < 2:
            return True
        common = common_type(types)
        for number, record in enumerate(records):
            if not record["rows"] or record["id"] == str(common):
                continue
            with self.claimed(number) as mine:
                if not mine:
                    return False
                with self.making(number) as folder:
                    path, name = folder / IDS_FILE, record["files"][1][0]
                    save_ids([self.out / name], common, path)
                    files.sync(path)
                    record["files"][1] = [name, path.stat().st_size, _digest(path)]
                    files.point("shard.ids")
                    os.replace(path, self.out / name)
                    files.point("shard.ids_renamed")
                    files.write_json(self._record(number), record | {"id": str(common)})
        return True

    def _record(self, number: int) -> Path:
        return self.folder / f"done-{number:05d}.json"


def clear_folder(out: Path) -> None:
    """Remove all shards of a folder. Raises RunError if it holds anything else, or a process is making them."""
    check_folder(out)
    with (out / WORK_FOLDER / "lock").open("a+b") as lock, _held(lock, _FOLDER):
        if not _take(lock, _USE):
            raise RunError(f"{out}: another call is at work there; let it end, or stop it")
        _clear(out)
        shutil.rmtree(out / WORK_FOLDER)


def _difference(out: Path, plan: dict[str, Any]) -> str:
    """Return the difference between `plan` and that of the folder `out`, as words; an empty string if both agree."""
    path = out / WORK_FOLDER / "plan.json"
    if not path.exists():
        held = [p.name for p in out.iterdir() if p.name != WORK_FOLDER and not p.name.startswith(".")]
        return f"holds other vectors ({min(held)})" if held else ""
    try:
        then = files.read_json(path)
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
            return f"its vectors are of another table ({name} is {'new' if name in now else 'gone'})"
        if before[name] != now[name]:
            labels = ("bytes", "time of change", "rows")
            what = next(w for w, a, b in zip(labels, before[name], now[name], strict=True) if a != b)
            return f"its vectors are of another table ({name} has another {what})".replace(
                "another bytes", "another size"
            )
    return ""


def _clear(out: Path) -> None:
    """The plan goes last: whatever is left by a kill in between is still known as what it is."""
    (out / LIST_FILE).unlink(missing_ok=True)
    for path in (*out.iterdir(), *(out / WORK_FOLDER).glob("done-*")):
        if path.is_file():
            path.unlink()
    (out / WORK_FOLDER / "plan.json").unlink(missing_ok=True)


def _sweep(out: Path) -> None:
    for path in (out / WORK_FOLDER).glob("shard-*"):
        shutil.rmtree(path)
    for path in (*out.glob(".*.tmp"), *(out / WORK_FOLDER).glob(".*.tmp")):
        path.unlink()


@contextmanager
def _held(lock: BinaryIO, byte: int) -> Iterator[None]:
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, byte)
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)


def _take(lock: BinaryIO, byte: int) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
