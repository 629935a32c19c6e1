"""Pooling `attention`: a learned query per head."""

from __future__ import annotations

from pydantic import Field

from twotower.model.pooling.pooling import Pooling


class Attention(Pooling):
    """Attention with one learned query q per head: softmax(q K^T / sqrt(d)) V, keys with positions (Lin et al. 2017, "A
    Structured Self-attentive Sentence Embedding", section 2.1, as dot-product attention).

    Use when a few interactions of a long history matter. `window` is needed: the latest interactions are read, and
    training cuts longer histories into windows.
    """

    kind = "attention"
    reads_windows = True
    research = ("input_dropout",)

    heads: int = Field(4, ge=1, description="Number of attention heads. Divides the width of the sequence.")
    input_dropout: float = Field(
        0.2, ge=0, lt=1, description="Dropout rate of the item embeddings that attention reads."
    )
