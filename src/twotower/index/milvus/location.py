"""Location of an index in Milvus, and the index types of Milvus with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from twotower.index.choose import EXACT_MAX_ITEMS, UNCOMPRESSED_MAX_ITEMS

CONNECT_TIMEOUT = 3.0
"""Default limit of a connection to Milvus. Seconds."""
MilvusType = Literal["FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"]
BUILD_PARAMS: dict[MilvusType, dict[str, int]] = {
    "FLAT": {},
    "IVF_FLAT": {"nlist": 0},
    "IVF_SQ8": {"nlist": 0},
    "HNSW": {"m": 16, "ef_construction": 100},
}
SEARCH_PARAMS: dict[MilvusType, dict[str, int]] = {
    "FLAT": {},
    "IVF_FLAT": {"nprobe": 16},
    "IVF_SQ8": {"nprobe": 16, "refine": 2},
    "HNSW": {"ef": 64},
}
"""Build and search parameters of each index type, with their defaults."""


@dataclass(frozen=True)
class MilvusLocation:
    """Server, collection names and index type of an index of kind "milvus"."""

    uri: str
    """`http://HOST:PORT` of a server, or a path ending in .db, which milvus-lite opens in this process."""
    prefix: str = "twotower"
    """Name of the alias, and prefix of collection names."""
    type: MilvusType = "IVF_FLAT"
    """Index type in Milvus."""
    timeout: float = 300.0
    """Limit of each step of building. Seconds."""
    model: str = ""
    """SHA-256 of the model that made the vectors."""
    on_create: Callable[[str], None] = lambda name: None
    """Called with the name of a collection before the collection is created."""
    connect_timeout: float = CONNECT_TIMEOUT
    """Limit of the connection. Seconds."""


def choose_milvus_type(n_items: int) -> tuple[MilvusType, str]:
    """Return the Milvus index type for a catalogue of `n_items`, and the reason as a sentence."""
    if n_items <= EXACT_MAX_ITEMS:
        return "FLAT", f"all {n_items:,} items are scored"
    if n_items <= UNCOMPRESSED_MAX_ITEMS:
        return "IVF_FLAT", f"lists of whole vectors: fast to search and to build for {n_items:,} items"
    return (
        "IVF_SQ8",
        f"lists of scalar-quantised vectors, then exact scores: {n_items:,} whole vectors need much memory",
    )
