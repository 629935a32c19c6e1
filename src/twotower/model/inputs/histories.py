"""Histories before time steps: prefixes for means, windows for attention."""

from __future__ import annotations

import numpy as np

from twotower.arrays.ragged import Ragged, run_indices
from twotower.arrays.types import Ints
from twotower.model.inputs.carriers import CONTEXT_DIVISOR, SCAN_CHUNK, Array, HistoryWindows, Prefixes


def prefixes(ragged: Ragged, rows: Ints, which: Ints, length: Ints) -> Prefixes[Array]:
    """Return U prefixes: of the sequence `rows[which]` (U,), each of `length` (U,). `rows` (S,) are distinct."""
    used = np.zeros(len(rows), np.int64)
    np.maximum.at(used, which, length)
    chunks = -(-used // SCAN_CHUNK)
    first = np.cumsum(chunks) - chunks
    sequence = np.repeat(np.arange(len(rows)), chunks)
    codes = np.zeros(max(1, int(chunks.sum())) * SCAN_CHUNK, np.int64)
    codes[run_indices(first * SCAN_CHUNK, used)] = ragged.values[run_indices(ragged.offsets[rows], used)]
    if not len(sequence):
        sequence = np.zeros(1, np.int64)
    return Prefixes(
        codes.reshape(-1, SCAN_CHUNK),
        np.arange(len(sequence)) - first[sequence],
        np.where(length > 0, first[which] * SCAN_CHUNK + length - 1, 0),
        length.astype(np.float32),
    )


def history_windows(ragged: Ragged, rows: Ints, which: Ints, length: Ints, limit: int) -> HistoryWindows[Array]:
    """Return the prefixes of `prefixes` as windows, cut to the items that attention can reach from their ends."""
    past = max(1, limit // CONTEXT_DIVISOR)
    ends = np.zeros(len(rows), np.int64)
    np.maximum.at(ends, which, length)
    starts = ends.copy()
    np.minimum.at(starts, which, np.where(length > 0, length - 1, ends[which]))
    starts = np.maximum(starts - past, 0)
    used = ends - starts
    first = np.cumsum(used) - used
    codes = ragged.values[run_indices(ragged.offsets[rows] + starts, used)]
    n = len(codes)
    sequence = np.repeat(np.arange(len(rows)), used)
    at = first[which] + length - 1 - starts[which]  # end of each prefix, in the concatenated sequences
    n_rows = max(1, -(-(n - past) // (limit - past)))
    wide = max(1, -(-(n + (n_rows - 1) * past) // n_rows))  # rows of equal width
    step = wide - past if n_rows > 1 else wide
    row = np.clip((at - past) // step, 0, n_rows - 1)
    grid = np.arange(n_rows)[:, None] * step + np.arange(wide)
    filled = grid < n
    grid = np.where(filled, grid, 0)
    return HistoryWindows(
        codes[grid].astype(np.int64) if n else np.zeros(grid.shape, np.int64),
        np.where(filled, sequence[grid], -1) if n else np.full(grid.shape, -1),
        np.where(length > 0, row * (wide - step) + at, 0),
        length.astype(np.float32),
    )
