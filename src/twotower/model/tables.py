"""Tables of embeddings: all rows here, or a piece of a table that several ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from twotower.data.batches import Bag, HistoryWindows, Padded, Prefixes
from twotower.model.layers import gather

AnyBag = Bag | Prefixes | HistoryWindows | Padded

NORMAL_BLOCK = 2**20
"""Numbers of a fresh table that are drawn at a time, where it is not kept whole."""


class Table(nn.Embedding):
    """A table (rows, width) that is here."""

    def initialize(self, std: float) -> None:
        """Fresh rows: normal with deviation `std`, zeros if that is 0."""
        if std:
            nn.init.normal_(self.weight, std=std)
        else:
            nn.init.zeros_(self.weight)

    def zero_row(self, row: int) -> None:
        """Put zeros into a row."""
        nn.init.zeros_(self.weight[row])

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (…) -> (…, width)."""
        return gather(self.weight, codes)

    def rows(self, first: int, rows: int) -> Tensor:
        """Rows first, first + 1, …: (rows, width)."""
        return self.weight if len(self.weight) == rows else self.weight[first : first + rows]

    def for_bag(self, first: int, rows: int, bag: AnyBag) -> tuple[Tensor, AnyBag]:
        """A table for the codes of `bag`, which count from the row `first`, and the bag in that table's codes."""
        return self.rows(first, rows), bag


class TableShard(nn.Module):
    """The piece that this rank holds of a table (rows, width): `weight` (rows here, columns here), which may be empty.

    A step reads `found`, the rows of the table that its batch names; `codes` says which they are, rising.
    """

    def __init__(self, rows: int, width: int, weight: nn.Parameter, first_row: int, first_column: int) -> None:
        """`weight` begins at (first_row, first_column) of the table; columns of it beyond `width` stay zero."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, width
        self.weight, self.first_row, self.first_column = weight, first_row, first_column
        self.batch_codes: Tensor | None = None
        self.batch_rows: Tensor | None = None
        for _ in _normal(rows, width, 1.0):  # what `Table` draws as it is made, so that what follows is the same
            pass

    def local_slices(self, rows: slice) -> tuple[slice, slice, slice]:
        """What of the rows a piece holds: which of `rows`, counted from their first, where in the piece, and which
        columns of the table."""
        low = max(rows.start, self.first_row)
        high = max(low, min(rows.stop, self.first_row + len(self.weight)))
        wide = max(0, min(self.embedding_dim - self.first_column, self.weight.shape[1]))
        here = slice(low - self.first_row, high - self.first_row)
        return slice(low - rows.start, high - rows.start), here, slice(self.first_column, self.first_column + wide)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """As `Table.initialize`, with the same numbers."""
        self.weight.zero_()
        if std:
            for rows, drawn in _normal(self.num_embeddings, self.embedding_dim, std):
                self.copy_rows(self.weight, rows, drawn)

    def copy_rows(self, into: Tensor, rows: slice, values: Tensor) -> None:
        """Copy what this rank holds of the table's `rows`, `values` (rows, width), into a tensor like `weight`."""
        theirs, here, columns = self.local_slices(rows)
        wide = columns.stop - columns.start
        if theirs.start < theirs.stop and wide:
            into[here, :wide] = values[theirs, columns].to(into.device)

    @torch.no_grad()
    def zero_row(self, row: int) -> None:
        """As `Table.zero_row`."""
        if 0 <= row - self.first_row < len(self.weight):
            self.weight[row - self.first_row] = 0

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (…) -> (…, width)."""
        found, known = self._batch()
        return gather(found, torch.searchsorted(known, codes))

    def for_bag(self, first: int, rows: int, bag: AnyBag) -> tuple[Tensor, AnyBag]:
        """As `Table.for_bag`: the table is what was found, and as codes keep their order, so does the bag."""
        found, known = self._batch()

        def new(codes: Tensor) -> Tensor:
            return torch.searchsorted(known, codes.long() + first)

        if isinstance(bag, Bag):
            values = new(bag.values).to(bag.values.dtype)
            ends = torch.bincount(values, minlength=len(known)).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends]).to(bag.code_offsets.dtype)
            return found, Bag(values, bag.offsets, bag.rows_by_code, offsets)
        if isinstance(bag, Prefixes):
            return found, Prefixes(new(bag.codes), bag.number, bag.last, bag.length)
        codes = torch.where(bag.codes >= 0, new(bag.codes.clamp(min=0)), -1)
        if isinstance(bag, HistoryWindows):
            return found, HistoryWindows(codes, bag.sequence, bag.place, bag.length)
        return found, Padded(codes)

    def _batch(self) -> tuple[Tensor, Tensor]:
        if self.batch_rows is None or self.batch_codes is None:
            raise RuntimeError("this rank holds a piece of the table only; ask the first rank's model")
        return self.batch_rows, self.batch_codes


AnyTable = Table | TableShard
TableFactory = Callable[[int, int], AnyTable]
"""(rows, width) -> a table, not yet started."""


def named_tables(module: nn.Module) -> Iterator[tuple[str, AnyTable]]:
    """Every table of a model, by its name there."""
    for name, found in module.named_modules():
        if isinstance(found, Table | TableShard):
            yield name, found


def bag_codes(bag: AnyBag) -> Tensor:
    """All codes of a bag, flat; where it is filled up, 0."""
    return (bag.values if isinstance(bag, Bag) else bag.codes.flatten().clamp(min=0)).long()


def _normal(rows: int, width: int, std: float) -> Iterator[tuple[slice, Tensor]]:
    """The numbers that `Tensor.normal_` would put into (rows, width), some rows at a time.

    A CPU draws them in groups of 16, and of what is left over it draws the last 16 again: so all parts but the last are
    whole groups, and the last is no smaller than one.
    """
    step = max(16, NORMAL_BLOCK // width // 16 * 16)
    first = 0
    while first < rows:
        last = first + step
        if rows - last < 16:
            last = rows
        yield slice(first, last), torch.empty(last - first, width).normal_(0, std)
        first = last
