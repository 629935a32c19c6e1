"""Inputs of a tower as tensors: codes of one value, of many, of histories, and numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Bag:
    """U rows of codes, flat, in both orders: by row for the forward pass, by code for the backward pass."""

    values: Tensor  # (L,) int32 codes, row after row
    offsets: Tensor  # (U + 1,) int32
    rows_by_code: Tensor  # (L,) int32 row numbers, code after code
    code_offsets: Tensor  # (table rows + 1,) int32


CONTEXT_DIVISOR = 8
"""A row of `HistoryWindows` begins with the last 1 / CONTEXT_DIVISOR of the preceding row, as context."""


SCAN_CHUNK = 32
"""Number of interactions in a row of `Prefixes.codes`."""


@dataclass(frozen=True)
class Prefixes:
    """U prefixes of S sequences: the interactions before U time steps.

    The sequences are cut into K chunks of SCAN_CHUNK codes; the last chunk of a sequence is padded with zeros.
    """

    codes: Tensor  # (K, SCAN_CHUNK) int64
    number: Tensor  # (K,) int64, index of a chunk in its sequence; the chunks of a sequence are consecutive
    last: Tensor  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: Tensor  # (U,) float32, number of interactions of a prefix


@dataclass(frozen=True)
class HistoryWindows:
    """U prefixes of S sequences for attention: the sequences are concatenated and cut into R rows of W codes.

    Every row but the first begins with the last codes of the preceding row, so that every time step has context. The
    places of the cuts depend on the preceding sequences, and so on the order of the epoch.
    """

    codes: Tensor  # (R, W) int64
    sequence: Tensor  # (R, W) int64, index of the sequence of a code; -1 after the end of the last sequence
    place: Tensor  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: Tensor  # (U,) float32, number of interactions of a prefix


@dataclass(frozen=True)
class Padded:
    """U rows of codes, oldest first, padded to one length: the input of attention and of an exported tower."""

    codes: Tensor  # (U, T) int64; -1 after the end of a row


@dataclass(frozen=True)
class Inputs:
    """The features of U rows of one side, by field name."""

    rows: int
    lookup: Tensor  # (U, number of lookup fields) int64, in the fields' order
    bags: dict[str, Bag | Prefixes | HistoryWindows | Padded]
    dense: dict[str, Tensor]  # (U, length) float32
