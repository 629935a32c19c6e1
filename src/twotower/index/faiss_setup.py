"""FAISS, set up to be fast. Every import of it in this package goes through here.

Two things slow the wheel of `faiss-cpu` down, and both are put right:

- Its OpenBLAS is of 2021. Of a processor that it does not know it uses no more than SSE3, on others not the quickest
  kernel. OPENBLAS_CORETYPE names one from the processor's flags, and is read once, when the library is loaded. It is set
  for that moment alone: numpy has loaded its own OpenBLAS before, and child processes choose for themselves. A value that
  is set already stays; where CI or PYTEST_VERSION is in the environment nothing is chosen. A kernel whose products are
  not those of numpy is not used: FAISS then does without BLAS.
- FAISS multiplies matrices only where queries times width reach 128,000, that is 2,000 queries of width 64. On one thread a
  product is quicker from about ten queries on, whatever the width; for one query it takes six times as long.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np  # before FAISS, so that numpy's OpenBLAS chooses for itself

CORETYPE_VARIABLE = "OPENBLAS_CORETYPE"
BLAS_MIN_QUERIES = 10
"""So many queries at once are a matrix product."""
BLAS_OFF = (1 << 31) - 1

_log = logging.getLogger(__name__)


def choose_coretype(cpuinfo: str, environment: Mapping[str, str]) -> str | None:
    """The kernels that FAISS's OpenBLAS is to use, or None: the choice is its own."""
    if any(name in environment for name in (CORETYPE_VARIABLE, "CI", "PYTEST_VERSION")):
        return None
    first = dict(
        line.split(":", 1) for line in cpuinfo.partition("\n\n")[0].replace("\t", "").splitlines() if ":" in line
    )
    flags = set(first.get("flags", "").split())
    # Zen 4 executes AVX-512 in halves, and is quicker with AVX2.
    halves = first.get("vendor_id", "").strip() == "AuthenticAMD" and first.get("cpu family", "").strip() == "25"
    if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"} and not halves:
        return "SKYLAKEX"
    return "HASWELL" if flags >= {"avx2", "fma"} else None


def blas_is_correct(module: Any) -> bool:
    """Compare the products of FAISS's BLAS with those of numpy, on matrices whose sizes fit no kernel."""
    rng = np.random.default_rng(0)
    before = module.cvar.distance_compute_blas_threshold
    module.cvar.distance_compute_blas_threshold = 1
    try:
        for n, n_queries, width in ((1031, 67, 61), (40, 19, 133), (300, 32, 64)):
            items = rng.standard_normal((n, width), dtype=np.float32)
            queries = rng.standard_normal((n_queries, width), dtype=np.float32)
            found, at = module.knn(queries, items, n, metric=module.METRIC_INNER_PRODUCT)
            right = np.take_along_axis(queries.astype(np.float64) @ items.T.astype(np.float64), at, 1)
            if (np.sort(at, axis=1) != np.arange(n)).any() or not np.allclose(found, right, rtol=1e-3, atol=1e-3):
                return False
    finally:
        module.cvar.distance_compute_blas_threshold = before
    return True


def load_faiss(cpuinfo: str) -> tuple[ModuleType, bool]:
    """FAISS, and whether its BLAS is to be used."""
    chosen = choose_coretype(cpuinfo, os.environ)
    if chosen:
        os.environ[CORETYPE_VARIABLE] = chosen
    try:
        import faiss
    finally:
        if chosen:
            del os.environ[CORETYPE_VARIABLE]
    right = not chosen or blas_is_correct(faiss)
    if not right:
        _log.warning(
            "FAISS gives wrong products with %s=%s, which was chosen for this processor: it goes without BLAS, slowly. "
            "Set another value before the start",
            CORETYPE_VARIABLE,
            chosen,
        )
    return faiss, right


def _cpuinfo() -> str:
    """The text of Linux about the processors; empty where FAISS is loaded already, and on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if "faiss" not in sys.modules and path.is_file() else ""


_module, _use_blas = load_faiss(_cpuinfo())
faiss: Any = _module
"""FAISS. Any: its stubs lack half of what is used here."""


@contextmanager
def faiss_settings(threads: int, width: int, use_blas: bool = _use_blas) -> Iterator[None]:
    """OpenMP threads of the FAISS calls of this thread, put back at the end; and from when on it multiplies matrices."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    # One number for all threads of the process: with another width beside this one some call is slower, none is wrong.
    faiss.cvar.distance_compute_blas_threshold = BLAS_MIN_QUERIES * width if use_blas else BLAS_OFF
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
