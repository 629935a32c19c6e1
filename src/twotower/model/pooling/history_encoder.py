"""Attention over a history: one vector a prefix, by the blocks of the poolings `attention` and `transformer`.

A vector depends only on the history, never on a target item, so that it can search items. Positions are rotations of
queries and keys (Su et al. 2021, "RoFormer", section 3.2.2): only distances matter, and a history may be cut anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twotower.arrays.types import Bool, Float, Int, Shaped
from twotower.errors import ConfigError
from twotower.model.inputs.code_layout import HistoryWindows, Padded
from twotower.model.layers import Dropout, gather
from twotower.model.lowering import lower
from twotower.model.pooling.pooling import Pooling, PoolingLayer, lower_known

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder

MAX_TOKENS_PER_PASS = 2**14
"""Number of items in one forward pass over padded histories."""


class HistoryPooling(Pooling):
    """Attention over the latest interactions of a history, by a stack of blocks."""

    reads_windows = True
    research: ClassVar[tuple[str, ...]] = ("input_dropout",)

    window: int = Field(0, ge=0, description="Number of latest interactions to read, such as 200. At least 2.")
    heads: int = Field(4, ge=1, description="Number of attention heads, a divisor of the width of the sequence.")
    input_dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate of the item embeddings.")

    @model_validator(mode="after")
    def _check_window(self) -> HistoryPooling:
        if self.window < 2:
            raise ValueError(f"pooling '{self.kind}' reads a limited history; set window, such as 200 (at least 2)")
        return self

    @abstractmethod
    def stack(self, width: int) -> list[HistoryBlock]:
        """Return fresh blocks over embeddings of a width."""

    def build(self, width: int, name: str) -> HistoryEncoder:
        """Return the encoder. Raises ConfigError unless the heads share the width in pairs of numbers."""
        if width % (2 * self.heads):
            raise ConfigError(
                f"sequence '{name}' has width {width}, which {self.heads} heads cannot share in pairs of numbers; "
                f"make it a multiple of {2 * self.heads} or change pooling.heads"
            )
        return HistoryEncoder(width, self.window, self.input_dropout, self.stack(width))


class Rotation:
    """Rotation of T vectors (…, T, width) by position / 10000^(i / (width / 2)) (RoFormer, equation 15).

    The components i and i + width / 2 are a pair. `cos` and `sin` are (T, width / 2)."""

    def __init__(self, length: int, width: int, device: torch.device | str = "cpu") -> None:
        half = width // 2
        angles = torch.arange(length, device=device)[:, None] / 10000 ** (torch.arange(half, device=device) / half)
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Float[Tensor, "*_ T width"]) -> Float[Tensor, "*_ T width"]:
        left, right = x.chunk(2, -1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Queries(NamedTuple):
    """Queries of attention in an ONNX graph: all items of each history (Q = T) or the last one (Q = 1)."""

    rows: str  # rows of the queries in (U T, E); "": all
    shape: str  # [U, Q]
    angles: list[str]  # cosines and sines of their positions, factors of (U, heads, Q, width)
    mask: str  # causal, added to the scores (U, heads, Q, T); "" for unused queries


class HistoryBlock(nn.Module, ABC):
    """Causal attention over histories (R, W, E) by `heads` heads, and the layers after it."""

    heads: int

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "R W E"], mask: Bool[Tensor, "R 1 W W"], rotation: Rotation
    ) -> Float[Tensor, "R W E"]:
        """Map histories. `mask` is true where a query (row) may attend to a key (column)."""

    @abstractmethod
    def lower(self, g: GraphBuilder, x: str, queries: Queries, every: Queries) -> str:
        """Build `forward` over (U T, E) at the queries: (U Q, E)."""


class HistoryEncoder(PoolingLayer):
    """Encoder of histories: table rows (…, E) in order of time, oldest first -> one vector (E,) per prefix.

    norm(block_n(… block_1(norm(x)))) with x the gathered rows; the vector of a prefix is the output at its last item.
    """

    def __init__(self, width: int, window: int, input_dropout: float, blocks: Iterable[HistoryBlock]) -> None:
        """Build the encoder of the latest `window` items."""
        super().__init__()
        self.input_dropout = Dropout(input_dropout)
        self.input_norm = nn.LayerNorm(width)
        self.chain = list(blocks)
        self.blocks = nn.ModuleList(self.chain)
        self.norm = nn.LayerNorm(width)
        self.limit, self.head_width, self.max_tokens = window, width // self.chain[0].heads, MAX_TOKENS_PER_PASS

    def pool_windows(self, table: Float[Tensor, "rows E"], windows: HistoryWindows) -> Float[Tensor, "U E"]:
        out = self._encode(table, windows.codes, windows.sequence).flatten(0, 1).index_select(0, windows.place)
        return out * (windows.length > 0).to(out.dtype)[:, None]

    def pool_padded(self, table: Float[Tensor, "rows E"], padded: Padded) -> Float[Tensor, "U E"]:
        codes, n = keep_latest(padded.codes, self.limit)
        # Histories of similar length share a pass, as each is padded to the longest.
        order = torch.argsort(n, descending=True)
        parts, start = [], 0
        while start < len(order):
            longest = max(1, int(n[order[start]]))
            rows = order[start : start + max(1, self.max_tokens // longest)]
            start += len(rows)
            some = codes[rows, :longest]
            out = self._encode(table, some, torch.where(some >= 0, 0, -1))
            last = out[torch.arange(len(rows), device=out.device), (n[rows] - 1).clamp(min=0)]
            parts.append(last * (n[rows] > 0).to(out.dtype)[:, None])
        if not parts:
            return table.new_zeros(0, table.shape[1])
        return torch.cat(parts).index_select(0, torch.argsort(order))

    def _encode(
        self, table: Float[Tensor, "rows E"], codes: Int[Tensor, "R W"], sequence: Int[Tensor, "R W"]
    ) -> Float[Tensor, "R W E"]:
        """Return the vectors of codes. A position attends to the positions up to its own in its row and `sequence`."""
        x = self.input_norm(self.input_dropout(gather(table, codes.clamp(min=0))))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w = codes.shape[1]
        mask = (sequence[:, :, None] == sequence[:, None]) & torch.ones(w, w, device=x.device, dtype=torch.bool).tril()
        rotation = Rotation(w, self.head_width, x.device)
        for block in self.blocks:
            x = block(x, mask[:, None], rotation)
        out: Tensor = self.norm(x)
        return out

    def lower(self, g: GraphBuilder, table: str, codes: str) -> str:
        """Build `pool_padded`. The last block has one query a row, as only the output at the last item is used."""
        n = g.reduce("Sum", lower_known(g, codes), 1)
        codes, n = self._lower_latest(g, codes, n)
        rows = g("Gather", table, codes, axis=0)  # -1 reads a row that the mask hides
        x = lower(self.input_norm, g, g("Flatten", rows, axis=2))  # (U T, E)
        every, last = self._lower_queries(g, codes, n)
        for i, block in enumerate(self.chain, 1):
            x = block.lower(g, x, last if i == len(self.chain) else every, every)
        return g("Mul", lower(self.norm, g, x), g("Min", n, g.constant(1.0)))

    def _lower_latest(self, g: GraphBuilder, codes: str, n: str) -> tuple[str, str]:
        """Build `keep_latest`; n (U, 1) is float."""
        width = g("Squeeze", g("Shape", codes, start=1, end=2), g.constant([0]))
        offsets = g("Range", g.constant(0), g("Min", width, g.constant(self.limit)), g.constant(1))  # (min(T, limit),)
        limit = g.constant(float(self.limit))
        first = g("Cast", g("Max", g("Sub", n, limit), g.constant(0.0)), to=g.onnx.TensorProto.INT64)
        return g("GatherElements", codes, g("Add", first, offsets), axis=1), g("Min", n, limit)

    def _lower_queries(self, g: GraphBuilder, codes: str, n: str) -> tuple[Queries, Queries]:
        """Return the queries of all items of the codes (U, T), and of the last of the n (U, 1) items of each row."""
        users, width = g("Shape", codes, end=1), g("Shape", codes, start=1)
        positions = g("Range", g.constant(0), g("Squeeze", width), g.constant(1))  # (T,)
        end = g("Max", g("Sub", n, g.constant(1.0)), g.constant(0.0))
        position = g("Cast", end, to=g.onnx.TensorProto.INT64)  # (U, 1)
        starts = g("Mul", g("Range", g.constant(0), g("Squeeze", users), g.constant(1)), width)  # (U,)
        index = g("Add", starts, g("Squeeze", position, g.constant([1])))

        rotation = Rotation(self.limit, self.head_width)
        signed = torch.cat([-rotation.sin, rotation.sin], 1)
        tables = [g.constant(torch.cat([rotation.cos, rotation.cos], 1)), g.constant(signed)]
        scaled = g("Mul", g("Cast", positions, to=g.onnx.TensorProto.FLOAT), g.constant(1e9))

        def causal_mask(query_position: str) -> str:
            # Padding follows the codes of a row: the causal mask hides it.
            return g("Min", g("Sub", query_position, scaled), g.constant(0.0))

        every = Queries(
            rows="",
            shape=g("Shape", codes),
            angles=[g("Slice", table, g.constant([0]), width) for table in tables],
            mask=causal_mask(g("Unsqueeze", scaled, g.constant([1]))) if len(self.chain) > 1 else "",
        )
        last = Queries(
            rows=index,
            shape=g("Concat", users, g.constant([1]), axis=0),
            angles=[g("Gather", table, g.reshape(position, 1, 1), axis=0) for table in tables],
            mask=causal_mask(g("Mul", g.reshape(end, 1, 1, 1), g.constant(1e9))),
        )
        return every, last


def keep_latest(codes: Int[Tensor, "U T"], limit: int) -> tuple[Int[Tensor, "U W"], Shaped[Tensor, "U"]]:
    """Return the last `limit` codes of each row of padded codes, W = min(T, limit), and their count."""
    n = (codes >= 0).sum(1)
    if codes.shape[1] > limit:
        position = torch.arange(limit, device=codes.device) + (n - limit).clamp(min=0)[:, None]
        codes, n = codes.gather(1, position), n.clamp(max=limit)
    return codes, n


def lower_heads(g: GraphBuilder, x: str, shape: str, heads: int, width: int) -> str:
    """Map (U T, heads x width) to (U, heads, T, width); `shape` is [U, T]."""
    x = g("Reshape", x, g("Concat", shape, g.constant([heads, width]), axis=0))
    return g("Transpose", x, perm=[0, 2, 1, 3])


def lower_rotary(g: GraphBuilder, x: str, angles: list[str]) -> str:
    """Build a `Rotation`: (a, b) cos + (-b, a) sin; `angles` include the sign."""
    left, right = g.halves(x)
    cos, sin = angles
    return g("Add", g("Mul", x, cos), g("Mul", g("Concat", right, left, axis=-1), sin))


def lower_attention(g: GraphBuilder, query: str, key: str, value: str, mask: str, width: int) -> str:
    """Build softmax(Q K^T / sqrt(width) + mask) V of queries (U, heads, Q, width) over T keys: (U Q, heads x width)."""
    scores = g("Mul", g("MatMul", query, g("Transpose", key, perm=[0, 1, 3, 2])), g.constant(width**-0.5))
    attended = g("MatMul", g("Softmax", g("Add", scores, mask), axis=-1), value)
    return g("Flatten", g("Transpose", attended, perm=[0, 2, 1, 3]), axis=2)
