"""Metrics of items without a training interaction, by hand."""

from __future__ import annotations

from dataclasses import replace
from math import log2

import numpy as np
import pytest
import torch
from scored import pairs_of, random_factors

from twotower.data.dataset import Dataset
from twotower.data.splits import TEST, TRAIN
from twotower.evaluation.config import EvaluationConfig
from twotower.evaluation.factors import Factors
from twotower.evaluation.part_evaluation import PartEvaluation, evaluate_model


def with_cold_items(board: Dataset) -> tuple[Dataset, Factors]:
    """Return a dataset whose items from 4 on are cold, and scores: user 0 likes 1, 5 and 6 in the test part, user 1
    likes 7, user 2 likes 2, which is warm."""
    train = [(u, i, True) for u, i in ((0, 0), (1, 1), (2, 3), (1, 2), (0, 2), (2, 0), (1, 3), (0, 3))]
    test = [(0, 1, True), (0, 5, True), (0, 6, True), (0, 8, False), (1, 7, True), (2, 2, True)]
    parts = np.array([TRAIN] * len(train) + [TEST] * len(test), np.int8)
    scores = torch.full((len(board.users), len(board.items)), -1.0)
    scores[0, [1, 8, 5, 9, 6]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    scores[1, [0, 4, 7]] = torch.tensor([9.0, 8.0, 7.0])
    scores[2, [9, 2]] = torch.tensor([9.0, 8.0])
    data = replace(board, pairs=pairs_of([*train, *test]), parts=parts)
    return data, Factors(scores, torch.eye(len(board.items)))


@pytest.mark.parametrize("weighted", [False, True])
def test_cold_items_are_measured_among_all_items_and_among_themselves(board: Dataset, weighted: bool) -> None:
    data, factors = with_cold_items(board)
    found = evaluate_model(lambda part: factors, data, EvaluationConfig(k=(2, 3), bootstrap=0, weighted=weighted))
    # Among all: user 0 is shown 1 and 8, user 1 0 and 4. Among themselves: 8 and 5, 4 and 7.
    assert found["test.rows.cold_item"] == 4
    assert found["test.recall@2.cold_item"] == 0
    assert found["test.recall@2.cold_item_alone"] == pytest.approx((1 / 2 + 1) / 2)
    ideal = 1 + 1 / log2(3)
    assert found["test.ndcg@2.cold_item_alone"] == pytest.approx((1 / log2(3) / ideal + 1 / log2(3)) / 2)
    assert "test.recall@3.cold_item_alone" not in found


def test_only_users_with_a_cold_target_count(board: Dataset) -> None:
    data, factors = with_cold_items(board)
    found = PartEvaluation.from_factors(factors, data, TEST, EvaluationConfig(k=(3,), bootstrap=0)).slices()
    assert found["recall@3.cold_item"] == pytest.approx((1 / 2 + 1) / 2)  # not user 2, whose target is warm


def test_without_cold_targets_nothing_is_reported(everything_data: Dataset) -> None:
    config = EvaluationConfig(k=(3,), bootstrap=0)
    found = evaluate_model(lambda part: random_factors(everything_data), everything_data, config)
    assert (everything_data.item_counts[everything_data.test.item] > 0).all()
    assert not [name for name in found if "cold_item" in name]
