"""Inputs of a tower as tensors: codes of one value, of many, and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.model.inputs.code_layout import CodeLayout


@dataclass(frozen=True)
class Inputs:
    """The features of U rows of one side, by field name."""

    rows: int
    lookup: Tensor  # (U, number of lookup fields) int64, in the fields' order
    bags: dict[str, CodeLayout]
    dense: dict[str, Tensor]  # (U, length) float32
