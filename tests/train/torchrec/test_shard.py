"""Shards begin as parts of whole tables."""

from __future__ import annotations

import torch

from twotower.model.tables import Table, deferred_tables
from twotower.train.torchrec.shard import EmbeddingShard, plan_sharding


def test_fresh_pieces_are_parts_of_the_fresh_whole() -> None:
    for rows, width, std in ((3, 1, 0.5), (5, 4, 0.0), (100, 3, 0.5), (129, 6, 0.5), (130, 8, 0.5), (1000, 1, 0.5)):
        torch.manual_seed(5)
        whole = Table(rows, width)
        whole.initialize(std, [1, rows - 1])
        after = torch.rand(3)
        for first_row, first_column, high, wide in ((0, 0, rows, 8), (rows // 2, 0, rows - rows // 2, 4), (1, 4, 2, 4)):
            torch.manual_seed(5)
            with deferred_tables():
                table = Table(rows, width)
            table.initialize(std, [1, rows - 1])
            assert torch.equal(torch.rand(3), after)
            piece = torch.nn.Parameter(torch.full((high, wide), torch.nan))
            EmbeddingShard(table, piece, first_row, first_column)
            expected = torch.zeros(high, wide)
            part = whole.weight[first_row : first_row + high, first_column : first_column + wide].detach()
            expected[: part.shape[0], : part.shape[1]] = part
            assert torch.equal(piece.detach(), expected)
            if std:
                blocks = [drawn for _, drawn in table.initial_rows(block=2**8)]
                assert torch.equal(torch.cat(blocks), whole.weight)


def test_tables_are_dealt_by_size() -> None:
    sizes = [(100, 8), (10, 8), (90, 8), (5, 1)]
    assert plan_sharding(sizes, 2, "table_wise") in ([[0], [1], [1], [0]], [[0], [1], [1], [1]])
    assert plan_sharding(sizes, 2, "column_wise") == [[0, 1], [0, 1], [0, 1], [0]]
    assert plan_sharding([(100, 8), (10, 8)], 2, "auto") == [[0, 1], [0]]
    assert plan_sharding([(100, 8)], 3, "column_wise") == [[0, 1]], "a piece is at least four columns wide"
    assert plan_sharding(sizes, 1, "auto") == [[0]] * 4
