"""Tables are placed on ranks by their size."""

from __future__ import annotations

from twotower.train.torchrec.plan import plan_sharding


def test_tables_are_dealt_by_size() -> None:
    sizes = [(100, 8), (10, 8), (90, 8), (5, 1)]
    assert plan_sharding(sizes, 2, "table_wise") in ([[0], [1], [1], [0]], [[0], [1], [1], [1]])
    assert plan_sharding(sizes, 2, "column_wise") == [[0, 1], [0, 1], [0, 1], [0]]
    assert plan_sharding([(100, 8), (10, 8)], 2, "auto") == [[0, 1], [0]]
    assert plan_sharding([(100, 8)], 3, "column_wise") == [[0, 1]], "a piece is at least four columns wide"
    assert plan_sharding(sizes, 1, "auto") == [[0]] * 4
