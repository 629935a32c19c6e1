"""Two datasets are matched by ids, whatever their rows and however many users are compared at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from worlds import CHECKERBOARD_SCHEMA, checkerboard

from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, TRAIN
from twotower.data.tables import check
from twotower.errors import RunError
from twotower.evaluation.alignment import check_same_tests, match_ids


def board(backwards: bool = False) -> Dataset:
    """The checkerboard with the first or the last user first, and the same of the items."""
    users, items, actions = checkerboard()
    if backwards:
        users, items = users.reverse(), items.reverse().cast(pl.String)
        actions = actions.with_columns(pl.col("item_id").cast(pl.String))
    return build_dataset(check(users, items, actions, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, SplitConfig())


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_the_same_test_pairs_in_other_rows_are_the_same(block: int) -> None:
    a, b = board(), board(backwards=True)
    rows = np.array([3, 0, 39])
    kept, found = match_ids(a, b, "user", rows)
    assert (kept.tolist(), found.tolist()) == ([3, 0, 39], [36, 39, 0])
    check_same_tests(a, b, ["A", "B"], block)
    tested = np.flatnonzero(b.parts == TEST)
    for part, missing in ((TRAIN, 2), (TEST, 0)):
        parts = b.parts.copy()
        parts[tested[:2]] = part
        other = replace(b, parts=parts)
        if missing:
            first = min(
                (str(b.users.ids[int(b.pairs.user[i])]), str(b.items.ids[int(b.pairs.item[i])])) for i in tested[:2]
            )
            text = f"{missing} of {len(tested)} are missing, such as user '{first[0]}' with item '{first[1]}';"
            with pytest.raises(RunError, match=f"B was not tested on the pairs of A: {text}"):
                check_same_tests(a, other, ["A", "B"], block)
            with pytest.raises(RunError, match=f"B was not tested on the pairs of A: {text}"):
                check_same_tests(other, a, ["B", "A"], block)
        else:
            check_same_tests(a, other, ["A", "B"], block)
    positive = b.pairs.positive.copy()
    positive[tested[5:8]] ^= True
    relabelled = replace(b, pairs=replace(b.pairs, positive=positive))
    words = f"A and B label 3 of {len(tested)} test pairs differently; train both with the same "
    with pytest.raises(RunError, match=f"{words}schema.label and schema.positive_above"):
        check_same_tests(a, relabelled, ["A", "B"], block)
    of_events = replace(relabelled, schema=b.schema.model_copy(update={"label": "", "event": "type"}))
    with pytest.raises(RunError, match=f"{words}schema.events"):
        check_same_tests(a, of_events, ["A", "B"], block)


@pytest.mark.parametrize("block", [7, 1024])
def test_the_weights_of_test_pairs_are_compared_as_metrics_read_them(block: int) -> None:
    a, b = board(), board(backwards=True)
    tested = np.flatnonzero(b.parts == TEST)
    ones = replace(b, pairs=replace(b.pairs, weight=np.ones(len(b.pairs), np.float32)))
    weight = np.ones(len(b.pairs), np.float32)
    weight[tested[:4]] = 2.5
    heavier = replace(b, pairs=replace(b.pairs, weight=weight))
    other = weight.copy()
    other[tested[:3]] = 0
    fewer = replace(b, pairs=replace(b.pairs, weight=other))
    n = len(tested)
    for one, two in ((a, ones), (a, heavier), (heavier, heavier), (fewer, fewer)):
        check_same_tests(one, two, ["A", "B"], block)
    for one, two in ((ones, ones), (heavier, heavier), (fewer, fewer), (a, ones)):
        check_same_tests(one, two, ["A", "B"], block, weighted=True)
    for one in (a, ones, heavier):
        with pytest.raises(
            RunError, match=f"A and B give a weight above 0 to 3 of {n} test pairs differently; train both"
        ):
            check_same_tests(one, fewer, ["A", "B"], block)
    for one, two, different in ((a, heavier, 4), (heavier, ones, 4), (heavier, fewer, 3)):
        words = f"A and B weigh {different} of {n} test pairs differently; train both with the same schema.weight and"
        with pytest.raises(RunError, match=words):
            check_same_tests(one, two, ["A", "B"], block, weighted=True)
