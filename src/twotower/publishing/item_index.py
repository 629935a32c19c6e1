"""The index of a bundle: its kind, and its search parameters, tuned and checked by two halves of a sample of users."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from twotower.arrays.types import Floats, Ints
from twotower.errors import RunError
from twotower.index import Index, Similarity, measure_recall, tune_index
from twotower.index.protocol import IndexConfig, Publication
from twotower.store.manifest import IndexFacts, RecallCheck

log = logging.getLogger(__name__)


def build_item_index(items: Floats, metric: Similarity, config: IndexConfig, publication: Publication) -> Index:
    """Return the index of the item vectors (I, D) under their rows, of the kind that the config names or that suits them.

    Raises RunError if no vector can be indexed."""
    chosen, why = config.choose(len(items), metric)
    log.info(f"index: {chosen.label} ({why})")
    index = chosen.build(items, np.arange(len(items)), metric, publication)
    if len(index.rejected):
        log.warning(f"{len(index.rejected):,} of {len(items):,} item vectors are zero or not finite; left out")
    if not len(index):
        raise RunError("no item vector can be indexed; the model is broken, `diagnose(run)` says why")
    return index


def tune_and_check(
    index: Index, queries: Floats, config: IndexConfig, banned: Sequence[Ints] | None = None
) -> RecallCheck:
    """Tune the index with one half of the queries (B, D), and return the recall check by the other half. `banned` are the rows that the answer of
    each query leaves out."""
    half = len(queries) // 2
    # Recall of users outside the tuning is slightly lower, so tuning aims a fifth of the way from the threshold to 1.
    aim = config.min_recall + (1 - config.min_recall) / 5
    asked = [banned, None] if banned else [None]  # a new user's answer leaves nothing out
    if index.search_limits():
        params = dict[str, int]()
        for out in asked:
            tune_index(index, queries[:half], config.k, aim, out and out[:half])
            params = {name: max(value, params.get(name, 0)) for name, value in index.search_params.items()}
        index.search_params |= params
    found = min(measure_recall(index, queries[half:], config.k, out and out[half:]) for out in asked)
    if index.search_params:
        log.info(
            f"index: {', '.join(f'{k} {v}' for k, v in index.search_params.items())}, tuned to recall@{config.k} {aim:.3f}"
        )
    log.info(f"recall check: {found:.4f} of the exact top {config.k} by {len(queries) - half:,} held-out users")
    return RecallCheck(recall=found, threshold=config.min_recall, k=config.k, queries=len(queries) - half)


def index_facts(index: Index) -> IndexFacts:
    """Return the facts of an index that a manifest has."""
    return IndexFacts.model_validate(index.describe().model_dump() | {"rejected": len(index.rejected)})
