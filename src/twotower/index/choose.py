"""Which kind of index, how hard it must try, and how much it finds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from twotower.errors import ConfigError, DataError
from twotower.index.protocol import Index, Metric, MilvusType, Vectors

EXACT_MAX_ITEMS = 50_000
UNCOMPRESSED_MAX_ITEMS = 2_000_000


@dataclass(frozen=True)
class TuneResult:
    """`search_params` are those the index has now, `recall` is what it finds with them.

    `trials`: all search parameters that were tried, with its recall and the seconds of a query.
    """

    search_params: dict[str, int]
    recall: float
    trials: list[dict[str, float]]


def choose_index(n_items: int, metric: Metric) -> tuple[str, dict[str, int], str]:
    """Kind and parameters for so many items, and a sentence that says why."""
    if n_items <= EXACT_MAX_ITEMS:
        return "exact", {}, f"exact search: {n_items:,} items are scored in a few milliseconds, and nothing is missed"
    nlist = round(4 * n_items**0.5)
    if n_items > UNCOMPRESSED_MAX_ITEMS:
        why = f"cut vectors in {nlist:,} lists, then exact scores: whole vectors of {n_items:,} items need too much memory"
        return "ivfpq", {"nlist": nlist}, why
    # On made-up clusters a graph was no quicker than lists at recall 0.95, and a million vectors took it five times as
    # long to build (benchmarks/search_speed.py --kinds ivf,hnsw).
    items = "items of one length" if metric == "cosine" else "items, made one length for the search"
    return "ivf", {"nlist": nlist}, f"{nlist:,} lists of whole vectors: quick and soon built for {n_items:,} {items}"


def choose_milvus_type(n_items: int) -> tuple[MilvusType, str]:
    """Milvus's index type for so many items, and a sentence that says why."""
    if n_items <= EXACT_MAX_ITEMS:
        return "FLAT", f"{n_items:,} items are scored one by one"
    if n_items <= UNCOMPRESSED_MAX_ITEMS:
        return "IVF_FLAT", f"lists of whole vectors: quick and soon built for {n_items:,} items"
    return "IVF_SQ8", f"lists of rounded vectors, then exact scores: {n_items:,} whole vectors need much memory"


def measure_recall(index: Index, queries: Vectors, k: int) -> float:
    """Share of the exact best `k` that the index finds, mean over queries (B, D). Equal scores count as found.

    Queries must be vectors of users that training did not see: items find themselves too easily.
    """
    return _recall(index, queries, k, _kth_exact_score(index, queries, k))


def tune_index(index: Index, queries: Vectors, k: int, target: float) -> TuneResult:
    """Set each knob of the index to the smallest value, to a sixteenth, that reaches recall `target`, one by one.

    The others stand at their largest meanwhile. If even that is below the target, it stays. Raises ConfigError, DataError.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"the target recall must be above 0 and at most 1, not {target}")
    floor = _kth_exact_score(index, queries, k)
    trials: list[dict[str, float]] = []

    def tried() -> float:
        started = time.perf_counter()
        found = _recall(index, queries, k, floor)
        trials.append(
            index.search_params | {"recall": found, "seconds": (time.perf_counter() - started) / len(queries)}
        )
        return found

    most = index.search_limits()
    index.search_params |= most
    best = tried()
    if best >= target:
        for knob, top in most.items():
            low, high = 0, 1  # low fails, high may reach
            while high < top:
                index.search_params[knob] = high
                if (found := tried()) >= target:
                    best = found
                    break
                low, high = high, high * 2
            high = min(high, top)
            while high - low > max(1, high // 16):
                index.search_params[knob] = (low + high) // 2
                if (found := tried()) >= target:
                    high, best = index.search_params[knob], found
                else:
                    low = index.search_params[knob]
            index.search_params[knob] = high
    return TuneResult(dict(index.search_params), best, trials)


def _kth_exact_score(index: Index, queries: Vectors, k: int) -> Vectors:
    """The least score (B, 1) among the exact best `k`."""
    if not len(index) or not len(queries):
        raise DataError("recall needs an index with items and at least one query")
    return index.search(queries, min(k, len(index)), exact=True)[1][:, -1:]


def _recall(index: Index, queries: Vectors, k: int, floor: Vectors) -> float:
    _, scores = index.search(queries, k)
    return float((scores >= floor).sum() / (len(queries) * min(k, len(index))))
