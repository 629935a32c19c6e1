"""A problem of a manifest is one line: field, value, expected type."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError
from store_worlds import FACTS

from twotower.store.manifest import BundleFacts, RecallCheck, problem


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dims": "64"}, "dims is '64', expected int"),
        ({"dims": True}, "dims is True, expected int"),
        ({"model": 3}, "model is 3, expected str"),
        ({"bias": 1}, "bias is 1, expected bool"),
        ({"counts": None}, "counts is None, expected dict"),
        ({"counts": {"users": -1, "items": 3}}, "counts.users is -1, Input should be greater than or equal to 0"),
        ({"recall_check": {"recall": 0.5}}, "recall_check.threshold is missing"),
        ({"recall_check": FACTS["recall_check"] | {"recall": math.nan}}, "recall_check.recall is nan, expected a number"),
        ({"index": ["exact"]}, "index is ['exact'], expected dict"),
        ({"index": FACTS["index"] | {"search_params": {"ef": 0.5}}}, "index.search_params.ef is 0.5, expected int"),
        ({"metric": "l2"}, "metric is 'l2', Input should be 'cosine' or 'dot'"),
        ({"schema": {"features": 3}}, "schema.features is 3, expected list"),
        (
            {"split": {"kind": "odd\nend"}},
            "split.kind is 'odd\\nend', Input should be 'random', 'user_random', 'last', 'time', 'user_ratio', 'column' "
            "or 'files'",
        ),
    ],
)  # fmt: skip
def test_a_problem_names_field_value_and_type(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BundleFacts.model_validate(FACTS | change)
    assert problem(caught.value) == says


def test_a_problem_of_the_whole_is_one_of_the_manifest() -> None:
    with pytest.raises(ValidationError) as caught:
        BundleFacts.model_validate(["dims", 64])
    assert problem(caught.value) == "the manifest is ['dims', 64], expected dict"


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
