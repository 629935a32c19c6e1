"""Pooling `sqrt`."""

from __future__ import annotations

from twotower.model.pooling.pooling import Pooling


class Sqrt(Pooling):
    """Sum of the embeddings divided by sqrt(n): the length of the vector grows slowly with their number n."""

    kind = "sqrt"
