"""Vectors in a Milvus server: options of kind "milvus". The engine and pymilvus are imported at first use."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from twotower.errors import ConfigError, install_command
from twotower.index.auto import EXACT_MAX_ITEMS, UNCOMPRESSED_MAX_ITEMS
from twotower.index.exact import Index
from twotower.index.protocol import (
    CollectionServer,
    Count,
    IndexConfig,
    IndexDescription,
    Publication,
    RemoteDescription,
)
from twotower.index.vector_store import Similarity

MilvusType = Literal["FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"]
BUILD_PARAMS: dict[str, tuple[str, ...]] = {
    "auto": (), "FLAT": (), "IVF_FLAT": ("nlist",), "IVF_SQ8": ("nlist",), "HNSW": ("m", "ef_construction"),
}  # fmt: skip
"""Options of each index type of Milvus."""


class MilvusDescription(RemoteDescription):
    """Description of an index in Milvus."""

    type: MilvusType
    nlist: int


class Milvus(IndexConfig):
    """Index in a Milvus server. Each publishing creates a collection and moves an alias to it.

    Use it if the vectors do not fit the servers that answer, or if many of them share one index. Milvus returns ANN
    candidates with their vectors, which are re-scored exactly."""

    kind = "milvus"
    remote = True
    packages = ("pymilvus",)
    description_type = MilvusDescription

    uri: str = Field(
        "",
        description="Milvus server, as http://HOST:PORT with the token in TWOTOWER_MILVUS_TOKEN, or a path ending "
        "in .db for milvus-lite.",
    )
    prefix: str = Field(
        "twotower",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$",
        description="Alias of the current bundle's collection and prefix of collection names, unique to a store.",
    )
    type: Literal["auto", MilvusType] = Field(
        "auto",
        description="Milvus index type. auto: FLAT up to 50,000 items, IVF_FLAT up to two million, IVF_SQ8 beyond.",
    )
    timeout: float = Field(
        300.0, gt=0, description="Limit of a step of publishing, such as building the index. Seconds."
    )
    nlist: Annotated[Count, Field(le=65_536)] = Field(0, description="Number of lists of an IVF type. 0: 4 sqrt(N).")
    m: Annotated[Count, Field(ge=2)] = Field(16, description="Neighbours of a node of HNSW.")
    ef_construction: Annotated[Count, Field(ge=1)] = Field(100, description="Beam width of building HNSW.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.uri:
            raise ValueError(
                "kind = 'milvus' needs index.uri: http://HOST:PORT, or a path ending in .db for milvus-lite"
            )
        if self.uri.startswith(("http://", "https://")):
            if "@" in self.uri:
                raise ValueError("uri holds a user or password, which a bundle would carry; set TWOTOWER_MILVUS_TOKEN")
        elif "://" in self.uri or not self.uri.endswith(".db"):
            raise ValueError(f"uri is '{self.uri}', expected http://HOST:PORT, https://…, or a path ending in .db")
        for name in ("nlist", "m", "ef_construction"):
            if name not in BUILD_PARAMS[self.type] and getattr(self, name) != type(self).model_fields[name].default:
                allowed = " or ".join(f"'{type_}'" for type_, names in BUILD_PARAMS.items() if name in names)
                raise ValueError(f"{name} is an option of type = {allowed}, not of '{self.type}'; leave it out")
        return self

    def choose(self, n_items: int, metric: Similarity) -> tuple[IndexConfig, str]:
        # An absolute path: the service may run in another folder.
        uri = self.uri if "://" in self.uri else str(Path(self.uri).absolute())
        type_, why = (self.type, "set by index.type") if self.type != "auto" else choose_milvus_type(n_items)
        return self.model_copy(update={"uri": uri, "type": type_}), why

    @property
    def label(self) -> str:
        return f"milvus {self.type}"

    @property
    def params(self) -> dict[str, JsonValue]:
        return {name: getattr(self, name) for name in BUILD_PARAMS[self.type]}

    @classmethod
    def from_description(cls, known: IndexDescription) -> Self:
        assert isinstance(known, MilvusDescription)
        return cls.model_validate({**known.params, "uri": known.uri, "prefix": known.alias, "type": known.type})

    def empty(self, width: int, metric: Similarity, publication: Publication) -> Index:
        index: Index = _module("milvus_index").MilvusIndex(self, width, metric, publication)
        return index

    @classmethod
    def connect(cls, uri: str, timeout: float) -> CollectionServer:
        server: CollectionServer = _module("client").MilvusConnection(uri, connect_timeout=timeout)
        return server


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


def _module(name: str) -> ModuleType:
    try:
        return import_module(f"twotower.index.milvus.{name}")
    except ModuleNotFoundError as e:
        if e.name in ("pymilvus", "grpc"):
            raise ConfigError(f"this index needs pymilvus: {install_command('milvus')}") from None
        raise
