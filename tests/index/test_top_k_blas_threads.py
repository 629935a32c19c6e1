"""Numpy's OpenBLAS has one thread during a search, whichever thread searches, and its own number afterwards."""

from __future__ import annotations

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


def test_any_thread_sets_it_and_the_last_restores_it(two_threads: list[int]) -> None:
    entered, left = Barrier(3), Barrier(3)

    def search() -> list[int]:
        with one_blas_thread:
            entered.wait(10)
            found = counts()
            left.wait(10)
        return found

    assert two_threads, "numpy's wheel ships OpenBLAS"
    with one_blas_thread:  # the first thread that sets a number
        with one_blas_thread:
            assert counts() == [1]
        assert counts() == [1]
    assert counts() == two_threads
    with ThreadPoolExecutor(2) as pool:
        searches = [pool.submit(search) for _ in range(2)]
        entered.wait(10)
        assert counts() == [1]
        left.wait(10)
        assert [done.result() for done in searches] == [[1], [1]]
    assert counts() == two_threads
