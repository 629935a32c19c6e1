"""Nearest-neighbour search over item vectors: exact, FAISS or Milvus. FAISS and pymilvus are imported when first needed.

index = build_index("ivf", vectors, rows, "cosine")
rows, scores = index.search(queries, 100)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from twotower.arrays.types import Rows, Vectors
from twotower.errors import ConfigError, RunError, did_you_mean
from twotower.files import layout
from twotower.files.readers import read_json
from twotower.index.choose import choose_index, measure_recall, tune_index
from twotower.index.description import INDEX_FORMAT
from twotower.index.exact import ExactIndex
from twotower.index.milvus.location import MilvusLocation, choose_milvus_type
from twotower.index.protocol import Index
from twotower.index.vector_store import Metric

__all__ = [
    "KINDS",
    "Index",
    "Metric",
    "MilvusLocation",
    "build_index",
    "choose_index",
    "choose_milvus_type",
    "load_index",
    "measure_recall",
    "tune_index",
]

KINDS = {
    "exact": "twotower.index.exact:ExactIndex",
    "flat": "twotower.index.faiss.kinds:FlatIndex",
    "ivf": "twotower.index.faiss.kinds:IvfIndex",
    "hnsw": "twotower.index.faiss.kinds:HnswIndex",
    "ivfpq": "twotower.index.faiss.kinds:IvfPqIndex",
    "milvus": "twotower.index.milvus.milvus_index:MilvusIndex",
}
"""Module and class of each kind of index."""


def build_index(
    kind: str,
    vectors: Vectors,
    rows: Rows,
    metric: Metric,
    params: dict[str, int] | None = None,
    location: MilvusLocation | None = None,
) -> Index:
    """Build an index of item vectors (N, D) under rows (N,); rows of unusable vectors are in `index.rejected`.

    `location` is required for kind "milvus" and allowed for no other. Raises ConfigError for an unknown kind or
    parameter, DataError for arrays of wrong shape or type.
    """
    engine = _engine(kind)
    if engine.remote != (location is not None):
        need = "needs a location, such as MilvusLocation('./milvus.db')" if engine.remote else "takes no location"
        raise ConfigError(f"index kind {kind!r} {need}")
    return engine.build(vectors, rows, metric, params, location)


def load_index(folder: Path, mmap: bool = True, verify: bool = True) -> Index:
    """Load the index of a folder, with memory-mapped vectors if `mmap`. Raises RunError.

    `verify` loads a FAISS file in a child process first, because a malicious file can crash the process that reads it.
    """
    facts = read_json(folder / layout.INDEX_FACTS)
    if not isinstance(facts, dict) or facts.get("format") != INDEX_FORMAT or str(facts.get("kind")) not in KINDS:
        raise RunError(f"{folder}: not an index of format {INDEX_FORMAT}; publish the run again")
    return _engine(facts["kind"]).restore(folder, facts, mmap, verify)


def _engine(kind: str) -> type[ExactIndex]:
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r} (allowed: {', '.join(KINDS)}){did_you_mean(kind, KINDS)}")
    module, name = KINDS[kind].split(":")
    found: type[ExactIndex] = getattr(_module(module), name)
    return found


def _module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as e:
        if e.name == "faiss":
            raise ConfigError("this index needs FAISS; pip install faiss-cpu") from None
        if e.name in ("pymilvus", "grpc"):
            raise ConfigError("this index needs pymilvus; pip install -e '.[milvus]'") from None
        raise
