"""Pooling `mean`."""

from __future__ import annotations

from twotower.model.pooling.pooling import Pooling


class Mean(Pooling):
    """Mean of the embeddings: their sum divided by their number n."""

    kind = "mean"
