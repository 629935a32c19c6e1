"""Disliked negatives are distinct training dislikes of the user, and no history holds them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from candidate_worlds import ROW, batch_of, own_items, positives, world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import CHECKERBOARD_SCHEMA, checkerboard

from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.splits import TRAIN
from twotower.data.tables import check
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.mixture import CandidateSampler


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(rows=st.lists(ROW, min_size=1, max_size=60, unique_by=lambda row: row[:2]), n=st.integers(1, 5))
def test_observed_candidates_are_distinct_training_dislikes_of_the_user_as_many_as_there_are(
    board: Dataset, rows: list[tuple[int, int, bool]], n: int
) -> None:
    data = world(board, [*rows, (39, 3, True)])
    disliked: dict[int, set[int]] = {}
    for u, i, p in rows:
        disliked.setdefault(u, set()).update([] if p else [i])
    sampler = CandidateSampler(data, NegativesConfig(disliked=n), seed=4)
    user, item = positives(data)
    for step in range(3):
        found = own_items(sampler(batch_of(user, item), step))
        for u, row in zip(user.tolist(), found, strict=True):
            assert len(row) == len(set(row)) == min(n, len(disliked.get(u, ())))
            assert set(row) <= disliked.get(u, set())


def test_every_observed_dislike_has_its_turn(everything_data: Dataset) -> None:
    data = everything_data
    sampler = CandidateSampler(data, NegativesConfig(disliked=1), seed=1)
    user, item = positives(data)
    seen = {
        (u, i)
        for step in range(60)
        for u, row in zip(user.tolist(), own_items(sampler(batch_of(user, item), step)), strict=True)
        for i in row
    }
    train = data.train
    wanted = {(u, i) for u, i, p in zip(train.user.tolist(), train.item.tolist(), train.positive, strict=True) if not p}
    assert seen == {(u, i) for u, i in wanted if u in set(user.tolist())}


def test_observed_candidates_are_told_by_number_and_with_moments_none_was_met_before() -> None:
    rng = np.random.default_rng(0)
    rows = [(u, i, bool(rng.random() < 0.5)) for u in range(10) for i in range(30)]
    frames = checkerboard()
    board = build_dataset(check(*frames, CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)
    data = replace(world(board, rows), times=rng.integers(0, 9, len(rows)))  # many ties
    place = {int(number): n for n, number in enumerate(data.sort_by_time(data.parts == TRAIN))}
    sampler = CandidateSampler(data, NegativesConfig(disliked=2), seed=1)
    source = rng.permutation(np.flatnonzero(data.pairs.positive))
    user, item = data.pairs.user[source], data.pairs.item[source]
    met_later = set()
    for step in range(80):
        c = sampler(batch_of(user, item, source=source), step, later=True)
        pairs = set(
            zip(data.pairs.user[c.interactions].tolist(), data.pairs.item[c.interactions].tolist(), strict=True)
        )
        found = own_items(c)
        assert pairs == {(u, i) for u, row in zip(user.tolist(), found, strict=True) for i in row}
        for s, u, row in zip(source.tolist(), user.tolist(), found, strict=True):
            met_later |= {(s, u * 30 + i) for i in row}
        plain = sampler(batch_of(user, item), step)
        assert len(plain.interactions) == 2 * len(user)
        assert not data.pairs.positive[plain.interactions].any()
    # Row r of `rows` is interaction r: user r // 30, item r % 30.
    dislikes = [r for r, row in enumerate(rows) if not row[2]]
    assert met_later == {
        (s, d) for s in source.tolist() for d in dislikes if d // 30 == s // 30 and place[d] > place[s]
    }  # fmt: skip
