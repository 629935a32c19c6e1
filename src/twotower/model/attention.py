"""A history read by attention: what was known at every moment as one vector.

Nothing here looks at a target: a vector is made of the history alone, so that items can be searched by it. Places are
rotated into queries and keys (Su et al. 2021, "RoFormer", section 3.2.2), so that only distances count and a history
may be cut anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.config import HistoryConfig
from twotower.data.batches import HistoryWindows, Padded
from twotower.errors import ConfigError
from twotower.model.layers import Dropout, gather

MAX_TOKENS_PER_PASS = 2**14
"""Items that are read at a time where whole histories are."""


def rotary_cos_sin(places: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines (places, width / 2) of the angles place / 10000^(i / (width / 2))."""
    half = width // 2
    angles = torch.arange(places, device=device)[:, None] / 10000 ** (torch.arange(half, device=device) / half)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(…, T, width) turned by the angles of its places, the numbers i and i + width / 2 as a pair."""
    left, right = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class TransformerBlock(nn.Module):
    """Causal self-attention, then a layer per item, both on a residual.

    Plain (SASRec, Kang and McAuley 2018, section 3.2, with the norm in front): x + f(norm(x)).
    Gated (LiGR, Hertel et al. 2025, "From Features to Transformers", section 3.2): x + f(norm(x)) * sigmoid(W x).
    """

    def __init__(self, width: int, config: HistoryConfig) -> None:
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

    def forward(self, x: Tensor, known: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (R, W, E); known (R, 1, W, W) says which items (columns) an item (rows) may read."""
        r, w, width = x.shape
        joint = self.query_key_value(self.attend_norm(x)).view(r, w, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(
            apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value, attn_mask=known
        )
        change = self.out(read.transpose(1, 2).reshape(r, w, width))
        if self.attend_gate is not None:
            change = change * torch.sigmoid(self.attend_gate(x))
        x = x + self.dropout(change)
        change = self.second(self.dropout(nn.functional.silu(self.first(self.layer_norm(x)))))
        if self.layer_gate is not None:
            change = change * torch.sigmoid(self.layer_gate(x))
        out: Tensor = x + self.dropout(change)
        return out


class AttentionPool(nn.Module):
    """A mean of the items' values, weighed by a softmax over what a learned query finds in each and in its place
    (Lin et al. 2017, "A Structured Self-attentive Sentence Embedding", section 2, with a place)."""

    def __init__(self, width: int, config: HistoryConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.randn(self.heads, 1, width // self.heads))
        self.norm = nn.LayerNorm(width)
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, known: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `Block.forward`."""
        r, w, width = x.shape
        key, value = self.key_value(self.norm(x)).view(r, w, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = apply_rotary(self.query.to(key.dtype).expand(self.heads, w, -1), cos, sin).expand(r, -1, -1, -1)
        read = nn.functional.scaled_dot_product_attention(query, apply_rotary(key, cos, sin), value, attn_mask=known)
        out: Tensor = self.out(read.transpose(1, 2).reshape(r, w, width))
        return out


class HistoryEncoder(nn.Module):
    """The rows of a table that a history names, oldest first -> one vector for each of its moments."""

    def __init__(self, width: int, pooling: str, limit: int, config: HistoryConfig, name: str) -> None:
        """`limit` is the most items that are read, the latest. Raises ConfigError if the heads do not share `width`."""
        super().__init__()
        if width % (2 * config.heads):
            raise ConfigError(
                f"sequence '{name}' has width {width}, which {config.heads} heads cannot share in pairs of numbers; "
                f"make it a multiple of {2 * config.heads} or change history.heads"
            )
        self.limit, self.head_width = limit, width // config.heads
        self.input_dropout = Dropout(config.input_dropout)
        self.input_norm = nn.LayerNorm(width)
        kinds = [TransformerBlock] * config.blocks if pooling == "transformer" else [AttentionPool]
        self.blocks = nn.ModuleList(kind(width, config) for kind in kinds)
        self.norm = nn.LayerNorm(width)

    def forward(self, table: Tensor, history: HistoryWindows | Padded) -> Tensor:
        """Table (rows, E) -> (U, E); zeros where nothing is known."""
        if isinstance(history, HistoryWindows):
            out = self._read(table, history.codes, history.sequence).flatten(0, 1).index_select(0, history.place)
            return out * (history.length > 0).to(out.dtype)[:, None]
        codes, n = keep_latest(history.codes, self.limit)
        # Histories of about one length together: a row is filled up to the longest beside it.
        order = torch.argsort(n, descending=True)
        parts, start = [], 0
        while start < len(order):
            longest = max(1, int(n[order[start]]))
            rows = order[start : start + max(1, MAX_TOKENS_PER_PASS // longest)]
            start += len(rows)
            here = codes[rows, :longest]
            out = self._read(table, here, torch.where(here >= 0, 0, -1))
            last = out[torch.arange(len(rows), device=out.device), (n[rows] - 1).clamp(min=0)]
            parts.append(last * (n[rows] > 0).to(out.dtype)[:, None])
        if not parts:
            return table.new_zeros(0, table.shape[1])
        return torch.cat(parts).index_select(0, torch.argsort(order))

    def _read(self, table: Tensor, codes: Tensor, sequence: Tensor) -> Tensor:
        """(R, W) codes and whose they are -> (R, W, E), each of what stands up to it in its sequence and row."""
        x = self.input_norm(self.input_dropout(gather(table, codes.clamp(min=0))))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w = codes.shape[1]
        known = (sequence[:, :, None] == sequence[:, None]) & torch.ones(w, w, device=x.device, dtype=torch.bool).tril()
        cos, sin = rotary_cos_sin(w, self.head_width, x.device)
        for block in self.blocks:
            x = block(x, known[:, None], cos, sin)
        out: Tensor = self.norm(x)
        return out


def keep_latest(codes: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Padded codes (U, T) -> the last `limit` of each row (U, min(T, limit)), and how many they are (U,)."""
    n = (codes >= 0).sum(1)
    if codes.shape[1] > limit:
        place = torch.arange(limit, device=codes.device) + (n - limit).clamp(min=0)[:, None]
        codes, n = codes.gather(1, place), n.clamp(max=limit)
    return codes, n
