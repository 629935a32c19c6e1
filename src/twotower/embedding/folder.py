"""Reader of a folder of embeddings that `twotower embed` has written. Vectors are memory-mapped and read in blocks.

embedding.json          side, model and precision, and the list of shards; written when all are complete
part-00000.npy          vectors of a shard (rows, D), float32 or float16
ids-00000.parquet       their ids in the same order, in the column `id`; of one type in all shards
work/                   state from which a later call of `embed` continues; readers ignore it
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.errors import ConfigError, RunError, first_line
from twotower.files.readers import read_array, read_json
from twotower.files.sharded_work import JsonObject
from twotower.files.urls import is_url

LIST_FILE, WORK_FOLDER = "embedding.json", "work"
EMBEDDINGS_FORMAT = 1

StoredVectors = npt.NDArray[np.float32 | np.float16]


def part_names(shard_index: int) -> tuple[str, str]:
    """Return the names of a shard's files: vectors and ids."""
    return f"part-{shard_index:05d}.npy", f"ids-{shard_index:05d}.parquet"


class EmbeddingPart(NamedTuple):
    """The two files of a shard, and its number of rows."""

    vectors: Path
    ids: Path
    rows: int

    def open(self) -> StoredVectors:
        """Return the vectors (rows, D), mapped and read-only. Raises RunError if the file is missing or damaged."""
        try:
            found: StoredVectors = read_array(self.vectors, "r")
        except (OSError, ValueError, EOFError) as e:
            raise RunError(f"{self.vectors}: missing or damaged ({e}); embed again to repair it") from None
        if found.ndim != 2 or len(found) != self.rows:
            raise RunError(
                f"{self.vectors}: holds {found.shape}, expected {self.rows:,} rows of vectors; embed again to repair it"
            )
        return found

    def read_ids(self, wanted: pl.Expr) -> pl.DataFrame:
        """Return an expression of the column `id`. Raises RunError if the file is missing or damaged."""
        try:
            return pl.scan_parquet(self.ids, glob=False).select(wanted).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as e:
            raise RunError(f"{self.ids}: missing or damaged ({first_line(e)}); embed again to repair it") from None


class EmbeddingsFolder:
    """The vectors and ids of a whole table: `len(folder)` rows of `folder.width`, `for ids, vectors in folder.blocks()`.

    `about` is the content of embedding.json: side, metric, model (the digest in the run's model.json), precision and more.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open a folder. Raises RunError if it holds no vectors, or not yet all of them, ConfigError for a URL."""
        if is_url(folder):
            raise ConfigError(
                f"{folder}: an address, and vectors are read from a disk; copy its files to a folder, and name that"
            )
        self.folder = at = Path(folder)
        if not (listed := at / LIST_FILE).exists():
            if (at / WORK_FOLDER).exists():
                raise RunError(f"{at}: not all vectors are written yet ({LIST_FILE} is missing); call embed again")
            raise RunError(f"{at}: holds no vectors ({LIST_FILE} is missing); name a folder that embed wrote")
        self.about: JsonObject = read_json(listed)
        if not isinstance(self.about, dict) or self.about.get("format") != EMBEDDINGS_FORMAT:
            raise RunError(f"{listed}: not a list of shards that this version reads ({EMBEDDINGS_FORMAT})")
        try:
            shards = self.about["shards"]
            self.parts = [EmbeddingPart(at / s["vectors"], at / s["ids"], int(s["rows"])) for s in shards]
            first = self.parts[0].open()
        except (LookupError, TypeError, ValueError) as e:
            raise RunError(f"{listed}: damaged ({e!r}); embed again to repair it") from None
        self.width, self.dtype = first.shape[1], first.dtype

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def blocks(self, rows: int = 65_536) -> Iterator[tuple[pl.Series, StoredVectors]]:
        """Yield ids (n,) and their vectors (n, D), at most `rows` at a time, in the order of the table. Raises RunError."""
        for part in self.parts:
            vectors, at, step = part.open(), 0, max(rows, 1 << 20)
            if (n := part.read_ids(pl.len()).item()) != len(vectors):
                raise RunError(f"{part.ids}: holds {n:,} ids, expected {len(vectors):,}; embed again to repair it")
            for first in range(0, n, step):
                for some in part.read_ids(pl.col("id").slice(first, step)).iter_slices(rows):
                    yield some["id"], vectors[at : at + len(some)]
                    at += len(some)
