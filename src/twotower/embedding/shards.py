"""Shards of a bulk embedding: their files, the types of their ids, and the list of all."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import polars as pl

from twotower.data.table_path import TablePath
from twotower.embedding.folder import EMBEDDINGS_FORMAT, LIST_FILE, WORK_FOLDER, part_names
from twotower.errors import DataError
from twotower.files.sharded_work import JsonObject, ShardedWork
from twotower.version import __version__


def common_type(types: Collection[str]) -> pl.DataType:
    """Return the type that holds ids of all these types: text, if one of them is text."""
    if len(types) == 1:
        return pl.Int64() if "Int64" in types else pl.UInt64() if "UInt64" in types else pl.String()
    return pl.String() if "String" in types else pl.UInt64()


def save_ids(parts: list[Path], path: Path, kind: pl.DataType | None = None) -> str:
    """Write the concatenated column `id` of all parts with type `kind`, None for that which holds all of them, and return the type. Raises
    DataError if the type cannot hold an id."""
    scans = [pl.scan_parquet(part, glob=False) for part in parts]
    kind = kind or common_type({str(scan.collect_schema()["id"]) for scan in scans})
    try:
        pl.concat([scan.select(pl.col("id").cast(kind)) for scan in scans]).sink_parquet(path)
    except pl.exceptions.InvalidOperationError:
        raise DataError(
            "some ids are negative and some are from 2**63 on, which no integer type holds together; give them as text"
        ) from None
    return str(kind)


class EmbeddingWork(ShardedWork):
    """The work in a folder of embeddings."""

    version, noun, work_folder, list_file = EMBEDDINGS_FORMAT, "vectors", WORK_FOLDER, LIST_FILE
    shard_files = r"part-\d+\.npy|ids-\d+\.parquet"

    def finish(self, metric: str, records: Sequence[JsonObject]) -> None:
        """Give the ids of all shards one type, and write the list of shards. One of them has rows."""
        kind = common_type({record["id"] for record in records if record["rows"]})
        shards = list[JsonObject]()
        for number, record in enumerate(records):
            if record["rows"]:
                self._convert_ids(number, record, kind)
                vectors, ids = part_names(number)
                shards.append({"vectors": vectors, "ids": ids, "rows": record["rows"]})
        self.write_list(self.plan | {
            "twotower": __version__, "metric": metric, "rows": sum(s["rows"] for s in shards),
            "width": max(r["width"] for r in records), "id": str(kind), "shards": shards,
        })  # fmt: skip

    def _convert_ids(self, number: int, record: JsonObject, kind: pl.DataType) -> None:
        """Give the ids of a shard a type that holds them, unless they have it."""
        if record["id"] == str(kind):
            return
        _, name = part_names(number)
        with self.scratch(f"shard-{number:05d}") as folder:
            with TablePath(self.at.place / name).open() as ids, (folder / "copy").open("wb") as copy:
                shutil.copyfileobj(ids, copy)
            save_ids([folder / "copy"], made := folder / name, kind)
            entry = self.put(made)
        entries = [entry if other[0] == name else other for other in record["files"]]
        self.write_record(number, record | {"id": str(kind), "files": entries})
