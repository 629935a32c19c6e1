"""Shards of a bulk embedding: their files, the types of their ids, and the list of all."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

import polars as pl

from twotower import files
from twotower.embedding.folder import EMBEDDINGS_FORMAT, IDS_FILE, LIST_FILE, VECTORS_FILE, WORK_FOLDER
from twotower.errors import DataError
from twotower.files.shard_folders import JsonObject
from twotower.files.sharded_work import ShardedWork, ShardFormat
from twotower.version import __version__


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
        frozenset({VECTORS_FILE, IDS_FILE}),
    )  # fmt: skip

    def finish(self, metric: str, records: Sequence[JsonObject]) -> None:
        """Give the ids of all shards one type, and write the list of shards. One of them has rows."""
        records = [record for record in self._with_one_type(records) if record["rows"]]
        about = self.plan | {
            "twotower": __version__, "metric": metric, "rows": sum(r["rows"] for r in records), "width": records[0]["width"],
            "id": records[0]["id"],
            "shards": [{"vectors": r["files"][0][0], "ids": r["files"][1][0], "rows": r["rows"]} for r in records],
        }  # fmt: skip
        self.write_list(about)

    def _with_one_type(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """Convert the ids of all shards to one type, which holds all of them, and return the records."""
        kind = str(common := common_type({r["id"] for r in records if r["rows"]}))
        out = list(records)
        for number, record in enumerate(records):
            if record["rows"] and record["id"] != kind:
                vectors, (name, *_) = record["files"]
                with self.scratch(f"shard-{number:05d}-") as folder:
                    path = folder / IDS_FILE
                    save_ids([self.at.fetched(name, folder)], common, path)
                    files.point("shard.ids")
                    ids = [*self.replace_file(path, name)]
                    files.point("shard.ids_renamed")
                    out[number] = record | {"id": kind, "files": [vectors, ids]}
                    self.write_record(number, out[number])
        return out
