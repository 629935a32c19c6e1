"""Pooling `transformer`: causal blocks over a history."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from twotower.model.pooling.pooling import Pooling


class Transformer(Pooling):
    """Output of a stack of causal transformer blocks at the latest interaction (SASRec, Kang and McAuley 2018).

    Use when the meaning of an interaction depends on those before it. `window` is needed: the latest interactions are
    read, and training cuts longer histories into windows.
    """

    kind = "transformer"
    reads_windows = True
    research = ("feed_forward", "input_dropout")

    block: Literal["plain", "gated"] = Field(
        "gated",
        description="Transformer block. plain: x + f(norm(x)) (SASRec). gated: each change is multiplied by a sigmoid"
        " gate of its input (LiGR).",
    )
    blocks: int = Field(2, ge=1, description="Number of transformer blocks.")
    heads: int = Field(4, ge=1, description="Number of attention heads. Divides the width of the sequence.")
    feed_forward: int = Field(
        2,
        ge=1,
        description="Hidden width of a transformer block's feed-forward layers, as a multiple of the sequence's width.",
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="Dropout rate of the output of each sub-layer of a transformer block."
    )
    input_dropout: float = Field(
        0.2, ge=0, lt=1, description="Dropout rate of the item embeddings that attention reads."
    )
