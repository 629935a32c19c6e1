"""Slices of the test part in reports: their names in the metrics, what they hold, and their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from twotower.evaluation.config import EvaluationConfig, Metrics

FIXED = {
    "new_user": "new users (fewer than {new_user_below} training interactions)",
    "new_item": "new items (fewer than {new_item_below} training interactions)",
    "cold_item": "cold items (no training interaction)",
    "head": "head (the most popular {head_share:.0%} of the items)",
    "tail": "tail (all other items)",
}
"""Slice by popularity or activity -> its definition, with the options that it depends on."""


class Slice(NamedTuple):
    """A slice: its name at the end of metrics such as test.auc.new_user, its definition in words, and its size."""

    name: str
    text: str
    size: int
    """Test pairs; of a column of the users, users with a ranking."""


def fixed_slices(metrics: Metrics, config: EvaluationConfig) -> Iterator[Slice]:
    """Yield the slices by popularity and activity that a run has metrics of."""
    settings = config.model_dump()
    for name, text in FIXED.items():
        if f"test.rows.{name}" in metrics:
            yield Slice(name, text.format(**settings), int(metrics[f"test.rows.{name}"]))


def column_slices(metrics: Metrics, column: str) -> Iterator[Slice]:
    """Yield the slices by the values of a column of the users that a run has metrics of."""
    start = f"test.users.{column}="
    for name, size in metrics.items():
        if name.startswith(start):
            value = name.removeprefix(start)
            yield Slice(f"{column}={value}", value, int(size))
