"""Nearest-neighbour search over item vectors: exact, FAISS or Milvus, and the recall of an index against exact search.

FAISS and pymilvus are imported at first use.

index = build_index("ivf", vectors, rows, "cosine")
rows, scores = index.search(queries, 100)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import JsonValue, ValidationError

from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import BundleError, ConfigError, DataError, RunError
from twotower.files import layout
from twotower.files.readers import read_json
from twotower.index.auto import Auto
from twotower.index.exact import Exact, Index
from twotower.index.faiss.hnsw import Hnsw
from twotower.index.faiss.ivf import Ivf
from twotower.index.faiss.ivfpq import IvfPq
from twotower.index.milvus.milvus import Milvus
from twotower.index.protocol import INDEX_FORMAT, IndexConfig
from twotower.index.vector_store import Similarity
from twotower.kinds import Kinds, UntrustedKind
from twotower.section import first_problem

__all__ = [
    "INDEXES", "Auto", "Exact", "Hnsw", "Index", "IndexConfig", "Ivf", "IvfPq", "Milvus",
    "Similarity", "build_index", "load_index", "measure_recall", "tune_index",
]  # fmt: skip

INDEXES = Kinds("index", IndexConfig, Auto, Exact, Ivf, Hnsw, IvfPq, Milvus, default=Auto)
"""Kinds of indexes by name."""


def build_index(
    kind: str | IndexConfig, vectors: Shaped[Vectors, "*_"], rows: Shaped[Rows, "*_"], metric: Similarity,
    params: Mapping[str, JsonValue] | None = None,
) -> Index:  # fmt: skip
    """Build an index of item vectors (N, D) under rows (N,); rows of unusable vectors are in `index.rejected`.

    `kind` is an IndexConfig, or the name of a kind with options in `params`. Raises ConfigError for an unknown kind or
    option, DataError for arrays of wrong shape or type.
    """
    try:
        options = INDEXES.parse({"kind": kind} | dict(params or {}) if isinstance(kind, str) else kind)
    except ValidationError as e:
        raise ConfigError(f"index {kind}: {first_problem(e)}") from None
    return options.build(vectors, rows, metric)


def load_index(folder: Path, verify: bool = True) -> Index:
    """Load the index of a folder, with memory-mapped vectors. Raises RunError.

    `verify` loads a FAISS file in a child process first: a malicious file can crash the process that reads it. A kind
    of another package must be imported already.
    """
    facts = read_json(folder / layout.INDEX_FACTS)
    if not isinstance(facts, dict) or facts.get("format") != INDEX_FORMAT:
        raise RunError(f"{folder}: not an index of format {INDEX_FORMAT}; publish the run again")
    try:
        kind = INDEXES.find(str(facts.get("kind")))
    except UntrustedKind as e:
        raise BundleError(f"{folder}: {e.in_data}", "kinds") from None
    except ConfigError as e:
        raise RunError(f"{folder}: {e}") from None
    return kind.load(folder, facts, verify)


Banned = Sequence[Shaped[Rows, "_"]] | None
"""Rows that the answer to each query leaves out. None: no rows."""


def measure_recall(index: Index, queries: Shaped[Vectors, "B D"], k: int, banned: Banned = None) -> float:
    """Return recall@k against exact search, averaged over queries, without the `banned` rows. Equal scores count as
    hits.

    Queries are user vectors. Item vectors overestimate recall: each finds itself. Raises DataError for an empty index
    or no queries.
    """
    return _recall(index, queries, k, banned, _kth_exact_score(index, queries, k, banned))


def tune_index(index: Index, queries: Shaped[Vectors, "B D"], k: int, target: float, banned: Banned = None) -> float:
    """Set each search parameter to the smallest value, to a sixteenth, whose `measure_recall` is at least `target`.

    Parameters are tuned in the order of `search_limits`, while later ones are at their limits. If the limits miss the
    target, they stay. Returns the recall. Raises ConfigError for a target outside (0, 1], DataError.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"the target recall must be above 0 and at most 1, not {target}")
    floor = _kth_exact_score(index, queries, k, banned)
    limits = index.search_limits()
    index.search_params |= limits
    recall = _recall(index, queries, k, banned, floor)
    if recall >= target:
        for name, limit in limits.items():
            low, high = 0, 1  # low misses the target
            while high < limit:
                index.search_params[name] = high
                if (found := _recall(index, queries, k, banned, floor)) >= target:
                    recall = found
                    break
                low, high = high, high * 2
            high = min(high, limit)
            while high - low > max(1, high // 16):
                index.search_params[name] = (low + high) // 2
                if (found := _recall(index, queries, k, banned, floor)) >= target:
                    high, recall = index.search_params[name], found
                else:
                    low = index.search_params[name]
            index.search_params[name] = high
    return recall


def _kth_exact_score(index: Index, queries: Shaped[Vectors, "B D"], k: int, banned: Banned) -> Shaped[Vectors, "B 1"]:
    """Return the k-th highest exact score of each query, minus infinity where fewer rows remain."""
    if not len(index) or not len(queries):
        raise DataError("recall needs an index with items and at least one query")
    return index.search(queries, min(k, len(index)), banned=banned, exact=True)[1][:, -1:]


def _recall(
    index: Index, queries: Shaped[Vectors, "B D"], k: int, banned: Banned, floor: Shaped[Vectors, "B 1"]
) -> float:
    k = min(k, len(index))
    if banned is None or index.batch_invariant:
        scores = index.search(queries, k, banned=banned)[1]
    else:  # one query at a time, as in serving: a batch fetches candidates for its longest list of banned rows
        each = [index.search(queries[n : n + 1], k, banned=[rows])[1] for n, rows in enumerate(banned)]
        scores = np.concatenate(each)
    return float((scores >= floor).sum() / (len(queries) * k))
