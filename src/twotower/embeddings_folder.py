"""A folder of vectors that `twotower embed` has made: read in blocks, mapped and not loaded.

embedding.json          what the vectors are of, and the list of shards; there only when all of them are
part-00000.npy          vectors of a shard (rows, D), float32 or float16
ids-00000.parquet       their ids, in the same order, in the column `id`; of one type in all shards
work/                   what a later call goes on from; a reader needs none of it

A table of one shard is vectors.npy and ids.parquet and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from twotower import files
from twotower.errors import RunError

if TYPE_CHECKING:
    import polars as pl

VECTORS_FILE, IDS_FILE = "vectors.npy", "ids.parquet"
LIST_FILE, WORK_FOLDER = "embedding.json", "work"
EMBEDDINGS_FORMAT = 1


def read_array(path: Path, mode: Any = None) -> npt.NDArray[Any]:
    """The array of a .npy file, read, or mapped in the `mode` of a memory map. Raises OSError, ValueError for whatever else
    a file may hold: archives and pickles are not looked into."""
    found: npt.NDArray[Any]
    if mode is not None:
        found = np.lib.format.open_memmap(path, mode)
        return found
    with path.open("rb") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
    return found


def part_names(number: int) -> tuple[str, str]:
    """The files of a shard: vectors and ids."""
    return f"part-{number:05d}.npy", f"ids-{number:05d}.parquet"


@dataclass(frozen=True)
class Part:
    """A shard's two files and its rows."""

    vectors: Path
    ids: Path
    rows: int

    def open(self) -> npt.NDArray[Any]:
        """(rows, D), mapped and read-only. Raises RunError if the file is missing or holds another number of rows."""
        try:
            found: npt.NDArray[Any] = read_array(self.vectors, "r")
        except (OSError, ValueError, EOFError) as e:
            raise RunError(f"{self.vectors}: missing or damaged ({e}); embed again to mend it") from None
        if found.ndim != 2 or len(found) != self.rows:
            raise RunError(f"{self.vectors}: holds {found.shape}, expected {self.rows:,} rows; embed again to mend it")
        return found


class Vectors:
    """The vectors of a whole table and their ids: `len(vectors)`, `vectors.width`, `for ids, block in vectors.blocks()`.

    `about` is embedding.json: side, metric, model (the digest in the run's model.json), precision and more; empty for a
    folder of one shard.
    """

    def __init__(self, folder: Path | str) -> None:
        """Raises RunError if the folder holds no vectors, or not yet all of them."""
        self.folder = Path(folder)
        self.about: dict[str, Any] = {}
        if (self.folder / LIST_FILE).exists():
            self.about = files.read_json(self.folder / LIST_FILE)
            if not isinstance(self.about, dict) or self.about.get("format") != EMBEDDINGS_FORMAT:
                raise RunError(
                    f"{self.folder / LIST_FILE}: not a list of shards that this version reads ({EMBEDDINGS_FORMAT})"
                )
            try:
                shards = self.about["shards"]
                self.parts = [Part(self.folder / s["vectors"], self.folder / s["ids"], int(s["rows"])) for s in shards]
            except (KeyError, TypeError, ValueError) as e:
                raise RunError(f"{self.folder / LIST_FILE}: damaged ({e!r}); embed again to mend it") from None
        elif (self.folder / WORK_FOLDER).exists():
            raise RunError(f"{self.folder}: not all vectors are there yet ({LIST_FILE} is missing); call embed again")
        elif (self.folder / VECTORS_FILE).exists():
            try:
                rows = len(read_array(self.folder / VECTORS_FILE, "r"))
            except (OSError, ValueError, EOFError) as e:
                raise RunError(f"{self.folder / VECTORS_FILE}: damaged ({e}); embed again to mend it") from None
            self.parts = [Part(self.folder / VECTORS_FILE, self.folder / IDS_FILE, rows)]
        else:
            raise RunError(f"{self.folder}: no vectors there; name a folder that embed wrote")
        first = self.parts[0].open()
        self.width, self.dtype = first.shape[1], first.dtype
        self._rows = sum(p.rows for p in self.parts)

    def __len__(self) -> int:
        return self._rows

    def blocks(self, rows: int = 65_536) -> Iterator[tuple[pl.Series, npt.NDArray[Any]]]:
        """Ids (n) and their vectors (n, D), at most `rows` at a time, in the order of the table. Raises RunError."""
        import polars as pl  # an index reads arrays, not tables

        for part in self.parts:
            vectors, at, step = part.open(), 0, max(rows, 1 << 20)
            for first in range(0, part.rows, step):
                try:
                    ids = pl.scan_parquet(part.ids, glob=False).slice(first, step).collect()["id"]
                except (pl.exceptions.PolarsError, OSError) as e:
                    why = str(e).splitlines()[0]
                    raise RunError(f"{part.ids}: missing or damaged ({why}); embed again to mend it") from None
                for start in range(0, len(ids), rows):
                    some = ids.slice(start, rows)
                    yield some, vectors[at : at + len(some)]
                    at += len(some)
            if at != part.rows:
                raise RunError(f"{part.ids}: holds {at:,} ids, expected {part.rows:,}; embed again to mend it")
