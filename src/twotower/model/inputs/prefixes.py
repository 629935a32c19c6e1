"""Prefixes: many beginnings of few sequences, for means of all of them in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.ragged import Ragged, run_indices
from twotower.arrays.types import Float, Ints, Shaped
from twotower.model.inputs.code_layout import A, Arrays, CodeLayout, Recode
from twotower.model.inputs.padded import Padded

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.model.pooling.pooling import PoolingLayer

SCAN_CHUNK = 32
"""Number of interactions in a row of `Prefixes.codes`."""


@dataclass(frozen=True)
class Prefixes(CodeLayout[A]):
    """U prefixes of S sequences: the interactions before U time steps.

    The sequences are cut into K chunks of SCAN_CHUNK codes; the last chunk of a sequence is padded with zeros.
    """

    codes: A  # (K, SCAN_CHUNK) int64
    number: A  # (K,) int64, index of a chunk in its sequence; the chunks of a sequence are consecutive
    last: A  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: A  # (U,) float32, number of interactions of a prefix

    def flat(self: Prefixes) -> Shaped[Tensor, "L"]:
        return self.codes.flatten().long()

    def recoded(self: Prefixes, recode: Recode, rows: int) -> Prefixes:
        return Prefixes(recode(self.codes), self.number, self.last, self.length)

    def numbered(self: Prefixes) -> Prefixes:
        places = (self.codes.new_ones(self.codes.numel()).cumsum(0) - 1).view_as(self.codes)
        return Prefixes(places, self.number, self.last, self.length)

    def pooled(self: Prefixes, layer: PoolingLayer, table: Float[Tensor, "rows E"]) -> Float[Tensor, "U O"]:
        return layer.pool_prefixes(table, self)

    def padded(self: Prefixes) -> Padded:
        n = self.length.long()[:, None]
        position = n.new_ones(max(1, int(n.max()) if len(n) else 1)).cumsum(0) - 1
        place = (self.last[:, None] - n + 1 + position).clamp(0, self.codes.numel() - 1)
        return Padded(self.codes.flatten()[place].where(position < n, -1))


def take_prefixes(
    ragged: Ragged, rows: Shaped[Ints, "S"], which: Shaped[Ints, "U"], length: Shaped[Ints, "U"]
) -> Prefixes[Arrays]:
    """Return U prefixes: of the sequence `rows[which]`, each of `length`. `rows` are distinct."""
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
