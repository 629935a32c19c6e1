"""Rules on shapes at their thresholds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twotower.data.order_evidence import MIN_LIFT, MIN_Z, OrderEvidence
from twotower.suggestion.choice import MAX_QUERY_LENGTH, MIN_LONG, MIN_NEGATIVES, RULES, choose
from twotower.suggestion.query_evidence import MIN_SHARED, MIN_TIMES, QueryEvidence
from twotower.suggestion.shape import MAX_FEW, MIN_NEW, Shape
from twotower.suggestion.user_evidence import MIN_USER_LIFT, MIN_USER_Z, UserEvidence

ORDER = OrderEvidence(1000, 499.0, 99.0, 1.0, 0.0)
SHAPE = Shape(
    users=100, items=50, unused=0, common=45, interactions=1000, taken=1000, length=10, long_length=20, measurable=100, order=ORDER, drift=None, label_values=0, is_scale=False, no_rating=None,
    negatives=0.0, undone=0.0, new_items=0.0, new_users=0.0, by_time=True, query="", words="", queries=None, content_kinds=1, content_values=0, joint_values=0, contents=0, texts=0, telling=UserEvidence(), users_change=False, density=0.2, is_dense=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "recipe"),
    [
        ({}, "sequence-short"),
        ({"length": MIN_LONG - 0.5}, "sequence-short"),
        ({"length": MIN_LONG}, "sequence-long"),
        ({"order": None, "length": 100}, "collaborative"),
        ({"order": replace(ORDER, agreements=MIN_LIFT * 100 - 1)}, "sequence-short"),
        ({"order": replace(ORDER, agreements=MIN_LIFT * 100 - 2)}, "collaborative"),
        ({"order": replace(ORDER, deviation=400 / MIN_Z)}, "sequence-short"),
        ({"order": replace(ORDER, deviation=401 / MIN_Z)}, "collaborative"),
        ({"contents": 1, "new_items": MIN_NEW}, "cold-start"),
        ({"contents": 1, "new_items": MIN_NEW - 0.001}, "sequence-short"),
        ({"contents": 0, "new_items": 1.0}, "sequence-short"),
        ({"contents": 1, "unused": 49, "new_items": MIN_NEW - 0.001}, "sequence-short"),
        ({"contents": 1, "texts": 1, "new_items": MIN_NEW - 0.001, "by_time": False, "order": None}, "collaborative"),
        ({"contents": 1, "texts": 1, "new_items": MIN_NEW, "by_time": False, "order": None}, "cold-start"),
        ({"contents": 1, "texts": 0, "new_items": MIN_NEW, "by_time": False, "order": None}, "collaborative"),
        ({"contents": 1, "texts": 0, "new_items": MIN_NEW, "by_time": False}, "cold-start"),
        (
            {"contents": 2, "texts": 1, "content_kinds": 10**6, "new_items": MIN_NEW, "by_time": False, "order": None},
            "collaborative",
        ),
        ({"label_values": 2, "negatives": MIN_NEGATIVES}, "ranking"),
        ({"label_values": 2, "negatives": MIN_NEGATIVES - 0.001}, "sequence-short"),
        ({"label_values": 2, "negatives": 1 - MIN_NEGATIVES}, "ranking"),
        ({"label_values": 2, "negatives": 1 - MIN_NEGATIVES + 0.001}, "sequence-short"),
        ({"negatives": 0.3, "undone": 0.299 - MIN_NEGATIVES}, "ranking"),
        ({"negatives": 0.3, "undone": 0.3 - MIN_NEGATIVES + 0.001}, "sequence-short"),
        ({"label_values": 3, "is_scale": True, "negatives": 0.5}, "sequence-short"),
        ({"label_values": 3, "negatives": 0.5}, "ranking"),
        ({"label_values": 0, "negatives": 0.5}, "ranking"),
        ({"queries": QueryEvidence(1.0, 0.1), "length": MAX_QUERY_LENGTH}, "words"),
        ({"queries": QueryEvidence(1.0, 0.1), "length": MAX_QUERY_LENGTH + 0.5}, "sequence-short"),
        ({"queries": QueryEvidence(MIN_SHARED, 0.0), "length": 1}, "words"),
        ({"queries": QueryEvidence(MIN_SHARED - 0.001, 0.0), "length": 1}, "sequence-short"),
        ({"queries": QueryEvidence(0.5, 0.5 / MIN_TIMES), "length": 1}, "words"),
        ({"queries": QueryEvidence(0.5, 0.5 / MIN_TIMES + 0.001), "length": 1}, "sequence-short"),
        ({"queries": QueryEvidence(0.1, 0.1), "length": 1, "label_values": 2, "negatives": 0.5}, "ranking"),
        (
            {"order": None, "telling": UserEvidence(("age",), MIN_USER_LIFT, MIN_USER_Z), "length": MAX_FEW},
            "cold-start",
        ),
        (
            {"order": None, "telling": UserEvidence(("age",), MIN_USER_LIFT, MIN_USER_Z), "length": MAX_FEW + 0.5},
            "collaborative",
        ),
        ({"order": None, "telling": UserEvidence(("age",), MIN_USER_LIFT - 0.01, 100.0)}, "collaborative"),
        ({"order": None, "telling": UserEvidence(("age",), 9.0, MIN_USER_Z - 0.01)}, "collaborative"),
        ({"telling": UserEvidence(("age",), 9.0, 100.0)}, "sequence-short"),
        ({"query": "q", "length": 1}, "sequence-short"),
        ({"words": "t", "length": 1}, "sequence-short"),
    ],
)
def test_each_threshold_decides(change: dict[str, object], recipe: str) -> None:
    if "queries" in change:
        change = {**change, "query": "q", "words": "t"}
    shape = replace(SHAPE, **change)  # type: ignore[arg-type]
    assert choose(shape).recipe == recipe
    assert not choose(shape).lacks(shape)
    assert all(rule.reason(shape) for rule in RULES)


def test_one_row_of_a_user_is_no_rows() -> None:
    told = {rule.recipe: rule.reason(replace(SHAPE, length=1, query="q", words="w")) for rule in RULES}
    for recipe in ("words", "cold-start", "sequence-long", "sequence-short"):
        assert "a user has 1 row, the median" in told[recipe]
    assert "a user has 1.5 rows, the median" in RULES[-2].reason(replace(SHAPE, length=1.5))
