"""Embedding tables: whole on this rank, or sharded over several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from twotower.model.inputs.carriers import Bag, HistoryWindows, Padded, Prefixes
from twotower.model.layers import gather

AnyBag = Bag | Prefixes | HistoryWindows | Padded

NORMAL_BLOCK = 2**20
"""Random numbers drawn at a time for a sharded table, which no rank holds whole."""


class Table(nn.Embedding):
    """Embedding table (rows, width) that this rank holds whole."""

    def initialize(self, std: float) -> None:
        """Initialise the rows: normal with standard deviation `std`; zeros if that is 0."""
        if std:
            nn.init.normal_(self.weight, std=std)
        else:
            nn.init.zeros_(self.weight)

    def zero_row(self, row: int) -> None:
        """Set a row to zeros."""
        nn.init.zeros_(self.weight[row])

    def forward(self, codes: Tensor) -> Tensor:
        """Return the rows at codes (…): (…, width)."""
        return gather(self.weight, codes)

    def rows(self, first: int, rows: int) -> Tensor:
        """Return `rows` rows from the row `first` on: (rows, width)."""
        return self.weight if len(self.weight) == rows else self.weight[first : first + rows]

    def for_bag(self, first: int, rows: int, bag: AnyBag) -> tuple[Tensor, AnyBag]:
        """Return a table for `bag`, whose code 0 is the row `first`, and the bag in codes of that table."""
        return self.rows(first, rows), bag


class EmbeddingShard(nn.Module):
    """This rank's shard of a table (rows, width): `weight` (local rows, local columns), possibly empty.

    A training step reads `batch_rows`, the table rows of its batch in the order of `batch_codes`, which rise.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        weight: nn.Parameter,
        first_row: int,
        first_column: int,
        normal_block: int = NORMAL_BLOCK,
    ) -> None:
        """Take `weight` as the shard that starts at (first_row, first_column) of the table; columns beyond `width` stay zero.
        `normal_block` is the number of random numbers drawn at a time."""
        super().__init__()
        self._normal_block = normal_block
        self.num_embeddings, self.embedding_dim = rows, width
        self.weight, self.first_row, self.first_column = weight, first_row, first_column
        self.batch_codes: Tensor | None = None
        self.batch_rows: Tensor | None = None
        for _ in _normal(rows, width, 1.0, normal_block):  # `Table` draws these too, so later draws are the same
            pass

    def local_slices(self, rows: slice) -> tuple[slice, slice, slice]:
        """Return the overlap of the table's `rows` with this shard: the slice of `rows`, counted from its start, the
        slice of the shard's rows, and the slice of the table's columns."""
        low = max(rows.start, self.first_row)
        high = max(low, min(rows.stop, self.first_row + len(self.weight)))
        wide = max(0, min(self.embedding_dim - self.first_column, self.weight.shape[1]))
        local = slice(low - self.first_row, high - self.first_row)
        return slice(low - rows.start, high - rows.start), local, slice(self.first_column, self.first_column + wide)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Initialise the rows as `Table.initialize` does, with the same random numbers."""
        self.weight.zero_()
        if std:
            for rows, drawn in _normal(self.num_embeddings, self.embedding_dim, std, self._normal_block):
                self.copy_rows(self.weight, rows, drawn)

    def copy_rows(self, into: Tensor, rows: slice, values: Tensor) -> None:
        """Copy this rank's part of the table's `rows`, `values` (rows, width), into a tensor shaped like `weight`."""
        selected, local, columns = self.local_slices(rows)
        wide = columns.stop - columns.start
        if selected.start < selected.stop and wide:
            into[local, :wide] = values[selected, columns].to(into.device)

    @torch.no_grad()
    def zero_row(self, row: int) -> None:
        """Set a row of the table to zeros, where this rank holds it."""
        if 0 <= row - self.first_row < len(self.weight):
            self.weight[row - self.first_row] = 0

    def forward(self, codes: Tensor) -> Tensor:
        """Return the rows at codes (…): (…, width)."""
        rows, known = self._batch()
        return gather(rows, torch.searchsorted(known, codes))

    def for_bag(self, first: int, rows: int, bag: AnyBag) -> tuple[Tensor, AnyBag]:
        """Return `batch_rows` as the table and the bag in its codes, as `Table.for_bag`; the codes keep their order."""
        table, known = self._batch()

        def renumber(codes: Tensor) -> Tensor:
            return torch.searchsorted(known, codes.long() + first)

        if isinstance(bag, Bag):
            values = renumber(bag.values).to(bag.values.dtype)
            ends = torch.bincount(values, minlength=len(known)).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends]).to(bag.code_offsets.dtype)
            return table, Bag(values, bag.offsets, bag.rows_by_code, offsets)
        if isinstance(bag, Prefixes):
            return table, Prefixes(renumber(bag.codes), bag.number, bag.last, bag.length)
        codes = torch.where(bag.codes >= 0, renumber(bag.codes.clamp(min=0)), -1)
        if isinstance(bag, HistoryWindows):
            return table, HistoryWindows(codes, bag.sequence, bag.place, bag.length)
        return table, Padded(codes)

    def _batch(self) -> tuple[Tensor, Tensor]:
        if self.batch_rows is None or self.batch_codes is None:
            raise RuntimeError("this rank holds a shard of the table and no batch rows; use the model of rank 0")
        return self.batch_rows, self.batch_codes


AnyTable = Table | EmbeddingShard
TableFactory = Callable[[int, int], AnyTable]
"""Maps (rows, width) to a table that is not yet initialised."""


def named_tables(module: nn.Module) -> Iterator[tuple[str, AnyTable]]:
    """Yield every table of a module with its qualified name."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, Table | EmbeddingShard):
            yield name, submodule


def bag_codes(bag: AnyBag) -> Tensor:
    """Return all codes of a bag, flat (L,) int64; padding becomes 0."""
    return (bag.values if isinstance(bag, Bag) else bag.codes.flatten().clamp(min=0)).long()


def _normal(rows: int, width: int, std: float, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the numbers that `Tensor.normal_` draws for (rows, width), about `block` at a time.

    A CPU draws in groups of 16 and, for a remainder, draws the last 16 numbers again. Therefore every block but the
    last is a whole number of groups, and the last has at least 16 rows.
    """
    step = max(16, block // width // 16 * 16)
    first = 0
    while first < rows:
        last = first + step
        if rows - last < 16:
            last = rows
        yield slice(first, last), torch.empty(last - first, width).normal_(0, std)
        first = last
