"""Nearest-neighbour search over item vectors: exact, FAISS or Milvus. FAISS and pymilvus are imported when first needed.

index = build_index("ivf", vectors, rows, "cosine")
rows, scores = index.search(queries, 100)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue, ValidationError

from twotower.arrays.types import Rows, Shaped, Vectors
from twotower.errors import BundleError, ConfigError, RunError
from twotower.files import layout
from twotower.files.readers import read_json
from twotower.index.auto import Auto
from twotower.index.description import INDEX_FORMAT
from twotower.index.exact import Exact
from twotower.index.faiss.hnsw import Hnsw
from twotower.index.faiss.ivf import Ivf
from twotower.index.faiss.ivfpq import IvfPq
from twotower.index.milvus.milvus import Milvus
from twotower.index.protocol import Index, IndexConfig
from twotower.index.recall import measure_recall, tune_index
from twotower.index.vector_store import Similarity
from twotower.kinds import Kinds, UntrustedKind
from twotower.section import first_problem

__all__ = [
    "INDEXES", "Auto", "Exact", "Hnsw", "Index", "IndexConfig", "Ivf", "IvfPq", "Milvus",
    "Similarity", "build_index", "load_index", "measure_recall", "tune_index",
]  # fmt: skip

INDEXES = Kinds("index", IndexConfig, Auto, Exact, Ivf, Hnsw, IvfPq, Milvus, default=Auto)
"""Kinds of indexes, by their names in a config."""


def build_index(
    kind: str | IndexConfig,
    vectors: Shaped[Vectors, "*_"],
    rows: Shaped[Rows, "*_"],
    metric: Similarity,
    params: Mapping[str, JsonValue] | None = None,
) -> Index:
    """Build an index of item vectors (N, D) under rows (N,); rows of unusable vectors are in `index.rejected`.

    `kind` is the options of a kind, or a name and its options in `params`. Raises ConfigError for an unknown kind or option,
    DataError for arrays of wrong shape or type.
    """
    try:
        options = INDEXES.parse({"kind": kind} | dict(params or {}) if isinstance(kind, str) else kind)
    except ValidationError as e:
        raise ConfigError(f"index {kind}: {first_problem(e)}") from None
    return options.build(vectors, rows, metric)


def load_index(folder: Path, mmap: bool = True, verify: bool = True) -> Index:
    """Load the index of a folder, with memory-mapped vectors if `mmap`. Raises RunError.

    `verify` loads a FAISS file in a child process first, because a malicious file can crash the process that reads it. A kind
    of elsewhere must be imported already.
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
    return kind.load(folder, facts, mmap, verify)
