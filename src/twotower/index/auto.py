"""The choice of an index by the size of the catalogue: kind "auto"."""

from __future__ import annotations

from twotower.index.exact import Exact, Index
from twotower.index.faiss.ivf import Ivf
from twotower.index.faiss.ivfpq import IvfPq
from twotower.index.protocol import IndexConfig, Publication
from twotower.index.vector_store import Similarity

EXACT_MAX_ITEMS = 50_000
UNCOMPRESSED_MAX_ITEMS = 2_000_000


class Auto(IndexConfig):
    """`exact` up to 50,000 items, `ivf` up to two million, `ivfpq` above. Never a server.

    Use it until a measured latency, memory or recall requires another.
    """

    kind = "auto"

    def choose(self, n_items: int, metric: Similarity) -> tuple[IndexConfig, str]:
        common = dict(self)
        if n_items <= EXACT_MAX_ITEMS:
            return Exact(**common), f"exact search: {n_items:,} items are scored in a few milliseconds"
        nlist = round(4 * n_items**0.5)
        if n_items > UNCOMPRESSED_MAX_ITEMS:
            why = f"product-quantised vectors in {nlist:,} lists, then exact scores"
            return IvfPq(nlist=nlist, **common), f"{why}: whole vectors of {n_items:,} items need too much memory"
        # On synthetic clusters HNSW was no faster than IVF at recall 0.95, and took five times as long to build for a
        # million vectors (benchmarks/speed/search.py --kinds ivf,hnsw).
        items = "items of equal norm" if metric == "cosine" else "items, augmented to equal norm"
        why = f"{nlist:,} lists of whole vectors: fast to search and to build for {n_items:,} {items}"
        return Ivf(nlist=nlist, **common), why

    def empty(self, width: int, metric: Similarity, publication: Publication) -> Index:
        return self.choose(0, metric)[0].empty(width, metric, publication)
