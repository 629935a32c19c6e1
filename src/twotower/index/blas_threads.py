"""Thread count of numpy's matrix products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController


class BlasThreads:
    """Threads of the BLAS library that numpy ships, shared by all searches of this process.

    OpenBLAS's own threads spin while they wait, and several calling threads would queue for them.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        folder = Path(np.__file__).parent.with_name("numpy.libs")
        found = ThreadpoolController().select(user_api="blas").lib_controllers
        self._libraries = [lib for lib in found if Path(lib.filepath).parent == folder]
        self._before: list[int] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        """Set one thread within the block; the last of several users restores the number before the first."""
        # A call of the library itself: the controller's `limit` also reads versions, and takes ten times as long.
        with self._lock:
            if not self._users:
                self._before = [library.get_num_threads() for library in self._libraries]
                self._set([1] * len(self._libraries))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._set(self._before)

    def _set(self, counts: list[int]) -> None:
        for library, count in zip(self._libraries, counts, strict=True):
            library.set_num_threads(count)


@cache
def blas_threads() -> BlasThreads:
    """Return the threads of numpy's BLAS in this process; the search for loaded libraries takes milliseconds."""
    return BlasThreads()
