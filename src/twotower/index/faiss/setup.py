"""Import of FAISS with fast BLAS settings, and names of its types. Only this module imports FAISS.

Two defaults of the `faiss-cpu` wheel are slow:

- Its OpenBLAS is of 2021. On an unknown processor it uses SSE3 kernels, on others not always the fastest.
  OPENBLAS_CORETYPE selects kernels and is read once, when the library is loaded. This module sets it from the
  processor's flags during the import only: numpy has loaded its own OpenBLAS before, and child processes choose for
  themselves. A value that is already set stays, and with CI or PYTEST_VERSION in the environment none is set. If
  products with the chosen kernels differ from numpy's, FAISS does not use BLAS.
- FAISS multiplies matrices only if queries times dimension reach 128,000, for example 2,000 queries of dimension 64. On
  one thread a matrix product is faster from about ten queries on, and six times slower for one query.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np  # before FAISS, so that numpy's OpenBLAS chooses for itself

from twotower.errors import ConfigError

CORETYPE_VARIABLE = "OPENBLAS_CORETYPE"
BLAS_MIN_QUERIES = 10
"""Number of queries from which on FAISS multiplies matrices."""
BLAS_OFF = (1 << 31) - 1

# FAISS has no stubs.
FaissEngine: TypeAlias = Any
"""faiss.Index."""
SearchParameters: TypeAlias = Any
"""faiss.SearchParameters."""
Selector: TypeAlias = Any
"""faiss.IDSelector."""

log = logging.getLogger(__name__)


def choose_coretype(cpuinfo: str, environment: Mapping[str, str]) -> str | None:
    """Return the OpenBLAS kernels for a processor, None for OpenBLAS's choice. `cpuinfo`: text of /proc/cpuinfo."""
    if any(name in environment for name in (CORETYPE_VARIABLE, "CI", "PYTEST_VERSION")):
        return None
    first = dict(
        line.split(":", 1) for line in cpuinfo.partition("\n\n")[0].replace("\t", "").splitlines() if ":" in line
    )
    flags = set(first.get("flags", "").split())
    # Zen 4 executes AVX-512 in halves, and is faster with AVX2.
    zen4 = first.get("vendor_id", "").strip() == "AuthenticAMD" and first.get("cpu family", "").strip() == "25"
    if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"} and not zen4:
        return "SKYLAKEX"
    return "HASWELL" if flags >= {"avx2", "fma"} else None


def blas_is_correct(module: ModuleType) -> bool:
    """Return True if products of FAISS's BLAS equal numpy's, for sizes that are no multiples of a kernel's."""
    rng = np.random.default_rng(0)
    before = module.cvar.distance_compute_blas_threshold
    module.cvar.distance_compute_blas_threshold = 1
    try:
        for n, n_queries, width in ((1031, 67, 61), (40, 19, 133), (300, 32, 64)):
            items = rng.standard_normal((n, width), dtype=np.float32)
            queries = rng.standard_normal((n_queries, width), dtype=np.float32)
            found, at = module.knn(queries, items, n, metric=module.METRIC_INNER_PRODUCT)
            expected = np.take_along_axis(queries.astype(np.float64) @ items.T.astype(np.float64), at, 1)
            if (np.sort(at, axis=1) != np.arange(n)).any() or not np.allclose(found, expected, rtol=1e-3, atol=1e-3):
                return False
    finally:
        module.cvar.distance_compute_blas_threshold = before
    return True


def load_faiss(cpuinfo: str) -> tuple[ModuleType, bool]:
    """Import FAISS with the kernels for `cpuinfo`. Return it, and True if its BLAS is correct."""
    chosen = choose_coretype(cpuinfo, os.environ)
    if chosen:
        os.environ[CORETYPE_VARIABLE] = chosen
    try:
        import faiss
    finally:
        if chosen:
            del os.environ[CORETYPE_VARIABLE]
    correct = not chosen or blas_is_correct(faiss)
    if not correct:
        log.warning(
            "FAISS computes wrong products with %s=%s, which was chosen for this processor, so its BLAS is off and "
            "search is slower. Set the variable to other kernels before the start",
            CORETYPE_VARIABLE,
            chosen,
        )
    return faiss, correct


def _cpuinfo() -> str:
    """Return the text of /proc/cpuinfo; empty if FAISS is loaded, or the system is not Linux."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if "faiss" not in sys.modules and path.is_file() else ""


_load = cache(lambda: load_faiss(_cpuinfo()))
_load_lock = threading.Lock()


def _loaded() -> tuple[ModuleType, bool]:
    """Return FAISS, and True if its BLAS is correct. Raises ConfigError if FAISS is missing."""
    try:
        with _load_lock:
            return _load()
    except ModuleNotFoundError:
        raise ConfigError("this index needs FAISS; pip install faiss-cpu") from None


def faiss() -> ModuleType:
    """Return FAISS. Raises ConfigError if it is missing."""
    return _loaded()[0]


@contextmanager
def faiss_settings(threads: int, width: int) -> Iterator[None]:
    """Set the OpenMP threads and the BLAS threshold of FAISS calls of this thread in the block.

    `width` is the dimension of the vectors.
    """
    library, correct = _loaded()
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(threads)
    # The threshold is global to the process: concurrent calls with another dimension may be slower, never wrong.
    library.cvar.distance_compute_blas_threshold = BLAS_MIN_QUERIES * width if correct else BLAS_OFF
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
