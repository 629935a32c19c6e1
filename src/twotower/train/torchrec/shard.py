"""Shards of embedding tables: their placement on the ranks, and one rank's shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twotower.arrays.types import F32, I64, Int
from twotower.model.inputs.code_layout import CodeLayout
from twotower.model.layers import gather
from twotower.model.tables import Table

KERNEL_WIDTH_MULTIPLE = 4
"""Widths of fbgemm's kernels are multiples of this; other tables are padded with columns of zeros."""


@dataclass(frozen=True)
class ShardPlacement:
    """A rectangle [rows) x [columns) of a table, and its rank."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]


def plan_sharding(sizes: list[tuple[int, int]], world_size: int, sharding: str) -> list[list[int]]:
    """Return for each table (rows, width) the ranks that share its columns.

    "column_wise" cuts every table, "auto" tables larger than an equal share of all numbers. The largest tables are
    placed first, on the ranks with the fewest numbers.
    """
    held, ranks_of_table = [0] * world_size, [[0]] * len(sizes)
    numbers = [rows * padded_width(width) for rows, width in sizes]
    for t in sorted(range(len(sizes)), key=lambda t: (-numbers[t], t)):
        parts = 1
        if sharding == "column_wise" or (sharding == "auto" and numbers[t] * world_size > sum(numbers)):
            units = padded_width(sizes[t][1]) // KERNEL_WIDTH_MULTIPLE
            parts = max(k for k in range(1, world_size + 1) if units % k == 0)
        ranks_of_table[t] = sorted(sorted(range(world_size), key=lambda r: (held[r], r))[:parts])
        for r in ranks_of_table[t]:
            held[r] += numbers[t] // parts
    return ranks_of_table


def padded_width(width: int) -> int:
    """Return the next multiple of `KERNEL_WIDTH_MULTIPLE`."""
    return -(-width // KERNEL_WIDTH_MULTIPLE) * KERNEL_WIDTH_MULTIPLE


class EmbeddingShard(Table):
    """This rank's shard of a table (rows, width): `weight` (local rows, local columns), possibly empty.

    A training step reads `batch_rows`, the table rows of its batch in the order of the ascending `batch_codes`.
    """

    def __init__(self, table: Table, weight: nn.Parameter, first_row: int, first_column: int) -> None:
        """Replace a deferred `table`. `weight`, which starts at (first_row, first_column), gets the table's initial
        rows; columns beyond the table's width stay zero."""
        with torch.device("meta"):
            super().__init__(table.num_embeddings, table.embedding_dim)
        self.weight, self.first_row, self.first_column = weight, first_row, first_column
        self.batch_codes: Tensor | None = None
        self.batch_rows: Tensor | None = None
        with torch.no_grad():
            weight.zero_()
            for rows, drawn in table.initial_rows():
                self.copy_rows(weight, rows, drawn)

    def local_slices(self, rows: slice) -> tuple[slice, slice, slice]:
        """Return the overlap of the table's `rows` with this shard: slices of `rows`, of the shard's rows, and of the
        table's columns."""
        low = max(rows.start, self.first_row)
        high = max(low, min(rows.stop, self.first_row + len(self.weight)))
        wide = max(0, min(self.embedding_dim - self.first_column, self.weight.shape[1]))
        local = slice(low - self.first_row, high - self.first_row)
        return slice(low - rows.start, high - rows.start), local, slice(self.first_column, self.first_column + wide)

    def copy_rows(self, into: F32[Tensor, "r c"], rows: slice, values: F32[Tensor, "n E"]) -> None:
        """Copy this rank's part of the table's `rows`, with these `values`, into a tensor shaped like `weight`."""
        selected, local, columns = self.local_slices(rows)
        wide = columns.stop - columns.start
        if selected.start < selected.stop and wide:
            into[local, :wide] = values[selected, columns].to(into.device)

    def forward(self, codes: Int[Tensor, "*n"]) -> F32[Tensor, "*n E"]:
        """Return the rows at codes."""
        rows, known = self._batch()
        return gather(rows, torch.searchsorted(known, codes))

    def for_bag(self, first: int, rows: int, bag: CodeLayout) -> tuple[F32[Tensor, "n E"], CodeLayout]:
        """Return `batch_rows` as the table and the bag in its codes, as `Table.for_bag` does, in the same order."""
        table, known = self._batch()

        def renumber(codes: Int[Tensor, "*n"]) -> I64[Tensor, "*n"]:
            return torch.searchsorted(known, codes.long() + first)

        return table, bag.recoded(renumber, len(known))

    def _batch(self) -> tuple[F32[Tensor, "n E"], I64[Tensor, "n"]]:
        """Return the table rows of the batch, and their codes."""
        if self.batch_rows is None or self.batch_codes is None:
            raise RuntimeError("this rank holds a shard of the table and no batch rows; use the model of rank 0")
        return self.batch_rows, self.batch_codes
