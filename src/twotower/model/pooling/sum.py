"""Pooling `sum`."""

from __future__ import annotations

from twotower.model.pooling.pooling import Pooling


class Sum(Pooling):
    """Sum of the embeddings."""

    kind = "sum"
