"""The console shows of a user what the tower has read."""

from __future__ import annotations

import pytest

from twotower.data.splits import TEST
from twotower.retrieval.explanation import stored_history, stored_items
from twotower.retrieval.request import UnknownId
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run


def test_a_history_is_what_the_tower_has_read(run: Run, retriever: Retriever) -> None:
    data = run.dataset
    for row in (0, 7, 33):
        order = data.sort_by_time((data.pairs.user == row) & (data.parts != TEST))
        told = [(str(data.items.ids[int(data.pairs.item[i])]), bool(data.pairs.positive[i])) for i in order]
        assert len(told) > 3
        for n in (0, 1, 3, 1000):
            wanted = [(i, f"Item {i[1:]}", liked) for i, liked in told[max(0, len(told) - n) :]]
            assert stored_history(retriever, f"u{row}", n) == wanted
        assert set(stored_items(retriever, f"u{row}")) > {i for i, _ in told}  # the test part was met as well
    with pytest.raises(UnknownId, match="user 'nobody' is not among the 60 users"):
        stored_history(retriever, "nobody", 5)
