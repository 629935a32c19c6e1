"""Exact search: blocks, threads and rounding miss nothing."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from vector_worlds import same, users, world

from twotower.index.codes import Codes
from twotower.index.exact import Exact, Index
from twotower.index.top_k import exact_top_k

Store = Literal["fp32", "int8"]


@pytest.mark.parametrize(("n", "b", "k"), [(5000, 3, 10), (70_001, 1, 100), (40_000, 300, 5), (9000, 2, 5000)])
@pytest.mark.parametrize(("store", "threads"), [("fp32", 1), ("fp32", 3), ("int8", 1), ("int8", 3)])
def test_blocks_groups_and_threads_miss_nothing(n: int, b: int, k: int, store: Store, threads: int) -> None:
    rng = np.random.default_rng(n)
    vectors, queries = rng.standard_normal((n, 6)).astype(np.float32), users(b, width=6)
    vectors[rng.integers(0, n, n // 3)] = vectors[rng.integers(0, n, n // 3)]
    rows = rng.permutation(n)
    keep = rows % 9 != 0
    index = Exact(store=store).build(vectors[keep], rows[keep], "dot")
    index.threads = threads
    banned = [rng.integers(0, n, 40) for _ in range(b)]
    for allowed in (None, np.arange(0, n, 2)):
        found, scores = index.search(queries, k, allowed=allowed, banned=banned)
        for number in range(0, b, 60):
            may = keep & ~np.isin(rows, banned[number]) & (True if allowed is None else rows % 2 == 0)
            right = (vectors[may] * queries[number].astype(np.float64)).sum(axis=1).astype(np.float32)
            order = np.lexsort((rows[may], -right))[:k]
            np.testing.assert_array_equal(found[number, : len(order)], rows[may][order])
            np.testing.assert_array_equal(scores[number, : len(order)], right[order])


@pytest.mark.parametrize("store", ["fp32", "int8"])
@pytest.mark.parametrize("b", [1, 64])
def test_near_ties_beyond_the_nominees_miss_nothing(b: int, store: Store) -> None:
    """Scores that float32 sums cannot tell apart, many more of them than k: the float64 sums and the rows decide."""
    rng = np.random.default_rng(0)
    vectors = np.full((20_000, 24), 0.7, np.float32)
    vectors[:, 5] += rng.integers(0, 4, 20_000).astype(np.float32) * np.float32(6e-8)
    vectors[:, 20] -= rng.integers(0, 4, 20_000).astype(np.float32) * np.float32(6e-8)
    rows, queries = rng.permutation(20_000), rng.uniform(0.5, 1, (b, 24)).astype(np.float32)
    banned = [rng.integers(0, 20_000, 30) for _ in range(b)]
    found, scores = Exact(store=store).build(vectors, rows, "dot").search(queries, 10, banned=banned)
    for number in range(0, b, 21):
        right = (vectors * queries[number].astype(np.float64)).sum(axis=1).astype(np.float32)
        right[np.isin(rows, banned[number])] = -np.inf
        order = np.lexsort((rows, -right))[:10]
        np.testing.assert_array_equal(found[number], rows[order])
        np.testing.assert_array_equal(scores[number], right[order])


def few_codes(rng: np.random.Generator, vectors: np.ndarray, queries: np.ndarray) -> None:
    vectors[3] *= 1e9  # the step of every dimension: all other items have codes of 0


def flat(rng: np.random.Generator, vectors: np.ndarray, queries: np.ndarray) -> None:
    vectors[:, 1:] = 0.25
    queries[0], queries[1, :1] = 0, 0  # every item scores the same


def uneven(rng: np.random.Generator, vectors: np.ndarray, queries: np.ndarray) -> None:
    vectors *= 10.0 ** rng.integers(-6, 6, vectors.shape[1])
    queries /= np.abs(vectors).max(axis=0)
    queries[0, 0] *= 1e7


def far(rng: np.random.Generator, vectors: np.ndarray, queries: np.ndarray) -> None:
    vectors += 1000  # the scores are rounded to more than the items differ by


@pytest.mark.parametrize("change", [few_codes, flat, uneven, far])
def test_codes_lose_nothing_of_vectors_that_they_suit_badly(change: Callable[..., None]) -> None:
    rng = np.random.default_rng(1)
    vectors, queries = rng.standard_normal((40_000, 12)).astype(np.float32), users(6, width=12)
    change(rng, vectors, queries)
    whole, coded = (Exact(store=store).build(vectors, np.arange(40_000), "dot") for store in ("fp32", "int8"))
    banned = [rng.integers(0, 40_000, 30) for _ in range(6)]
    for k in (1, 100):
        same(coded.search(queries, k, banned=banned), whole.search(queries, k, banned=banned), True)


def test_codes_leave_few_candidates_to_score() -> None:
    """If they left all, every answer would be right, and late."""
    rng = np.random.default_rng(2)
    vectors, queries = rng.standard_normal((100_000, 32)).astype(np.float32), users(40, width=32)
    found = Codes(vectors).candidates(queries, 100, [np.arange(10)] * 40, 2)
    assert max(map(len, found)) < 300


@pytest.mark.parametrize("numbers", [1, 500, 3000])
def test_queries_in_blocks_give_what_all_at_once_give(numbers: int) -> None:
    vectors, _ = world("dot", 2000)
    index = Exact().build(vectors, np.arange(2000), "dot")
    assert isinstance(index, Index)
    store, queries, scope = index._store, users(70), index._scope(70, None, None)
    found = exact_top_k(store, queries, 10, scope, 2, numbers)
    same(found, exact_top_k(store, queries, 10, scope, 2), ties=True)


@pytest.mark.parametrize("allowed", [None, np.arange(0, 20_000, 2)])
def test_candidates_of_many_queries_take_memory_that_is_bounded(allowed: np.ndarray | None) -> None:
    """Also where allowed vectors are gathered in blocks, each of which gives nominees."""
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((20_000, 64), np.float32), rng.standard_normal((3000, 64), np.float32)
    index = Exact().build(vectors, np.arange(20_000), "dot")
    assert isinstance(index, Index)
    scope = index._scope(3000, allowed, None)
    exact_top_k(index._store, queries[:10], 10, scope.of(np.arange(10)), 1)  # the engine is loaded outside the count
    tracemalloc.start()
    try:
        exact_top_k(index._store, queries, 10, scope, 1, numbers=2**13)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16e6, "the answers take 0.4 MB, nominees of all blocks for all queries fifty"


def test_searches_side_by_side() -> None:
    index = Exact().build(*world("dot", 20_000), "dot")
    wanted, wrong = index.search(users(40), 10)[0], []

    def ask(number: int) -> None:
        for _ in range(20):
            if not (index.search(users(40)[number : number + 2], 10)[0] == wanted[number : number + 2]).all():
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
