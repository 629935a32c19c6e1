"""Vectors of many users at once: precomputed ones, or those of the user tower on stored or given features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from twotower.arrays.ragged import Column, Ragged
from twotower.arrays.types import Floats, Ints
from twotower.data.context import default_context
from twotower.model.inputs.gather import Feed, context_feed, feed, stack_feeds
from twotower.retrieval.loaded_bundle import LoadedBundle
from twotower.retrieval.request import Method

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever

ATTENTION_MAX_CELLS = 2**21
"""Attention weights that one call of the tower may hold for each head: users times squared history length."""
TOWER_MAX_CODES = 2**21
"""Codes of one field that one call of the tower may hold, padding included, where a call has more than one user."""


def embed_users(retriever: Retriever, users: Ints, method: Method, interactions: Ints | None = None) -> Floats:
    """Return the vectors (B, D) of user rows (B,): precomputed (1), or by the tower on stored features (2), with the context of
    the interactions (B,) if the tower reads one, by default the declared one. Raises DataError without precomputed vectors,
    ConfigError without a default context."""
    loaded = retriever.loaded
    if method == 1:
        return loaded.stored_vectors(users)
    context = dict[str, Column]()
    if retriever.reads_context:
        data = loaded.dataset
        context = default_context(data.encoders, data.context_frame) if interactions is None else data.context
        interactions = np.zeros(len(users), np.int64) if interactions is None else interactions

    def part(start: int) -> Feed:
        some = users[start : start + step]
        if interactions is None:
            return feed(loaded.fields, loaded.columns, some)
        return context_feed(loaded.fields, loaded.columns, some, context, interactions[start : start + step])

    step = _attention_step(loaded) or max(1, len(users))
    return np.concatenate([loaded.tower(part(start)) for start in range(0, max(1, len(users)), step)])


def embed_users_in_blocks(retriever: Retriever, users: Ints) -> Floats:
    """Return the vectors (B, D) of user rows (B,) by the tower on stored features, in calls of bounded memory."""
    histories = [c for c in retriever.loaded.columns.values() if isinstance(c, Ragged)]
    longest = max((int(c.indices(users)[1].max(initial=0)) for c in histories), default=0)
    step = max(1, TOWER_MAX_CODES // max(256, longest))
    parts = [embed_users(retriever, users[start : start + step], 2) for start in range(0, len(users), step)]
    return np.concatenate(parts) if parts else np.empty((0, retriever.index.width), np.float32)


def embed_feeds(loaded: LoadedBundle, feeds: Sequence[Feed]) -> Floats:
    """Return the vectors (B, D) of the feeds of B users, in calls of bounded memory."""
    widths = [max((part.shape[1] for part in one.values() if part.ndim == 2), default=0) for one in feeds]
    step = min(_attention_step(loaded) or len(feeds), max(1, TOWER_MAX_CODES // max([256, *widths])))
    parts = [loaded.tower(stack_feeds(feeds[start : start + step])) for start in range(0, len(feeds), max(1, step))]
    return np.concatenate(parts) if parts else np.empty((0, loaded.index.width), np.float32)


def _attention_step(loaded: LoadedBundle) -> int:
    """Return the number of users of a call whose attention, a weight for every two items of a history, fits in memory; 0
    without a limit."""
    longest = max((f.limit for f in loaded.fields), default=0)
    return max(1, ATTENTION_MAX_CELLS // longest**2) if longest else 0
