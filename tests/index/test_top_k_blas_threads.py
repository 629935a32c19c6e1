"""Numpy's OpenBLAS has one thread during a search, whichever thread searches, and its own number afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from threadpoolctl import ThreadpoolController

from twotower.index.top_k import one_blas_thread


def counts() -> list[int]:
    found = ThreadpoolController().select(internal_api="openblas").info()
    return [library["num_threads"] for library in found if "numpy.libs" in library["filepath"]]


@pytest.fixture
def two_threads() -> Iterator[list[int]]:
    with ThreadpoolController().select(internal_api="openblas").limit(limits=2):
        yield counts()


def test_one_thread_inside_and_the_former_number_after_the_last(two_threads: list[int]) -> None:
    assert two_threads, "numpy's wheel ships OpenBLAS"
    with one_blas_thread:
        assert counts() == [1]
        with one_blas_thread:
            assert counts() == [1]
        assert counts() == [1]
    assert counts() == two_threads


def test_any_thread_sets_it_and_the_last_restores_it(two_threads: list[int]) -> None:
    entered, left = Barrier(3), Barrier(3)

    def search() -> list[int]:
        with one_blas_thread:
            entered.wait(10)
            found = counts()
            left.wait(10)
        return found

    with one_blas_thread:  # the first thread that sets a number
        pass
    with ThreadPoolExecutor(2) as pool:
        searches = [pool.submit(search) for _ in range(2)]
        entered.wait(10)
        assert counts() == [1]
        left.wait(10)
        assert [done.result() for done in searches] == [[1], [1]]
    assert counts() == two_threads


FIRST_SEARCHES = """
import threading
import numpy as np
from threadpoolctl import ThreadpoolController
from twotower.index import build_index

numpy_blas = [c for c in ThreadpoolController().lib_controllers if "numpy.libs" in c.filepath]
numpy_blas[0].set_num_threads(2)
vectors = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
index = build_index("exact", vectors, np.arange(len(vectors)), "dot")
together = threading.Barrier(4)

def search():
    together.wait(10)
    for _ in range(50):
        index.scores(vectors[:1])

threads = [threading.Thread(target=search) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(numpy_blas[0].num_threads)
"""


def test_threads_that_search_at_once_for_the_first_time_restore_the_number() -> None:
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", FIRST_SEARCHES], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["2"], done.stderr
