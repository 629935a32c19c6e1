"""Protocol of the poolings: maps from the embeddings of a field of many codes to one vector or several."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from twotower.arrays.types import Bool, Float
from twotower.kinds import Kind
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import CodeLayout, HistoryWindows, Padded, Prefixes
from twotower.model.layers import gather

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Pooling(Kind):
    """Pooling of the embeddings of a bag or a history."""

    needs_time_order: ClassVar[bool] = False
    """True if the age of an interaction counts; training then needs `train.history_scope = "causal"`."""
    reads_windows: ClassVar[bool] = False
    """True if it has the option `window`: training cuts histories into windows of latest interactions."""
    rounding: ClassVar[float] = 1e-4
    """Largest difference of two programs that rounding explains, relative to the largest number of the vectors."""

    @property
    def pieces(self) -> int:
        """Number of concatenated vectors of the field's width."""
        return 1

    @property
    def decay_rates(self) -> tuple[float, ...]:
        """Rates r of vectors that are means in which the n-th latest interaction has the weight r^n; else empty."""
        return ()

    @property
    def decay_rate(self) -> float | None:
        """The only rate, else None."""
        rates = self.decay_rates
        return rates[0] if len(rates) == 1 else None

    @property
    def length_exponent(self) -> float | None:
        """Exponent p of a sum of n embeddings divided by n^p, else None."""
        return None

    @abstractmethod
    def build(self, width: int, name: str) -> PoolingLayer:
        """Return a fresh module over embeddings of a width. Raises ConfigError if feature `name` does not fit."""

    @property
    def in_order(self) -> bool:
        """True if the vector depends on the order of the codes."""
        return self.needs_time_order or self.reads_windows


class PoolingLayer(nn.Module):
    """Module of a pooling: the rows of a table (rows, E) at the codes of U bags or histories -> (U, pieces E).

    A layer of one's own implements `pool` and `lower`. Other methods, one a layout, return the same without padding."""

    def forward(self, table: Float[Tensor, "rows E"], codes: CodeLayout) -> Float[Tensor, "U O"]:
        """Return the pooled rows; zeros for a row without codes."""
        if not len(table):  # padding reads row 0
            table = nn.functional.pad(table, (0, 0, 0, 1))
        return codes.pooled(self, table)

    def pool(self, rows: Float[Tensor, "U T E"], known: Bool[Tensor, "U T"]) -> Float[Tensor, "U O"]:
        """Return the pooled `rows`, in order of time. Rows that are not `known` are padding at the end."""
        raise NotImplementedError

    def lower(self, g: GraphBuilder, table: str, codes: str) -> str:
        """Build `pool` over a table (rows, E) at codes (U, T), -1 after the end of a row; return the output."""
        raise NotImplementedError

    def pool_padded(self, table: Float[Tensor, "rows E"], padded: Padded) -> Float[Tensor, "U O"]:
        """Pool padded rows."""
        return self.pool(gather(table, padded.codes.clamp(min=0)), padded.codes >= 0)

    def pool_bag(self, table: Float[Tensor, "rows E"], bag: Bag) -> Float[Tensor, "U O"]:
        """Pool whole rows."""
        return self.pool_padded(table, bag.padded())

    def pool_prefixes(self, table: Float[Tensor, "rows E"], prefixes: Prefixes) -> Float[Tensor, "U O"]:
        """Pool beginnings of sequences."""
        return self.pool_padded(table, prefixes.padded())

    def pool_windows(self, table: Float[Tensor, "rows E"], windows: HistoryWindows) -> Float[Tensor, "U O"]:
        """Pool the latest codes of beginnings of sequences."""
        return self.pool_padded(table, windows.padded())


def lower_known(g: GraphBuilder, codes: str) -> str:
    """Build 1.0 for each code, and 0.0 for padding: (U, T)."""
    return g("Cast", g("GreaterOrEqual", codes, g.constant(0)), to=g.onnx.TensorProto.FLOAT)
