"""Choice of the index kind by catalogue size, tuning of search parameters to a recall, and the measurement of recall."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from twotower.arrays.types import Vectors
from twotower.errors import ConfigError, DataError
from twotower.index.protocol import Index
from twotower.index.vector_store import Metric
from twotower.section import Section

EXACT_MAX_ITEMS = 50_000
UNCOMPRESSED_MAX_ITEMS = 2_000_000


class IndexConfig(Section):
    """Index over the item vectors of a published model."""

    kind: Literal["auto", "exact", "flat", "ivf", "hnsw", "ivfpq", "milvus"] = Field(
        "auto", description="Kind of index. auto: by the size of the catalogue, never milvus."
    )
    min_recall: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Minimum recall against exact search, over held-out users, that publishing accepts. Search "
        "parameters are tuned to it.",
    )
    k: int = Field(100, ge=1, description="Cut-off of min_recall.")
    queries: int = Field(
        1000,
        ge=20,
        description="Number of held-out users in the recall check: one half tunes the index, the other half measures "
        "it.",
    )
    uri: str = Field(
        "",
        description="Milvus server, as http://HOST:PORT, or a path ending in .db for milvus-lite (kind milvus). The "
        "token comes from TWOTOWER_MILVUS_TOKEN.",
    )
    prefix: str = Field(
        "twotower",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$",
        description="Alias of the current bundle's collection, and prefix of collection names (kind milvus). Unique "
        "to a store.",
    )
    type: Literal["auto", "FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"] = Field(
        "auto", description="Milvus index type (kind milvus). auto: by the size of the catalogue."
    )
    timeout: float = Field(
        300.0,
        gt=0,
        description="Seconds that one step of publishing to Milvus may take, with building its index (kind milvus).",
    )

    @model_validator(mode="after")
    def _check(self) -> IndexConfig:
        if self.kind != "milvus":
            for name in ("uri", "prefix", "type", "timeout"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is an option of kind = 'milvus', not of '{self.kind}'; leave it out")
        elif not self.uri:
            raise ValueError(
                "kind = 'milvus' needs index.uri: http://HOST:PORT, or a path ending in .db for milvus-lite"
            )
        elif self.uri.startswith(("http://", "https://")):
            if "@" in self.uri:
                raise ValueError("uri holds a user or password, which a bundle would carry; set TWOTOWER_MILVUS_TOKEN")
        elif "://" in self.uri or not self.uri.endswith(".db"):
            raise ValueError(f"uri is '{self.uri}', expected http://HOST:PORT, https://…, or a path ending in .db")
        return self


def choose_index(n_items: int, metric: Metric) -> tuple[str, dict[str, int], str]:
    """Return the index kind and build parameters for a catalogue of `n_items`, and the reason as a sentence."""
    if n_items <= EXACT_MAX_ITEMS:
        return "exact", {}, f"exact search: {n_items:,} items are scored in a few milliseconds"
    nlist = round(4 * n_items**0.5)
    if n_items > UNCOMPRESSED_MAX_ITEMS:
        why = f"product-quantised vectors in {nlist:,} lists, then exact scores: whole vectors of {n_items:,} items need too much memory"
        return "ivfpq", {"nlist": nlist}, why
    # On synthetic clusters HNSW was no faster than IVF at recall 0.95, and took five times as long to build for a
    # million vectors (benchmarks/search_speed.py --kinds ivf,hnsw).
    items = "items of equal norm" if metric == "cosine" else "items, augmented to equal norm"
    return (
        "ivf",
        {"nlist": nlist},
        f"{nlist:,} lists of whole vectors: fast to search and to build for {n_items:,} {items}",
    )


def measure_recall(index: Index, queries: Vectors, k: int) -> float:
    """Return recall@k against exact search, averaged over queries (B, D). Equal scores count as found.

    Queries are vectors of users. Item vectors as queries overestimate recall: each finds itself. Raises DataError for an
    empty index or no queries.
    """
    return _recall(index, queries, k, _kth_exact_score(index, queries, k))


def tune_index(index: Index, queries: Vectors, k: int, target: float) -> float:
    """Set each search parameter of the index to the smallest value, to a sixteenth, with recall@k of at least `target`.

    Parameters are tuned in the order of `search_limits`, while later ones are at their limits. If the limits themselves
    miss the target, they stay. Returns the recall. Raises ConfigError for a target outside (0, 1], DataError.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"the target recall must be above 0 and at most 1, not {target}")
    floor = _kth_exact_score(index, queries, k)
    limits = index.search_limits()
    index.search_params |= limits
    recall = _recall(index, queries, k, floor)
    if recall >= target:
        for name, limit in limits.items():
            low, high = 0, 1  # low misses the target
            while high < limit:
                index.search_params[name] = high
                if (found := _recall(index, queries, k, floor)) >= target:
                    recall = found
                    break
                low, high = high, high * 2
            high = min(high, limit)
            while high - low > max(1, high // 16):
                index.search_params[name] = (low + high) // 2
                if (found := _recall(index, queries, k, floor)) >= target:
                    high, recall = index.search_params[name], found
                else:
                    low = index.search_params[name]
            index.search_params[name] = high
    return recall


def _kth_exact_score(index: Index, queries: Vectors, k: int) -> Vectors:
    """Return the k-th highest exact score (B, 1) of each query."""
    if not len(index) or not len(queries):
        raise DataError("recall needs an index with items and at least one query")
    return index.search(queries, min(k, len(index)), exact=True)[1][:, -1:]


def _recall(index: Index, queries: Vectors, k: int, floor: Vectors) -> float:
    _, scores = index.search(queries, k)
    return float((scores >= floor).sum() / (len(queries) * min(k, len(index))))
