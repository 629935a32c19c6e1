"""The protocol of items that training never saw: its split, its measures by hand, and the recipe on made data."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
import torch

from benchmarks.quality.cold import (
    BASELINES,
    likes,
    measured,
    recall_and_ndcg,
    recipe,
    split,
    tags,
    trained,
    world,
)
from benchmarks.quality.films import Part
from twotower.data.dataset import build_dataset
from twotower.data.splits import TEST, TRAIN, VALIDATION
from twotower.data.tables import check

PARTS: dict[int, Part] = {VALIDATION: "validation", TEST: "test"}


def test_withheld_items_have_no_like_in_other_parts() -> None:
    (users, items, found), withheld = split(world(100, 200))
    assert len(withheld[TEST]) == len(withheld[VALIDATION]) == 20
    assert not np.intersect1d(withheld[TEST], withheld[VALIDATION]).size
    part, item = found["part"].to_numpy(), found["item_id"].to_numpy()
    for code, name in PARTS.items():
        assert set(part[np.isin(item, withheld[code])]) == {name}
    warm = ~np.isin(item, [*withheld[TEST], *withheld[VALIDATION]])
    assert (part[warm] == "train").mean() == pytest.approx(0.8, abs=0.03)
    assert (users.height, items.height) == (100, 200)


def test_recall_and_ndcg_by_hand() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    targets = torch.tensor([[False, True, False, True], [False, False, False, True]])
    recall, ndcg = recall_and_ndcg(scores, targets)
    assert recall.tolist() == [1, 1]
    assert ndcg.tolist() == pytest.approx([(1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3)), 1])


def test_cold_targets_are_ranked_alone_and_among_all_without_what_was_seen() -> None:
    tables, withheld = split(world(60, 100))
    schema, config = recipe([], tables)
    data = build_dataset(check(*tables, schema), schema, config.split)
    cold = torch.from_numpy(np.isin(data.items.frame["item_id"].to_numpy(), withheld[TEST]))
    oracle = torch.from_numpy(likes(data, TEST)).float() * cold
    found = measured(oracle, data, TEST, withheld)
    assert [found[f"{name}, NDCG@20"].mean() for name in ("alone", "all")] == [1, 1]
    warm = torch.from_numpy(likes(data, TRAIN).any(0))
    held = torch.from_numpy(likes(data, TEST) & ~likes(data, TRAIN) & ~likes(data, VALIDATION)).float()
    assert measured(held * warm + 2 * cold, data, TEST, withheld)["warm, NDCG@20"].mean() == 1, (
        "cold items are not shown"
    )
    assert measured(held, data, TEST, withheld)["every, NDCG@20"].mean() == 1
    seen = torch.from_numpy(likes(data, TRAIN) | likes(data, VALIDATION)).float()
    assert measured(oracle + 2 * seen, data, TEST, withheld)["all, Recall@20"].mean() == 1, "seen items are not ranked"
    assert measured(-oracle, data, TEST, withheld)["all, Recall@20"].mean() == 0
    other = torch.from_numpy(np.isin(data.items.frame["item_id"].to_numpy(), withheld[VALIDATION])).float()
    assert measured(oracle + 2 * other, data, TEST, withheld)["all, NDCG@20"].mean() == 1, "nor those of validation"


def test_content_is_genres_and_with_titles_words_and_years() -> None:
    tables, _ = split(world(60, 100))
    schema, config = recipe([], tables)
    data = build_dataset(check(*tables, schema), schema, config.split)
    assert tags(data, title=False).sum(1).tolist() == [2] * 100
    assert set(tags(data, title=True).sum(1).tolist()) <= {4, 5}  # two genres, "title", its number, the year


def test_the_recipe_ranks_cold_items_of_a_made_world_as_well_as_content_alone_and_warm_ones_better() -> None:
    tables, withheld = split(world())
    schema, config = recipe([], tables)
    data = build_dataset(check(*tables, schema), schema, config.split)
    model, width = trained([], tables, TEST, withheld)
    assert width == 64 + 128 + 256 + 2, "the pair, ials, columns and biases"
    for name, baseline in BASELINES.items():
        other = measured(baseline(data, withheld), data, TEST, withheld)
        for measure in ("alone, Recall@20", "alone, NDCG@20", "warm, Recall@20", "every, Recall@20"):
            assert model[measure].mean() > other[measure].mean(), (name, measure)
