"""Index types of Milvus, with their build and search parameters and the defaults."""

from __future__ import annotations

from typing import Literal

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
