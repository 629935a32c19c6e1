"""Description of an encoded column."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.features.pooling_spec import MEAN, PoolingSpec


@dataclass(frozen=True)
class InputField:
    """Description of an encoded column, from which a tower makes its embedding."""

    name: str
    kind: str  # carrier: "lookup" of one code, "bag" of many, "dense" of numbers, or an import path
    rows: int = 0  # embedding rows of a lookup or bag
    length: int = 0  # numbers per row of a dense field
    width: int = 0  # embedding width; 0: the width of the tower
    pooling: PoolingSpec = MEAN  # of many codes
    sequence: bool = False  # True for a history, which must not contain the target
    share_with: str = ""  # field of the other side whose embedding it uses
    identifies: bool = False  # True for a lookup of the side's ids
    starts_at_zero: bool = False  # True if its embedding starts at zeros, so that untrained rows say nothing
    beside: str = ""  # sequence of the same interactions whose embeddings its own are added to, before they are pooled

    @property
    def limit(self) -> int:
        """Number of latest codes that the pooling reads at once. 0: all."""
        return self.pooling.window
