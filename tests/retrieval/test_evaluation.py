"""The evaluation of a bundle ranks as the answers of its retriever do."""

from __future__ import annotations

import numpy as np
import pytest

from twotower import api
from twotower.data.splits import TEST, VALIDATION
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.retrieval.evaluation import rank_items
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run


def test_what_is_evaluated_is_what_is_served(run: Run, retriever: Retriever) -> None:
    found = api.evaluate_bundle(retriever)
    for name, value in evaluate_part(run.factors(TEST), run.dataset, TEST, run.config.evaluation).items():
        for way in ("exact", "index", "live"):
            assert found[way][name] == pytest.approx(value, abs=1e-5, nan_ok=True), (way, name)
    assert found["index"]["recall@5"] == pytest.approx(run.metrics["test.recall@5"], abs=1e-9)
    # Test interactions are in no history and no vector: the answers would be other ones.
    assert not np.allclose(run.factors(TEST).users, run.factors(VALIDATION).users)
    # And the ranks are those of single calls, with what comes after the test left in.
    users = np.array([4, 9])
    seen = run.dataset.grouped_before(TEST)
    for row, best in zip(users, rank_items(retriever, users, 5, 2, seen), strict=True):
        gone = {str(retriever.item_ids[i]) for pairs in seen for i in pairs.take(np.array([row])).item}
        answer = retriever.recommend(Request(f"u{row}"), 5, 2, keep_seen=True, ban=list(gone))
        assert [i.id for i in answer.items] == [retriever.item_ids[i] for i in best]
