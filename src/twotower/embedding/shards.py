"""Shards of a bulk embedding: their files, the types of their ids, and the list of all."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

import polars as pl

from twotower import files
from twotower.embedding.folder import EMBEDDINGS_FORMAT, LIST_FILE, WORK_FOLDER
from twotower.errors import DataError
from twotower.files.shard_folders import JsonObject
from twotower.files.sharded_work import ShardedWork, ShardFormat
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

    format: ClassVar[ShardFormat] = ShardFormat(
        EMBEDDINGS_FORMAT,
        "vectors",
        WORK_FOLDER,
        LIST_FILE,
        re.compile(r"part-\d+\.npy|ids-\d+\.parquet"),
        {
            "side": "of the other side", "model": "of another model", "schema": "of another schema",
            "precision": "in another precision", "shard_rows": "in shards of another size (`shard_rows`)",
            "form": "of text read with another `separator` or `decimal`, or other `columns`",
        },
    )  # fmt: skip

    def finish(self, metric: str, records: Sequence[JsonObject]) -> None:
        """Give the ids of all shards one type, and write the list of shards. One of them has rows."""
        common = common_type({record["id"] for record in records if record["rows"]})
        found = [self._of_type(common, number, record) for number, record in enumerate(records) if record["rows"]]
        self.write_list(self.plan | {
            "twotower": __version__, "metric": metric, "rows": sum(r["rows"] for r in found), "width": found[0]["width"],
            "id": found[0]["id"],
            "shards": [{"vectors": r["files"][0][0], "ids": r["files"][1][0], "rows": r["rows"]} for r in found],
        })  # fmt: skip

    def _of_type(self, kind: pl.DataType, number: int, record: JsonObject) -> JsonObject:
        """Return the record of a shard, whose ids are converted to a type that holds them, unless they have it."""
        if record["id"] == str(kind):
            return record
        vectors, (name, *_) = record["files"]
        with self.scratch(f"shard-{number:05d}-") as folder:
            save_ids([self.at.fetched(name, folder)], path := folder / name, kind)
            files.point("shard.ids")
            ids = [*self.replace_file(path, name)]
            files.point("shard.ids_renamed")
            self.write_record(number, record := record | {"id": str(kind), "files": [vectors, ids]})
        return record
