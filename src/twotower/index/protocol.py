"""The protocol of all indexes. Rows are distinct integers from 0; a score is the inner product of query and vector, higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from twotower.arrays.types import Rows, Vectors
from twotower.index.description import IndexDescription
from twotower.index.vector_store import Metric


class Index(Protocol):
    """Item vectors (N, D) under their rows, and the search for the highest scores.

    Any number of threads may search at once, but none while another thread changes the index.
    """

    kind: ClassVar[str]
    remote: ClassVar[bool]
    """True if another process holds the vectors: then a search raises Unavailable if that process does not answer."""
    metric: Metric
    params: dict[str, int]
    """Parameters of the build, such as `nlist`, `m`."""
    search_params: dict[str, int]
    """Parameters of a search: `nprobe`, `ef`, `refine`. Larger values find more and take longer. Empty for an exact index."""
    threads: int
    """Threads of one search; 1 in a server with several workers."""

    @property
    def rows(self) -> Rows:
        """Rows (N,) in the index, ascending."""

    @property
    def rejected(self) -> Rows:
        """Rows of rejected vectors, ascending: not finite, too long, or of norm 0 with metric "cosine"."""

    @property
    def width(self) -> int:
        """Vector dimension D."""

    @property
    def model(self) -> str:
        """SHA-256 of the model that made the vectors; empty if the index does not keep it."""

    def __len__(self) -> int: ...

    def vectors(self, rows: Rows) -> Vectors:
        """Return the vectors (n, D) of rows (n,). Raises DataError for unknown rows."""

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        allowed: Rows | None = None,
        banned: Sequence[Rows] | None = None,
        exact: bool = False,
    ) -> tuple[Rows, Vectors]:
        """Return the `k` rows (B, k) with the highest scores (B, k) for each query (B, D), in descending order.

        Equal scores are ordered by row. `allowed` applies to all queries, `banned[i]` to query i; rows that are not in
        the index are ignored in both. If fewer than `k` rows remain, all of them are returned, padded with row -1 and
        score -inf. `exact` scores every vector. Raises DataError.
        """

    def scores(self, query: Vectors) -> Vectors:
        """Return the scores (N,) of a query (1, D) for all `rows`, summed in float32. Raises DataError."""

    def add(self, rows: Rows, vectors: Vectors) -> None:
        """Add rows (n,) with vectors (n, D). Raises DataError if a row exists."""

    def update(self, rows: Rows, vectors: Vectors) -> None:
        """Replace the vectors of rows; a row with a rejected vector leaves the index. Raises DataError for unknown rows."""

    def remove(self, rows: Rows) -> None:
        """Remove rows. Raises DataError for unknown rows."""

    def search_limits(self) -> dict[str, int]:
        """Return the largest useful value of each of `search_params`, in the order in which to tune them."""

    def save(self, folder: Path) -> None:
        """Write the index into a folder. Raises RunError."""

    def describe(self) -> IndexDescription:
        """Return the content of `index.json`."""
