"""Nearest items of an item, by the cosine of their vectors without the bias columns."""

from __future__ import annotations

import numpy as np

from twotower.arrays.types import Floats, Ints, ItemRow
from twotower.index import Index
from twotower.index.top_k import TopK, best, kth_largest

NORM_BLOCK_ROWS = 2**13
"""Vectors whose norms are computed at a time."""


class Neighbours:
    """Finds nearest items in an index. The norms of a local index are computed once."""

    def __init__(self, index: Index, bias: bool, similarity: str) -> None:
        """`bias`: the last two columns of the vectors are biases. `similarity` of the model: "cosine" or "dot"."""
        self._index, self._bias, self._cosine = index, bias, similarity == "cosine"
        self._rows = np.empty(0, np.int64) if index.remote else index.rows
        self._norms = np.empty(len(self._rows), np.float32)
        for start in range(0, len(self._rows), NORM_BLOCK_ROWS):
            part = slice(start, start + NORM_BLOCK_ROWS)
            self._norms[part] = _norms(self._without_bias(self._rows[part]))

    @property
    def broken_row(self) -> ItemRow | None:
        """Row of a local index whose vector is not finite, None if all are."""
        broken = self._rows[~np.isfinite(self._norms)]
        return ItemRow(broken[0]) if len(broken) else None

    def nearest(self, row: ItemRow, k: int) -> TopK | None:
        """Return the other rows (n,) of highest cosine to a row, at most `k`, and the cosines (n,), in descending order.

        Equal cosines are ordered by row. None if the row is not in the index. Raises Unavailable.
        """
        query = self._without_bias(np.array([row]))
        if not len(query):
            return None
        query /= np.maximum(np.linalg.norm(query), 1e-12)
        rows, cosines = self._nominate(query, k)
        at = int(np.searchsorted(rows, row))
        found = int(at < len(rows) and rows[at] == row)
        cosines[at : at + found] = -np.inf
        kept = np.flatnonzero(cosines >= kth_largest(cosines, k))
        return best(rows[kept], cosines[kept], min(k, len(rows) - found))

    def unit_vectors(self, rows: Ints) -> Floats:
        """Return the vectors (n, D) of rows (n,) of the index, of norm 1, without the bias columns."""
        vectors = self._index.vectors(rows)
        if self._bias:
            vectors = vectors[:, :-2]
        norms = _norms(vectors) if self._index.remote else self._norms[np.searchsorted(self._rows, rows)]
        return vectors / norms[:, None]

    def _nominate(self, query: Floats, k: int) -> tuple[Ints, Floats]:
        """Return rows (n,) that include the `k` nearest to a unit vector (1, D), and their cosines (n,)."""
        if not self._index.remote:
            return self._rows, self._index.scores(query) / self._norms
        # The index ranks by inner product; if norms differ, more candidates are needed to include the highest cosines.
        n = min(len(self._index), k + 1 if self._cosine else 8 * k + 64)
        rows = np.sort(self._index.search(query, n)[0][0])
        rows = rows[rows >= 0]
        vectors = self._without_bias(rows)
        return rows, (vectors @ query[0]) / _norms(vectors)

    def _without_bias(self, rows: Ints) -> Floats:
        """Return the vectors (n, D) of rows of the index, with zeros in the bias columns."""
        vectors = np.array(self._index.vectors(rows), np.float32)
        if self._bias:
            vectors[:, -2:] = 0
        return vectors


def _norms(vectors: Floats) -> Floats:
    """Return the norms (n,) of vectors (n, D), at least 1e-12."""
    norms: Floats = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    return norms
