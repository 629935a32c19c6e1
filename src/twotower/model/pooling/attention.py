"""Pooling `attention`: a learned query per head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.arrays.types import Bool, Float
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


class Attention(HistoryPooling):
    """Attention with one learned query q per head: softmax(q K^T / sqrt(d)) V, keys with positions (Lin et al. 2017, "A
    Structured Self-attentive Sentence Embedding", section 2.1, as dot-product attention).

    Use it when a few interactions of a long history matter. It needs `window`: the latest interactions are read, and
    training cuts longer histories into windows.
    """

    kind = "attention"

    def stack(self, width: int) -> list[HistoryBlock]:
        return [AttentionPool(width, self)]


class AttentionPool(HistoryBlock):
    """Attention with one learned query per head."""

    def __init__(self, width: int, config: Attention) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.randn(self.heads, 1, width // self.heads))
        self.norm = nn.LayerNorm(width)
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "R W E"], mask: Bool[Tensor, "R 1 W W"], rotation: Rotation
    ) -> Float[Tensor, "R W E"]:
        r, w, width = x.shape
        key, value = self.key_value(self.norm(x)).view(r, w, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = rotation(self.query.to(key.dtype).expand(self.heads, w, -1)).expand(r, -1, -1, -1)
        attended = nn.functional.scaled_dot_product_attention(query, rotation(key), value, attn_mask=mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(r, w, width))
        return out

    def lower(self, g: GraphBuilder, x: str, queries: Queries, every: Queries) -> str:
        width = self.out.in_features // self.heads
        normed = lower(self.norm, g, x)
        pairs = zip(self.key_value.weight.chunk(2), self.key_value.bias.chunk(2), strict=True)
        key, value = (lower_heads(g, lower_linear(g, normed, w, b), every.shape, self.heads, width) for w, b in pairs)
        query = lower_rotary(g, g.constant(self.query[None]), queries.angles)  # (U, heads, Q, width)
        attended = lower_attention(g, query, lower_rotary(g, key, every.angles), value, queries.mask, width)
        return lower(self.out, g, attended)
