"""Address of an index in Milvus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twotower.index.milvus.index_types import MilvusType

CONNECT_TIMEOUT = 3.0
"""Default limit of a connection to Milvus. Seconds."""


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
