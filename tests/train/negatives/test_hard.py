"""Hard negatives are of the ranks that a config names, a random part of them, and continue from their state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from candidate_worlds import liked_of, world
from torch import Tensor

from twotower.data.dataset import Dataset
from twotower.errors import ConfigError
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.hard import HARD_NEGATIVES_PER_USER, HardNegatives, HardSampler
from twotower.train.negatives.mixture import CandidateSampler


def hard_negatives(data: Dataset, ranks: tuple[int, int]) -> HardSampler:
    return HardSampler(HardNegatives(n=2, ranks=ranks), data.positive_items, len(data.items), seed=1)


def ranked(data: Dataset, users: Tensor, items: Tensor) -> list[list[int]]:
    """The catalogue of every user by a loop, best first, without what they liked."""
    liked = liked_of(data)
    out = []
    for u in range(len(users)):
        scores = {i: float((users[u].double() * items[i].double()).sum()) for i in range(len(items))}
        out.append(sorted((i for i in scores if i not in liked[u]), key=lambda i: -scores[i]))
    return out


@pytest.mark.parametrize("ranks", [(1, 1), (1, 5), (3, 7), (2, 2), (14, 30), (1, 500)])
def test_mined_items_are_the_ranks_that_were_asked_for_both_ends_included(
    board: Dataset, ranks: tuple[int, int]
) -> None:
    hard = hard_negatives(board, ranks)
    rng = torch.Generator().manual_seed(0)
    users, items = torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng)
    hard.refresh(users, items, epoch=1, block=7)
    assert hard.windows is not None
    for u, order in enumerate(ranked(board, users, items)):
        assert 14 < len(order) < 30
        wanted = order[ranks[0] - 1 : ranks[1]]
        assert set(hard.windows[u].tolist()) - {-1} == set(wanted)


def test_so_many_users_are_ranked_at_a_time_as_their_scores_fit_into_memory(
    board: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    users, items = torch.randn(40, 4, generator=rng), torch.randn(30, 4, generator=rng)
    sizes: list[int] = []
    topk = Tensor.topk

    def watched(scores: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(scores.numel())
        return topk(scores, *args, **options)

    monkeypatch.setattr(Tensor, "topk", watched)
    for scores in (100, 7):  # of 30 items: three users, and one even if that is too many
        hard = hard_negatives(board, (1, 30))
        hard.refresh(users, items, epoch=1, max_block_scores=scores)
        assert max(sizes) == max(30, scores // 30 * 30)
        assert hard.windows is not None
        assert [set(m.tolist()) - {-1} for m in hard.windows] == [set(r) for r in ranked(board, users, items)]
        sizes.clear()


def test_of_a_wide_window_a_random_part_is_kept_and_another_at_the_next_mining(board: Dataset) -> None:
    rng = torch.Generator().manual_seed(0)
    n = 400
    items, users = torch.randn(n, 4, generator=rng), torch.randn(40, 4, generator=rng)
    frame = pl.DataFrame({"item_id": np.arange(n)})
    data = world(replace(board, items=replace(board.items, frame=frame)), [(u, u, True) for u in range(40)])
    hard = hard_negatives(data, (101, 300))
    kept = []
    for epoch in (1, 1, 2):
        hard.refresh(users, items, epoch)
        assert hard.windows is not None
        kept.append(hard.windows.copy())
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])
    places = []
    for u, order in enumerate(ranked(data, users, items)):
        assert len(set(kept[0][u].tolist())) == HARD_NEGATIVES_PER_USER
        places += [order.index(i) + 1 for i in kept[0][u].tolist()]
    # 40 x 64 of 200 ranks: each end is missed with probability below 1e-6, and none is favoured.
    assert (min(places), max(places)) == (101, 300)
    assert np.mean(places) == pytest.approx(200.5, abs=4)


def test_a_window_that_starts_beyond_the_catalogue_is_refused_before_training(board: Dataset) -> None:
    with pytest.raises(
        ConfigError, match="negatives.hard.ranks starts at 31, and the catalogue has 30 items; lower it"
    ):
        hard_negatives(board, (31, 40))
    assert hard_negatives(board, (30, 40))
    assert CandidateSampler(board, NegativesConfig(), seed=1), "nothing is mined"
