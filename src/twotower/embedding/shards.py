"""Shards of a bulk embedding: their files, the types of their ids, and the list of all."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import polars as pl

from twotower import files
from twotower.embedding.folder import EMBEDDINGS_FORMAT, IDS_FILE, LIST_FILE, VECTORS_FILE, WORK_FOLDER, part_names
from twotower.errors import DataError
from twotower.files.readers import file_digest
from twotower.files.sharded_work import JsonObject, ShardedWork, ShardFormat
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
    """The work of one process in a folder of embeddings."""

    format: ClassVar[ShardFormat] = ShardFormat(
        EMBEDDINGS_FORMAT,
        "vectors",
        WORK_FOLDER,
        LIST_FILE,
        re.compile(r"part-\d+\.npy|ids-\d+\.parquet"),
        {
            "side": "of the other side", "model": "of another model", "schema": "of another schema",
            "precision": "in another precision", "shard_rows": "in shards of another size (`shard_rows`)",
            "form": "of text read with another `separator` or other `columns`",
        },
        frozenset({VECTORS_FILE, IDS_FILE}),
    )  # fmt: skip

    def publish_shard(self, number: int, folder: Path, rows: int, width: int, kind: str) -> None:
        """Move the files of a shard to their place, and write its record; a shard of no rows has a record only."""
        names = dict(zip((VECTORS_FILE, IDS_FILE), part_names(number), strict=True)) if rows else {}
        self.publish_files(number, folder, names, {"rows": rows, "width": width, "id": kind})

    def finish(self, metric: str) -> tuple[int, bool]:
        """Write the list of shards if all are finished; return the number of finished rows, and True if it was written."""
        with self.locked():
            done = self.records()
            rows = sum(r["rows"] for r in done)
            if len(done) < self.shards or not rows or not self._unify_id_types(done):
                return rows, False
            records = [r for r in self.records() if r["rows"]]
            about = self.plan | {
                "twotower": __version__, "metric": metric, "rows": rows, "width": records[0]["width"],
                "id": records[0]["id"],
                "shards": [{"vectors": r["files"][0][0], "ids": r["files"][1][0], "rows": r["rows"]} for r in records],
            }  # fmt: skip
            return rows, self.write_list(about)

    def _unify_id_types(self, records: list[JsonObject]) -> bool:
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
                    self.write_record(number, record | {"id": str(common)})
        return True
