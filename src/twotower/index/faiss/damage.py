"""Structure of FAISS indexes that were read from a file."""

from __future__ import annotations

import numpy as np

from twotower.index.faiss.engine import FaissEngine
from twotower.index.faiss.setup import faiss


def find_damage(index: FaissEngine) -> str:
    """Name the part of a loaded index that would make a search read outside its memory; an empty string if none."""
    engine = faiss().downcast_index(index)
    if not engine.is_trained or engine.d < 1 or engine.ntotal < 0:
        return "not trained"
    if isinstance(engine, faiss().IndexFlat):
        return "" if engine.codes.size() == engine.ntotal * engine.d * 4 else "codes do not fit"
    if isinstance(engine, faiss().IndexHNSW):
        graph, storage = engine.hnsw, faiss().downcast_index(engine.storage)
        if not isinstance(storage, faiss().IndexFlat) or (storage.d, storage.ntotal) != (engine.d, engine.ntotal):
            return "storage does not fit"
        if find_damage(storage):
            return find_damage(storage)
        n = engine.ntotal
        levels, offsets = faiss().vector_to_array(graph.levels), faiss().vector_to_array(graph.offsets)
        per_level = faiss().vector_to_array(graph.cum_nneighbor_per_level)
        if len(levels) != n or len(offsets) != n + 1 or not 0 <= graph.entry_point < n:
            return "graph does not fit"
        if levels.min() < 1 or levels.max() >= len(per_level) or graph.max_level != levels[graph.entry_point] - 1:
            return "levels do not fit"
        if per_level[0] != 0 or (np.diff(per_level) < 0).any():
            return "levels do not fit"
        if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) != per_level[levels]).any():
            return "offsets do not fit"
        neighbours = faiss().vector_to_array(graph.neighbors)
        if len(neighbours) != offsets[-1] or neighbours.min(initial=0) < -1 or neighbours.max(initial=0) >= n:
            return "neighbours do not fit"
        return ""
    if isinstance(engine, faiss().IndexIVF):
        quantizer = faiss().downcast_index(engine.quantizer)
        if not isinstance(quantizer, faiss().IndexFlat) or (quantizer.d, quantizer.ntotal) != (engine.d, engine.nlist):
            return "centroids do not fit"
        if find_damage(quantizer):
            return find_damage(quantizer)
        lists = faiss().downcast_InvertedLists(engine.invlists)
        if lists.nlist != engine.nlist or sum(lists.list_size(i) for i in range(engine.nlist)) != engine.ntotal:
            return "lists do not fit"
        if isinstance(engine, faiss().IndexIVFPQFastScan):
            pq = engine.pq
            fits = 2 * pq.M == pq.d == engine.d and pq.M == engine.M and pq.nbits == engine.nbits == 4
            fits &= pq.centroids.size() == pq.d * 16 and engine.ksub == 16 and engine.code_size == pq.code_size
            fits &= engine.bbs == 32 and engine.M2 == pq.M + pq.M % 2 and engine.qbs == 0
            fits &= isinstance(lists, faiss().BlockInvertedLists)
            return "" if fits and (lists.n_per_block, lists.block_size) == (32, 16 * engine.M2) else "codes do not fit"
        fits = isinstance(engine, faiss().IndexIVFFlat) and isinstance(lists, faiss().ArrayInvertedLists)
        return "" if fits and engine.code_size == lists.code_size == 4 * engine.d else "codes do not fit"
    return f"unexpected class {type(engine).__name__}"
