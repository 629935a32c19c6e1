"""Find the items of a query: by FAISS, exactly or nearly, or in Milvus; each is imported when it is needed.

index = build("ivf", vectors, rows, "cosine")
rows, scores = index.search(queries, 100)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError, RunError, did_you_mean
from twotower.files import read_json
from twotower.index.choose import TuneResult, choose_index, choose_milvus_type, measure_recall, tune_index
from twotower.index.exact import INDEX_FORMAT, ExactIndex
from twotower.index.protocol import Index, Metric, MilvusLocation, Rows, Vectors

__all__ = [
    "KINDS",
    "Index",
    "Metric",
    "MilvusLocation",
    "TuneResult",
    "build_index",
    "choose_index",
    "choose_milvus_type",
    "load_index",
    "measure_recall",
    "tune_index",
    "verify_file",
]

KINDS = {
    "exact": "twotower.index.exact:ExactIndex",
    "flat": "twotower.index.faiss:FlatIndex",
    "ivf": "twotower.index.faiss:IvfIndex",
    "hnsw": "twotower.index.faiss:HnswIndex",
    "ivfpq": "twotower.index.faiss:IvfPqIndex",
    "milvus": "twotower.index.milvus.milvus_index:MilvusIndex",
}
"""Where each kind of index lives."""


def build_index(
    kind: str,
    vectors: Vectors,
    rows: Rows,
    metric: Metric,
    params: dict[str, int] | None = None,
    location: MilvusLocation | None = None,
) -> Index:
    """An index of item vectors (N, D) under rows (N,). Vectors it cannot hold are in `index.rejected`.

    `location` goes with "milvus". Raises ConfigError for an unknown kind or parameter, DataError for arrays that do not fit.
    """
    engine: Any = _engine(kind)
    if engine.remote != (location is not None):
        what = (
            "needs a location, such as MilvusLocation('./milvus.db')"
            if engine.remote
            else "keeps its vectors here; leave location out"
        )
        raise ConfigError(f"index: {kind!r} {what}")
    index: Index = engine.build(vectors, rows, metric, params, *([location] if engine.remote else []))
    return index


def load_index(folder: Path, mmap: bool = True, verify: bool = True) -> Index:
    """The index saved in a folder, its vectors left on disk if `mmap`. Raises RunError.

    `verify` loads a FAISS file in a process of its own first, because a hostile one can end the process that reads it.
    """
    said = read_json(folder / "index.json")
    if not isinstance(said, dict) or said.get("format") != INDEX_FORMAT or str(said.get("kind")) not in KINDS:
        raise RunError(f"{folder}: not an index of this version")
    return _engine(said["kind"]).restore(folder, said, mmap, verify)


def verify_file(path: Path, *, timeout: float = 120.0, memory: int | None = None) -> None:
    """Load and search a FAISS file in a process of its own. Raises RunError if that fails, dies or takes too long."""
    module = _module("twotower.index.faiss")
    module.verify_file(path, timeout=timeout, memory=memory)


def _engine(kind: str) -> type[ExactIndex]:
    if kind not in KINDS:
        raise ConfigError(f"index: {kind!r} is not known; choose {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    module, name = KINDS[kind].split(":")
    found: type[ExactIndex] = getattr(_module(module), name)
    return found


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as e:
        if e.name == "faiss":
            raise ConfigError("this index needs FAISS; pip install faiss-cpu") from None
        if e.name in ("pymilvus", "grpc"):
            raise ConfigError("this index needs the client of Milvus; pip install -e '.[milvus]'") from None
        raise
