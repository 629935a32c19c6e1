"""Made vectors under rows, and a plain loop that searches them, for the tests of indexes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.index import Similarity

N, WIDTH = 600, 9


def world(metric: str, n: int = N, seed: int = 0, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, a tenth of them twins of others, and rows with gaps, in no order."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, width)).astype(np.float32)
    vectors[n - n // 10 :] = vectors[: n // 10]
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    else:
        vectors *= rng.uniform(0.2, 3, (n, 1)).astype(np.float32)
        vectors[n - n // 10 :] = vectors[: n // 10]
    return vectors, rng.permutation(10 * n)[:n].astype(np.int64)


def users(n: int, seed: int = 1, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def naive(
    vectors: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    k: int,
    allowed: Sequence[int] | np.ndarray | None = None,
    banned: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    found, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    may = set(rows.tolist()) if allowed is None else set(np.asarray(allowed).tolist())
    for number, query in enumerate(queries):
        not_now = set() if banned is None else set(np.asarray(banned[number]).tolist())
        scored = (query.astype(np.float64) * vectors).sum(axis=1).astype(np.float32)
        pairs = [(-s, r) for s, r in zip(scored, rows.tolist(), strict=True) if r in may and r not in not_now]
        for place, (score, row) in enumerate(sorted(pairs)[:k]):
            found[number, place], scores[number, place] = row, -score
    return found, scores


def checked(metric: str) -> Similarity:
    return "cosine" if metric == "cosine" else "dot"


def same(got: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray], ties: bool) -> None:
    """Equal scores; and equal rows, but FAISS may cut through twins where it likes."""
    assert got[0].dtype == np.int64
    assert got[1].dtype == np.float32
    np.testing.assert_array_equal(got[1], wanted[1])
    if ties:
        np.testing.assert_array_equal(got[0], wanted[0])
    else:
        inside = wanted[1] > np.where(np.isinf(wanted[1]), 0, wanted[1]).min(axis=1, keepdims=True)
        np.testing.assert_array_equal(got[0][inside], wanted[0][inside])


def in_order(rows: np.ndarray, scores: np.ndarray) -> None:
    """Best first, equal ones by row, no row twice, the empty ones at the end."""
    for r, s in zip(rows, scores, strict=True):
        filled = int((r >= 0).sum())
        assert (r[:filled] >= 0).all()
        assert np.isinf(s[filled:]).all()
        assert np.isfinite(s[:filled]).all()
        assert len(set(r[:filled].tolist())) == filled
        pairs = list(zip(-s[:filled], r[:filled], strict=True))
        assert pairs == sorted(pairs)
