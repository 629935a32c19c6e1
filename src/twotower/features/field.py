"""Description of an encoded column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower.features.schema import Pooling


@dataclass(frozen=True)
class InputField:
    """Description of an encoded column, from which a tower makes its embedding."""

    name: str
    kind: Literal["lookup", "bag", "dense"]  # one code, many codes, or numbers
    rows: int = 0  # embedding rows of a lookup or bag
    length: int = 0  # numbers per row of a dense field
    width: int = 0  # embedding width; 0: the width of the tower
    pooling: Pooling = "mean"
    rates: tuple[float, ...] = ()  # rates of the pooling "decay", one mean per rate
    limit: int = 0  # maximum length with the poolings "attention" and "transformer"
    sequence: bool = False  # True for a history, which must not contain the target
    share_with: str = ""  # field of the other side whose embedding it uses
    identifies: bool = False  # True for a lookup of the side's ids
