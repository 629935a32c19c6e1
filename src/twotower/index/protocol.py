"""What every index can do. Rows are whole numbers from 0, each at most once; a score is query · vector, more is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

Metric = Literal["cosine", "dot"]
Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


MilvusType = Literal["FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"]


CONNECT_TIMEOUT = 3.0
"""Seconds that a connection to Milvus may take."""


@dataclass(frozen=True)
class MilvusLocation:
    """Where an index of kind "milvus" keeps its vectors."""

    uri: str
    """`http://HOST:PORT` of a server, or a path ending in .db, which milvus-lite opens in this process."""
    prefix: str = "twotower"
    """The alias, and how names of collections begin."""
    type: MilvusType = "IVF_FLAT"
    timeout: float = 300.0
    """Seconds that one step of building may take."""
    model: str = ""
    """Digest of the model whose vectors they are."""
    on_create: Callable[[str], None] = lambda name: None
    """Told the name of a collection before it is made."""
    connect_timeout: float = CONNECT_TIMEOUT
    """Seconds that the connection may take."""


class Index(Protocol):
    """Item vectors (N, D) under their rows, and the search for the best of them.

    Not to be changed while another thread searches; any number of threads may search at once.
    """

    kind: ClassVar[str]
    remote: ClassVar[bool]
    """Whether vectors are elsewhere: a search waits for another process, and raises Unavailable if it does not answer."""
    metric: Metric
    params: dict[str, int]
    """What it was built with."""
    search_params: dict[str, int]
    """How hard a search tries, by knob: `nprobe`, `ef`, `refine`. Empty if it is exact."""
    threads: int
    """Threads of one search. A server that answers requests side by side sets 1."""

    @property
    def rows(self) -> Rows:
        """The rows (N,) that can be found, rising."""

    @property
    def rejected(self) -> Rows:
        """The rows, rising, whose vectors were refused: not finite, too long, or for "cosine" of no length."""

    @property
    def width(self) -> int:
        """D."""

    def __len__(self) -> int: ...

    def vectors(self, rows: Rows) -> Vectors:
        """The vectors (n, D) of rows (n,). Raises DataError for unknown rows."""

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: Rows | None = None,
        banned: Sequence[Rows] | None = None,
        exact: bool = False,
    ) -> tuple[Rows, Vectors]:
        """The best `k` rows (B, k) of each query (B, D) and their scores (B, k), best first.

        Equal scores are ordered by row. `allowed` holds for all queries, `banned[i]` for query i; rows that are not in
        the index are ignored in both. Where fewer than `k` rows remain, all of them are found and the end is filled
        with row -1, score -inf. `exact` looks at every vector. Raises DataError.
        """

    def scores(self, query: Vectors) -> Vectors:
        """The products (N,) of a query (1, D) with the vector of every one of `rows`, summed in float32. Raises DataError."""

    def add(self, rows: Rows, vectors: Vectors) -> None:
        """Put new rows in. Raises DataError if a row is there already."""

    def update(self, rows: Rows, vectors: Vectors) -> None:
        """Replace the vectors of rows; a row whose new vector is rejected is gone. Raises DataError for unknown rows."""

    def remove(self, rows: Rows) -> None:
        """Take rows out. Raises DataError for unknown rows."""

    def search_limits(self) -> dict[str, int]:
        """The largest useful value of every knob in `search_params`, in the order in which to tune them."""

    def save(self, folder: Path) -> None:
        """Write the index as a folder of its own. Raises RunError."""

    def describe(self) -> dict[str, Any]:
        """What `index.json` says."""
