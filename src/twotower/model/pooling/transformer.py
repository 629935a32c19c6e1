"""Pooling `transformer`: causal blocks over a history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twotower.arrays.types import Bool, Float
from twotower.model.layers import Dropout
from twotower.model.lowering import lower, lower_linear
from twotower.model.pooling.history_encoder import (
    HistoryBlock,
    HistoryPooling,
    Queries,
    Rotation,
    lower_attention,
    lower_heads,
    lower_rotary,
)

if TYPE_CHECKING:
    from twotower.onnx.builder import GraphBuilder


class Transformer(HistoryPooling):
    """Output of a stack of causal transformer blocks at the latest interaction (SASRec, Kang and McAuley 2018).

    Use it when the meaning of an interaction depends on earlier ones. It needs `window`: the latest interactions are
    read, and training cuts longer histories into windows.
    """

    kind = "transformer"
    research = ("feed_forward", "input_dropout")

    block: Literal["plain", "gated"] = Field(
        "gated", description="Block. plain: x + f(norm(x)) (SASRec). gated: f is multiplied by a sigmoid gate (LiGR)."
    )
    blocks: int = Field(2, ge=1, description="Number of transformer blocks.")
    feed_forward: int = Field(
        2, ge=1, description="Hidden width of a block's feed-forward layers, as a multiple of the sequence's width."
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout rate of the output of each sub-layer of a block.")

    def stack(self, width: int) -> list[HistoryBlock]:
        return [TransformerBlock(width, self) for _ in range(self.blocks)]


class TransformerBlock(HistoryBlock):
    """Causal self-attention and a position-wise feed-forward network, each with a residual connection.

    Plain (SASRec, Kang and McAuley 2018, section III-B, with pre-normalisation): x + f(norm(x)).
    Gated (LiGR, Hertel et al. 2025, "From Features to Transformers", section 3.2): x + f(norm(x)) * sigmoid(W x).
    """

    def __init__(self, width: int, config: Transformer) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.feed_forward * width
        self.attend_norm, self.layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width)
        gated = config.block == "gated"
        self.attend_gate = nn.Linear(width, width) if gated else None
        self.layer_gate = nn.Linear(width, width) if gated else None
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "R W E"], mask: Bool[Tensor, "R 1 W W"], rotation: Rotation
    ) -> Float[Tensor, "R W E"]:
        r, w, width = x.shape
        joint = self.query_key_value(self.attend_norm(x)).view(r, w, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(rotation(query), rotation(key), value, attn_mask=mask)
        change = self.out(attended.transpose(1, 2).reshape(r, w, width))
        if self.attend_gate is not None:
            change = change * torch.sigmoid(self.attend_gate(x))
        x = x + self.dropout(change)
        change = self.second(self.dropout(nn.functional.silu(self.first(self.layer_norm(x)))))
        if self.layer_gate is not None:
            change = change * torch.sigmoid(self.layer_gate(x))
        out: Tensor = x + self.dropout(change)
        return out

    def lower(self, g: GraphBuilder, x: str, queries: Queries, every: Queries) -> str:
        width = self.out.in_features // self.heads
        normed = lower(self.attend_norm, g, x)
        query_rows = normed
        if queries.rows:
            x, query_rows = (g("Gather", items, queries.rows, axis=0) for items in (x, normed))
        weights, biases = self.query_key_value.weight.chunk(3), self.query_key_value.bias.chunk(3)
        query = lower_heads(g, lower_linear(g, query_rows, weights[0], biases[0]), queries.shape, self.heads, width)
        key = lower_heads(g, lower_linear(g, normed, weights[1], biases[1]), every.shape, self.heads, width)
        value = lower_heads(g, lower_linear(g, normed, weights[2], biases[2]), every.shape, self.heads, width)
        query, key = lower_rotary(g, query, queries.angles), lower_rotary(g, key, every.angles)
        change = lower(self.out, g, lower_attention(g, query, key, value, queries.mask, width))
        if self.attend_gate is not None:
            change = g("Mul", change, g("Sigmoid", lower(self.attend_gate, g, x)))
        x = g("Add", x, change)
        inner = lower(self.first, g, lower(self.layer_norm, g, x))
        change = lower(self.second, g, g("Mul", inner, g("Sigmoid", inner)))
        if self.layer_gate is not None:
            change = g("Mul", change, g("Sigmoid", lower(self.layer_gate, g, x)))
        return g("Add", x, change)
