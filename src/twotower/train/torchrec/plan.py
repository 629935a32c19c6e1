"""Placement of table pieces on the ranks."""

from __future__ import annotations

from dataclasses import dataclass

KERNEL_WIDTH_MULTIPLE = 4
"""fbgemm's kernels take widths that are multiples of this; other tables are padded with columns of zeros."""


@dataclass(frozen=True)
class ShardPlacement:
    """A rectangle [rows) x [columns) of a table, and the rank that holds it."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]


def plan_sharding(sizes: list[tuple[int, int]], world_size: int, sharding: str) -> list[list[int]]:
    """Return for each table (rows, width) the ranks that share its columns; one rank holds the whole table.

    "column_wise" cuts every table, "auto" those larger than an equal share of all numbers. The largest tables are placed
    first, on the ranks that hold the fewest numbers.
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
    """Return the width that the kernels need for a table: the next multiple of `KERNEL_WIDTH_MULTIPLE`."""
    return -(-width // KERNEL_WIDTH_MULTIPLE) * KERNEL_WIDTH_MULTIPLE
