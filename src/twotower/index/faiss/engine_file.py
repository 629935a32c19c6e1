"""Files of FAISS indexes: reading within limits, check of the structure, check of a file in a child process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from twotower import limited_process
from twotower.errors import RunError
from twotower.index.faiss.setup import FaissEngine, faiss

FILE_ARRAY_MAX_BYTES = 1 << 40
FILE_LOOP_MAX_ITEMS = 1 << 31
"""Limits for reading a FAISS file: bytes of one array, items of one loop."""


def read_faiss(path: Path, mmap: bool = True) -> FaissEngine:
    """Read a FAISS index from a file within size limits, memory-mapped if `mmap`, and check its structure.

    Raises RunError. A damaged file can still crash the process: `verify_file` reads untrusted files in a child process.
    """
    try:
        size = path.stat().st_size
        faiss().set_deserialization_vector_byte_limit(min(FILE_ARRAY_MAX_BYTES, 2 * size + (1 << 20)))
        faiss().set_deserialization_loop_limit(min(FILE_LOOP_MAX_ITEMS, size + (1 << 20)))
        engine: FaissEngine = faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC if mmap else 0)
        damage = find_damage(engine)
    except (OSError, RuntimeError, ValueError, MemoryError, AttributeError, OverflowError) as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise RunError(f"{path}: not a usable FAISS index ({lines[-1][:200]})") from e
    if damage:
        raise RunError(f"{path}: not a usable FAISS index ({damage})")
    return engine


VERIFY_FUNCTION = "twotower.index.faiss.engine_file:load_and_search"
"""Function that the child process runs."""


def load_and_search(path: Path) -> str:
    """Load a FAISS file and search it. Returns an empty string; raises RunError."""
    engine = read_faiss(path, mmap=False)
    try:
        engine.search(np.ones((2, engine.d), np.float32), 10)
    except Exception as e:
        raise RunError(f"{path}: a search fails ({e})") from e
    return ""


def verify_file(path: Path, *, timeout: float = 120.0, function: str = VERIFY_FUNCTION) -> None:
    """Load and search a FAISS file in a child process. Raises RunError if that process fails, dies or exceeds a limit.

    `timeout` in seconds; `function` as "module:name". The address space is limited to 2 GiB and four times the file.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    memory = (2 << 30) + 4 * path.stat().st_size
    error = limited_process.run_limited(function, [path], timeout=timeout, memory=memory)[path].error
    if error:
        raise RunError(error if str(path) in error else f"{path}: not a usable FAISS index ({error})")


def find_damage(index: FaissEngine) -> str:
    """Return the part of a loaded index that would make a search read outside its memory, an empty string for none."""
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
