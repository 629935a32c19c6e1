"""Shapes of logs, and the rules on them at their thresholds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from suggestion_worlds import with_columns

from twotower.data.evidence import MIN_LIFT, MIN_Z, OrderEvidence
from twotower.suggestion.shape import (
    MAX_FEW,
    MAX_QUERY_LENGTH,
    MIN_LONG,
    MIN_NEGATIVES,
    MIN_NEW,
    MIN_SHARED,
    MIN_TIMES,
    MIN_USER_LIFT,
    RULES,
    Shape,
    choose,
)
from twotower.suggestion.suggest import suggest

ORDER = OrderEvidence(1000, 499.0, 99.0, 1.0, 0.0)
SHAPE = Shape(
    users=100, items=50, common=45, interactions=1000, taken=1000, length=10, long_length=20, measurable=100,
    order=ORDER, drift=None, label_values=0, is_scale=False, negatives=0.0, new_items=0.0, new_users=0.0, by_time=True,
    query="", words="", shared=(0.0, 0.0), content_kinds=1, contents=0, texts=0, telling={}, values={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "recipe"),
    [
        ({}, "sequence-short"), ({"length": MIN_LONG}, "sequence-long"),
        ({"order": None, "length": 100}, "collaborative"),
        ({"order": replace(ORDER, agreements=MIN_LIFT * 100 - 1)}, "sequence-short"),
        ({"order": replace(ORDER, agreements=MIN_LIFT * 100 - 2)}, "collaborative"),
        ({"order": replace(ORDER, deviation=400 / MIN_Z)}, "sequence-short"),
        ({"order": replace(ORDER, deviation=401 / MIN_Z)}, "collaborative"),
        ({"contents": 1, "new_items": MIN_NEW}, "cold-start"),
        ({"contents": 1, "new_items": MIN_NEW - 0.001}, "sequence-short"),
        ({"contents": 1, "texts": 1, "new_items": MIN_NEW, "by_time": False, "order": None}, "cold-start"),
        ({"contents": 1, "texts": 0, "new_items": MIN_NEW, "by_time": False, "order": None}, "collaborative"),
        ({"contents": 1, "texts": 0, "new_items": MIN_NEW, "by_time": False}, "cold-start"),
        (
            {"contents": 2, "texts": 1, "content_kinds": 99, "new_items": MIN_NEW, "by_time": False, "order": None},
            "collaborative",
        ),
        ({"label_values": 2, "negatives": MIN_NEGATIVES}, "ranking"),
        ({"label_values": 2, "negatives": MIN_NEGATIVES - 0.001}, "sequence-short"),
        ({"label_values": 2, "negatives": 1 - MIN_NEGATIVES + 0.001}, "sequence-short"),
        ({"label_values": 3, "is_scale": True, "negatives": 0.5}, "sequence-short"),
        ({"shared": (1.0, 0.1), "length": MAX_QUERY_LENGTH}, "words"),
        ({"shared": (1.0, 0.1), "length": MAX_QUERY_LENGTH + 0.5}, "sequence-short"),
        ({"shared": (MIN_SHARED, 0.0), "length": 1}, "words"),
        ({"shared": (MIN_SHARED - 0.001, 0.0), "length": 1}, "sequence-short"),
        ({"shared": (0.5, 0.5 / MIN_TIMES), "length": 1}, "words"),
        ({"shared": (0.5, 0.5 / MIN_TIMES + 0.001), "length": 1}, "sequence-short"),
        ({"order": None, "telling": {"age": MIN_USER_LIFT}, "length": MAX_FEW}, "cold-start"),
        ({"order": None, "telling": {"age": MIN_USER_LIFT}, "length": MAX_FEW + 0.5}, "collaborative"),
        ({"order": None, "telling": {"age": MIN_USER_LIFT - 0.01}}, "collaborative"),
        ({"telling": {"age": 9.0}}, "sequence-short"),
    ],
)  # fmt: skip
def test_each_threshold_decides(change: dict[str, object], recipe: str) -> None:
    if "shared" in change:
        change = {**change, "query": "q", "words": "t"}
    shape = replace(SHAPE, **change)  # type: ignore[arg-type]
    assert choose(shape).recipe == recipe
    assert not choose(shape).lacks(shape)
    assert all(rule.reason(shape) for rule in RULES)


@pytest.mark.parametrize(("share", "names"), [(0.0, set()), (0.6, {"city"}), (1.0, {"city"})])
def test_columns_of_users_that_predict_items_have_a_lift(share: float, names: set[str]) -> None:
    """Each city has a quarter of the items, so that a shared value makes one item up to four times as likely."""
    actions, users = with_columns(share)
    found = suggest(actions, users).shape.telling
    assert {*found} == names
    assert all(1 < lift < 4.5 for lift in found.values())
