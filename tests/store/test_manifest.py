"""A problem of a manifest is one line: field, value, expected type."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError
from store_worlds import FACTS

from twotower.section import first_problem
from twotower.store.manifest import BundleFacts, RecallCheck


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dims": "64"}, "dims: input should be a valid integer, got '64'"),
        ({"dims": True}, "dims: input should be a valid integer, got True"),
        ({"model": 3}, "model: input should be a valid string, got 3"),
        ({"bias": 1}, "bias: input should be a valid boolean, got 1"),
        ({"counts": {"users": -1, "items": 3}}, "counts.users: input should be greater than or equal to 0, got -1"),
        ({"recall_check": {"recall": 0.5}}, "'recall_check.threshold' is missing"),
        (
            {"recall_check": FACTS["recall_check"] | {"recall": math.nan}},
            "recall_check.recall: input should be a finite",
        ),
        ({"index": ["exact"]}, "index: input should be a valid dictionary"),
        (
            {"index": FACTS["index"] | {"search_params": {"ef": 0.5}}},
            "index.search_params.ef: input should be a valid int",
        ),
        ({"metric": "l2"}, "metric: input should be 'cosine' or 'dot', got 'l2'"),
        ({"schema": {"features": 3}}, "schema.features: input should be a list, got 3"),
        ({"split": {"kind": "odd\nend"}}, "split.kind: input should be 'random', 'user_random'"),
        ({"split": {"kind": "odd" * 999}}, "split.kind: input should be 'random', 'user_random'"),
    ],
)
def test_a_problem_names_field_value_and_type(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BundleFacts.model_validate(FACTS | change)
    found = first_problem(caught.value)
    assert found.startswith(says)
    assert len(found) < 250
    assert "\n" not in found


def test_facts_are_frozen_and_whole_numbers_are_recalls() -> None:
    facts = BundleFacts.model_validate(FACTS | {"recall_check": FACTS["recall_check"] | {"recall": 1}})
    assert facts.recall_check.recall == 1.0
    with pytest.raises(ValidationError):
        facts.dims = 3  # type: ignore[misc]


def test_a_recall_below_its_threshold_is_a_shortfall() -> None:
    check = RecallCheck(recall=0.95, threshold=0.95, k=10, queries=5)
    assert check.shortfall == ""
    below = check.model_copy(update={"recall": 0.9}).shortfall
    assert below == "recall 0.9 is below the threshold 0.95, k 10, queries 5"
