"""Attention over a history: one vector for each of its prefixes.

A vector depends on the history alone, never on a target item, so that items can be searched by it. Positions enter as
rotations of queries and keys (Su et al. 2021, "RoFormer", section 3.2.2): only distances matter, and a history may be
cut anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.errors import ConfigError
from twotower.model.inputs.carriers import HistoryWindows, Padded
from twotower.model.layers import Dropout, gather
from twotower.model.pooling.attention import Attention
from twotower.model.pooling.transformer import Transformer

MAX_TOKENS_PER_PASS = 2**14
"""Items that one forward pass over padded histories reads."""


def rotary_cos_sin(length: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (length, width / 2) of the angles position / 10000^(i / (width / 2)) (RoFormer, equation 15)."""
    half = width // 2
    angles = torch.arange(length, device=device)[:, None] / 10000 ** (torch.arange(half, device=device) / half)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (…, T, width) by the angles of its T positions; the components i and i + width / 2 are a pair."""
    left, right = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class TransformerBlock(nn.Module):
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

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (R, W, E) -> (R, W, E); mask (R, 1, W, W) is true where a query (row) may attend to a key (column)."""
        r, w, width = x.shape
        joint = self.query_key_value(self.attend_norm(x)).view(r, w, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(
            apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value, attn_mask=mask
        )
        change = self.out(attended.transpose(1, 2).reshape(r, w, width))
        if self.attend_gate is not None:
            change = change * torch.sigmoid(self.attend_gate(x))
        x = x + self.dropout(change)
        change = self.second(self.dropout(nn.functional.silu(self.first(self.layer_norm(x)))))
        if self.layer_gate is not None:
            change = change * torch.sigmoid(self.layer_gate(x))
        out: Tensor = x + self.dropout(change)
        return out


class AttentionPool(nn.Module):
    """Attention pooling with one learned query q per head: softmax(q K^T / sqrt(d)) V, keys with positions
    (Lin et al. 2017, "A Structured Self-attentive Sentence Embedding", section 2.1, as dot-product attention)."""

    def __init__(self, width: int, config: Attention) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.randn(self.heads, 1, width // self.heads))
        self.norm = nn.LayerNorm(width)
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (R, W, E) -> (R, W, E) under a mask (R, 1, W, W), as `TransformerBlock.forward`."""
        r, w, width = x.shape
        key, value = self.key_value(self.norm(x)).view(r, w, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = apply_rotary(self.query.to(key.dtype).expand(self.heads, w, -1), cos, sin).expand(r, -1, -1, -1)
        attended = nn.functional.scaled_dot_product_attention(query, apply_rotary(key, cos, sin), value, attn_mask=mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(r, w, width))
        return out


class HistoryEncoder(nn.Module):
    """Encoder of histories: table rows (…, E) in order of time, oldest first -> one vector (E,) per prefix.

    norm(block_n(… block_1(norm(x)))) with x the gathered rows; the vector of a prefix is the output at its last item.
    """

    def __init__(
        self,
        width: int,
        config: Attention | Transformer,
        name: str,
        max_tokens: int = MAX_TOKENS_PER_PASS,
    ) -> None:
        """Build the encoder. `max_tokens` is the number of items in one pass
        over padded histories. Raises ConfigError if 2 x heads does not divide `width`."""
        super().__init__()
        if width % (2 * config.heads):
            raise ConfigError(
                f"sequence '{name}' has width {width}, which {config.heads} heads cannot share in pairs of numbers; "
                f"make it a multiple of {2 * config.heads} or change pooling.heads"
            )
        self.limit, self.head_width, self.max_tokens = config.window, width // config.heads, max_tokens
        self.input_dropout = Dropout(config.input_dropout)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            [TransformerBlock(width, config) for _ in range(config.blocks)]
            if isinstance(config, Transformer)
            else [AttentionPool(width, config)]
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, table: Tensor, history: HistoryWindows | Padded) -> Tensor:
        """Map a table (rows, E) and U histories to (U, E); zeros for an empty history."""
        if isinstance(history, HistoryWindows):
            out = self._encode(table, history.codes, history.sequence).flatten(0, 1).index_select(0, history.place)
            return out * (history.length > 0).to(out.dtype)[:, None]
        codes, n = keep_latest(history.codes, self.limit)
        # Histories of similar length together: a row is padded to the longest of its pass.
        order = torch.argsort(n, descending=True)
        parts, start = [], 0
        while start < len(order):
            longest = max(1, int(n[order[start]]))
            rows = order[start : start + max(1, self.max_tokens // longest)]
            start += len(rows)
            padded = codes[rows, :longest]
            out = self._encode(table, padded, torch.where(padded >= 0, 0, -1))
            last = out[torch.arange(len(rows), device=out.device), (n[rows] - 1).clamp(min=0)]
            parts.append(last * (n[rows] > 0).to(out.dtype)[:, None])
        if not parts:
            return table.new_zeros(0, table.shape[1])
        return torch.cat(parts).index_select(0, torch.argsort(order))

    def _encode(self, table: Tensor, codes: Tensor, sequence: Tensor) -> Tensor:
        """Map codes (R, W) and the number of the sequence of each (R, W) to (R, W, E).

        A position attends to the positions up to its own in the same row and sequence.
        """
        x = self.input_norm(self.input_dropout(gather(table, codes.clamp(min=0))))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w = codes.shape[1]
        mask = (sequence[:, :, None] == sequence[:, None]) & torch.ones(w, w, device=x.device, dtype=torch.bool).tril()
        cos, sin = rotary_cos_sin(w, self.head_width, x.device)
        for block in self.blocks:
            x = block(x, mask[:, None], cos, sin)
        out: Tensor = self.norm(x)
        return out


def keep_latest(codes: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the last `limit` codes of each row of padded codes (U, T) -> (U, min(T, limit)), and their count (U,)."""
    n = (codes >= 0).sum(1)
    if codes.shape[1] > limit:
        position = torch.arange(limit, device=codes.device) + (n - limit).clamp(min=0)[:, None]
        codes, n = codes.gather(1, position), n.clamp(max=limit)
    return codes, n
