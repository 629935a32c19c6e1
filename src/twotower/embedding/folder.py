"""Reader of the vectors of a bulk embedding.

The shards (files/sharded_result.py) have the columns `id`, of the type of the run's ids, and `vector`, D numbers,
float32 or float16. `_embedding.json` lists the shards, and has side, model, metric and precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.data.reading.readers import table_errors
from twotower.data.reading.table_path import TablePath
from twotower.data.reading.table_paths import table_source
from twotower.errors import DataError, RunError
from twotower.files import places

EMBEDDINGS_FORMAT = 2
LIST_FILE = "_embedding.json"
StoredVectors = npt.NDArray[np.float32 | np.float16]


class EmbeddingsFolder:
    """The vectors and ids of a table: `len(folder)` rows of `folder.width`, `for ids, vectors in folder.blocks()`.

    `about` is the content of the list: side, metric, model (the digest in the run's model.json), precision and more."""

    def __init__(self, folder: Path | str) -> None:
        """Open a folder, on a disk or at a URL. Raises RunError if it has no vectors, or not yet all."""
        self.folder = table_source(folder)
        self.about = places.read_json(self.folder / LIST_FILE) or {}
        if self.about.get("format") != EMBEDDINGS_FORMAT:
            raise RunError(f"{folder}: {LIST_FILE} is missing, or of another version; embed again, or name another")
        self.width: int = self.about["width"]

    def __len__(self) -> int:
        return int(self.about["rows"])

    def blocks(self, rows: int = 65_536) -> Iterator[tuple[pl.Series, StoredVectors]]:
        """Yield ids (n,) and their vectors (n, D), at most `rows` at a time, in the order of the table. Raises
        DataError."""
        for shard in self.about["shards"]:
            path = TablePath(self.folder / shard["file"])
            with table_errors(path):
                frame = path.scan().select("id", "vector").collect()
            if len(frame) != shard["rows"]:
                raise DataError(
                    f"{path}: holds {len(frame):,} vectors, expected {shard['rows']:,}; embed again to repair it"
                )
            for some in frame.iter_slices(rows):
                yield some["id"], some["vector"].to_numpy()
