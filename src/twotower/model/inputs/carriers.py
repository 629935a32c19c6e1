"""Inputs of a tower: codes of one value, of many, of histories, and numbers.

The carriers hold tensors, or the numpy arrays (`Array`) from which `side_tensors` and `feed` make inputs of a tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeVar

    A = TypeVar("A", default=Tensor)
    B = TypeVar("B", default=Tensor)
else:
    from typing import TypeVar

    A, B = TypeVar("A"), TypeVar("B")

Array = npt.NDArray[np.number]


@dataclass(frozen=True)
class Bag(Generic[A]):
    """U rows of codes, flat, in both orders: by row for the forward pass, by code for the backward pass.

    The two arrays of the second order are empty where no backward pass follows."""

    values: A  # (L,) int32 codes, row after row
    offsets: A  # (U + 1,) int32
    rows_by_code: A  # (L,) int32 row numbers, code after code
    code_offsets: A  # (table rows + 1,) int32

    def map(self, f: Callable[[A], B]) -> Bag[B]:
        return Bag(f(self.values), f(self.offsets), f(self.rows_by_code), f(self.code_offsets))


CONTEXT_DIVISOR = 8
"""A row of `HistoryWindows` begins with the last 1 / CONTEXT_DIVISOR of the preceding row, as context."""

SCAN_CHUNK = 32
"""Number of interactions in a row of `Prefixes.codes`."""


@dataclass(frozen=True)
class Prefixes(Generic[A]):
    """U prefixes of S sequences: the interactions before U time steps.

    The sequences are cut into K chunks of SCAN_CHUNK codes; the last chunk of a sequence is padded with zeros.
    """

    codes: A  # (K, SCAN_CHUNK) int64
    number: A  # (K,) int64, index of a chunk in its sequence; the chunks of a sequence are consecutive
    last: A  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: A  # (U,) float32, number of interactions of a prefix

    def map(self, f: Callable[[A], B]) -> Prefixes[B]:
        return Prefixes(f(self.codes), f(self.number), f(self.last), f(self.length))


@dataclass(frozen=True)
class HistoryWindows(Generic[A]):
    """U prefixes of S sequences for attention: the sequences are concatenated and cut into R rows of W codes.

    Every row but the first begins with the last codes of the preceding row, so that every time step has context. The
    places of the cuts depend on the preceding sequences, and so on the order of the epoch.
    """

    codes: A  # (R, W) int64
    sequence: A  # (R, W) int64, index of the sequence of a code; -1 after the end of the last sequence
    place: A  # (U,) int64, position of a prefix's last interaction in the flat codes; undefined if the length is 0
    length: A  # (U,) float32, number of interactions of a prefix

    def map(self, f: Callable[[A], B]) -> HistoryWindows[B]:
        return HistoryWindows(f(self.codes), f(self.sequence), f(self.place), f(self.length))


@dataclass(frozen=True)
class Padded(Generic[A]):
    """U rows of codes, oldest first, padded to one length: the input of attention and of an exported tower."""

    codes: A  # (U, T) int64; -1 after the end of a row

    def map(self, f: Callable[[A], B]) -> Padded[B]:
        return Padded(f(self.codes))


AnyBag = Bag[A] | Prefixes[A] | HistoryWindows[A] | Padded[A]


@dataclass(frozen=True)
class Inputs:
    """The features of U rows of one side, by field name."""

    rows: int
    lookup: Tensor  # (U, number of lookup fields) int64, in the fields' order
    bags: dict[str, AnyBag]
    dense: dict[str, Tensor]  # (U, length) float32
