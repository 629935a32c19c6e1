"""Columns of ids and texts that are searched by row and by value."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator
from operator import index
from typing import Generic, SupportsIndex, TypeVar, overload

import numpy as np
import numpy.typing as npt
import polars as pl

from twotower.arrays.types import Ints, ItemId, ItemRow, UserId, UserRow

Text = TypeVar("Text", bound=str)
Row = TypeVar("Row", bound=int)
CACHED_ROWS = 16_384
"""Largest number of ids whose rows are cached."""


class TextColumn(abc.Sequence[Text]):
    """A text column as a sequence of texts, converted on access: a million Python strings take a second to make."""

    def __init__(self, column: pl.Series) -> None:
        self.column = column.cast(pl.String)

    def __len__(self) -> int:
        return len(self.column)

    def __iter__(self) -> Iterator[Text]:
        return iter(self.column)

    @overload
    def __getitem__(self, row: SupportsIndex) -> Text: ...
    @overload
    def __getitem__(self, row: slice) -> list[Text]: ...
    def __getitem__(self, row: SupportsIndex | slice) -> Text | list[Text]:
        if isinstance(row, slice):
            return self.column[row].to_list()
        text: Text = self.column[index(row)]
        return text


class IdColumn(TextColumn[Text], Generic[Text, Row]):
    """The external ids of one side as text by row, and the row of an id.

    Sorted hashes replace a dict: numpy and polars create and free them as arrays, without the interpreter's lock.
    """

    def __init__(
        self,
        column: pl.Series,
        row_type: Callable[[int], Row],
        hash_ids: Callable[[pl.Series], npt.NDArray[np.uint64]] | None = None,
    ) -> None:
        """Index the ids of a column, in rows of `row_type`. `hash_ids` maps texts (n,) to hashes (n,); None: polars'
        hashes."""
        super().__init__(column)
        self._unknown = row_type(-1)
        self._hash_ids = hash_ids or _hashes
        hashes = self._hash_ids(self.column)
        self._order: Ints = np.argsort(hashes)
        self._hashes = hashes[self._order]
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        self._cached_rows: dict[Text, Row] = {}
        # Rows of ids that share a hash. A million ids have such a pair with a chance of one in thirty million.
        shared = np.sort(self._order[np.union1d(same, same + 1)])
        self._rows_of_shared_hashes: dict[Text, Row] = {self[row]: row for row in shared.tolist()}

    def row(self, external_id: Text) -> Row | None:
        """Return the row of an id, None for an unknown one."""
        row = self._cached_rows.get(external_id)
        if row is None:
            row = self.rows([external_id])[0]
        return None if row < 0 else row

    def find(self, texts: pl.Series) -> Ints:
        """Return the row of each text (n,) of a column, -1 for unknown ones, as an array: for many ids at once."""
        if not len(self) or not len(texts):
            return np.full(len(texts), -1, np.int64)
        at = np.minimum(np.searchsorted(self._hashes, self._hash_ids(texts)), len(self) - 1)
        rows: Ints = self._order[at]
        rows = np.where((self.column.gather(rows) == texts).fill_null(False).to_numpy(), rows, -1)
        if self._rows_of_shared_hashes:
            for text, row in self._rows_of_shared_hashes.items():
                rows[(texts == text).fill_null(False).to_numpy()] = row
        return rows

    def rows(self, ids: abc.Sequence[Text]) -> list[Row]:
        """Return the row of each id, -1 for unknown ones. The latest results for known ids are cached."""
        cached = self._cached_rows
        rows = [cached.get(i) for i in ids]
        if missing := [i for i, row in zip(ids, rows, strict=True) if row is None]:
            found = self._look_up(missing)
            if len(cached) + len(missing) > CACHED_ROWS:
                cached.clear()
            if len(missing) <= CACHED_ROWS:
                cached.update((i, row) for i, row in zip(missing, found, strict=True) if row >= 0)
            left = iter(found)
            return [next(left) if row is None else row for row in rows]
        return [row for row in rows if row is not None]

    def _look_up(self, ids: abc.Sequence[Text]) -> list[Row]:
        if not len(self):
            return [self._unknown] * len(ids)
        try:
            texts = pl.Series(ids, dtype=pl.String)
        except ValueError:  # a lone surrogate, which no id has
            texts = pl.Series([i.encode(errors="replace").decode() for i in ids])
        at = np.minimum(np.searchsorted(self._hashes, self._hash_ids(texts)), len(self) - 1)
        found: list[Row] = self._order[at].tolist()
        rows = [row if self.column[row] == i else self._unknown for i, row in zip(ids, found, strict=True)]
        if not self._rows_of_shared_hashes:
            return rows
        return [self._rows_of_shared_hashes.get(i, row) for i, row in zip(ids, rows, strict=True)]


UserIds = IdColumn[UserId, UserRow]
ItemIds = IdColumn[ItemId, ItemRow]


def _hashes(column: pl.Series) -> npt.NDArray[np.uint64]:
    return column.to_frame().hash_rows().to_numpy()
