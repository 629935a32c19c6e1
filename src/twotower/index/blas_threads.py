"""Thread count of numpy's matrix products."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController


class OneBlasThread:
    """Sets one thread for the OpenBLAS that numpy ships, while a `with` block of any thread runs.

    OpenBLAS's own threads spin while they wait, and several calling threads would queue for them. The last of several
    users restores the number before the first, so a process has one instance.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, 1
        self._get: Callable[[], int] | None = None
        self._set: Callable[[int], None] | None = None
        folder = Path(np.__file__).resolve().parent.with_name("numpy.libs")
        for library in ThreadpoolController().select(internal_api="openblas").lib_controllers:
            if Path(library.filepath).resolve().parent == folder:
                # The functions of the library: `set_num_threads` obeys only the first thread that calls it, and `limit`
                # takes ten times as long.
                name = next(name for name in library.check_symbols if hasattr(library.dynlib, name))
                self._get = getattr(library.dynlib, name)
                self._set = getattr(library.dynlib, name.replace("_get_", "_set_"))

    def __enter__(self) -> None:
        if self._get is None or self._set is None:
            return
        with self._lock:
            if not self._users:
                self._before = self._get()
                self._set(1)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        if self._set is None:
            return
        with self._lock:
            self._users -= 1
            if not self._users:
                self._set(self._before)


one_blas_thread = OneBlasThread()
"""The instance of this process, made at import: threads that made their own would not count each other."""
