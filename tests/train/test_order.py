"""The order of training: the same whatever reads it, each interaction once, nobody in two shards."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.arrays.sets import MAX_CACHED_PAIRS, PairSet
from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN
from twotower.errors import ConfigError
from twotower.train.negatives.config import NegativesConfig
from twotower.train.negatives.random import UnseenItems
from twotower.train.order import Epoch, Examples, Shards, ShuffleSizes
from twotower.train.samplers import PairSampler, PositiveSampler


def examples(n: int, first: int = 0) -> Examples:
    rows = np.arange(first, first + n)
    ones = np.ones(n, np.float32)
    return Examples(
        rows.astype(np.int32), (rows * 2).astype(np.int32), ones, ones * np.float32(0.5), rows.astype(np.int64)
    )


def test_what_is_packed_for_other_ranks_is_unpacked_the_same() -> None:
    given_ = Examples(
        np.array([0, 2**31 - 1], np.int32), np.array([5, 6], np.int32), np.array([0, 1], np.float32),
        np.array([0.1, 3e-9], np.float32), np.array([-1, 2**40]),
    )  # fmt: skip
    found = Examples.unpack(given_.pack())
    for name, value in vars(given_).items():
        assert np.array_equal(getattr(found, name), value), name
        assert getattr(found, name).dtype == value.dtype


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 9))
def test_the_batches_of_an_epoch_are_all_of_it_in_order_and_all_shards_end_together(
    lengths: list[list[int]], size: int
) -> None:
    total = sum(map(sum, lengths))
    if not total:
        return
    starts = {(s, w): 1000 * s + sum(of[:w]) for s, of in enumerate(lengths) for w in range(len(of))}
    epoch = Epoch(lengths, lambda s, w: examples(lengths[s][w], starts[s, w]))
    assert len(epoch) == total
    steps = -(-total // size)
    found: dict[int, list[int]] = {s: [] for s in range(len(lengths))}
    for number in range(steps):
        parts = epoch.batch_slices(number, size)
        n = sum(p.stop - p.start for p in parts)
        assert n <= size + len(lengths)
        for s, part in enumerate(parts):
            found[s] += epoch.take(s, part).source.tolist()
    for s, of in enumerate(lengths):
        assert found[s] == list(range(1000 * s, 1000 * s + sum(of)))
    assert epoch.all.source.tolist() == [i for of in found.values() for i in of]
    if len(lengths) == 1:
        assert epoch.batch_slices(0, size) == [slice(0, min(size, total))]


@pytest.mark.parametrize("count", [1, 2, 5, 7])
@pytest.mark.parametrize("by_user", [False, True])
def test_shards_are_ranges_of_users_of_about_one_size(everything_data: Dataset, count: int, by_user: bool) -> None:
    data = everything_data
    numbers = data.positives_by_user.values if by_user else data.train_indices
    shards = Shards(data, numbers, count, by_user)
    assert len(shards) == count
    users = [np.unique(data.pairs.user[shards[s]]) for s in range(count)]
    for before, after in itertools.pairwise(users):
        assert before.max() < after.min(), "nobody is in two shards"
    sizes = [len(shards[s]) for s in range(count)]
    assert sum(sizes) == len(numbers)
    most = np.bincount(data.pairs.user[numbers]).max()
    assert max(sizes) - min(sizes) <= 2 * most
    assert sorted(np.concatenate([shards[s] for s in range(count)]).tolist()) == sorted(numbers.tolist())
    with pytest.raises(ConfigError, match=r"train.data_shards = 5000 is more than the \d+ interactions"):
        Shards(data, numbers, 5000, by_user)


SMALL = ShuffleSizes(block=32, window=128, user_run=50)
"""Worlds of a thousand rows have several blocks and windows."""


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("random", [0, 2])
def test_windows_hold_every_interaction_once_and_their_own_negatives(
    everything_data: Dataset, shards: int, shuffle: bool, random: int
) -> None:
    data = everything_data
    sampler = PairSampler(data, NegativesConfig(random=random), 1, shuffle, shards, SMALL)
    first, second = sampler.epoch(0), sampler.epoch(1)
    real = first.all.source[first.all.source >= 0]
    assert np.array_equal(np.sort(real), np.flatnonzero(data.parts == TRAIN))
    assert len(first) == len(sampler) == len(first.all.user)
    assert (first.all.source < 0).sum() == random * data.train.positive.sum()
    met = set(zip(data.train.user.tolist(), data.train.item.tolist(), strict=True))
    drawn = first.all.source < 0
    assert not met & set(zip(first.all.user[drawn].tolist(), first.all.item[drawn].tolist(), strict=True))
    assert np.array_equal(first.all.source, second.all.source) is not shuffle or random > 0
    again = PairSampler(data, NegativesConfig(random=random), 1, shuffle, shards, SMALL).epoch(1)
    for name in ("user", "item", "label", "weight", "source"):
        assert np.array_equal(getattr(again.all, name), getattr(second.all, name))
    if shuffle:  # a batch is of many places: neighbours in the table are seldom neighbours in the epoch
        assert (np.abs(np.diff(real)) == 1).mean() < 0.1
        places = [np.flatnonzero(first.all.source == n)[0] for n in real[:128]]
        assert len(set(places)) == 128


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("by_user", [True, False])
def test_positives_come_in_runs_of_users_or_in_windows(everything_data: Dataset, shards: int, by_user: bool) -> None:
    data = everything_data
    epoch = PositiveSampler(data, 1, True, by_user, shards, SMALL).epoch(2)
    assert np.array_equal(np.sort(epoch.all.source), data.positive_indices)
    if by_user:
        assert (np.diff(epoch.all.user) != 0).sum() + 1 == len(np.unique(epoch.all.user)), (
            "a user's positives are together"
        )
        together = np.diff(epoch.all.user) == 0
        assert (np.diff(data.times[epoch.all.source])[together] >= 0).all(), "oldest first"


@pytest.mark.parametrize("kind", ["pairs", "positives", "runs"])
def test_what_is_held_at_a_time_does_not_grow_with_the_shards(everything_data: Dataset, kind: str) -> None:
    data = everything_data
    for shards in (1, 2, 6):
        epoch = (
            PairSampler(data, NegativesConfig(random=0), 1, True, shards, SMALL).epoch(0)
            if kind == "pairs"
            else PositiveSampler(data, 1, True, kind == "runs", shards, SMALL).epoch(0)
        )
        for number in range(4):
            for shard, part in enumerate(epoch.batch_slices(number, 60)):
                epoch.take(shard, part)
        held = sum(len(rows) for _, rows in epoch._held.values())
        most = np.bincount(data.pairs.user).max()
        assert held <= (128 + shards * 32 if kind != "runs" else 50 + shards * most)


def test_keys_made_for_a_call_draw_what_cached_keys_draw(everything_data: Dataset) -> None:
    def draws(max_cached_pairs: int) -> list[npt.NDArray[Any]]:
        n_items = len(everything_data.items)
        random = UnseenItems(everything_data.seen_items, n_items, max_cached_pairs)
        positives = PairSet(everything_data.positive_items, n_items, max_cached_pairs)
        users = np.array([3, 3, 9, 20, 59, 4])
        rng = np.random.default_rng(0)
        items = np.arange(12).reshape(6, 2)
        return [random.draw(np.sort(users), rng), random.draw_distinct(users, 4, rng),
                positives.contains(users[:, None], items)]  # fmt: skip

    for a, b in zip(draws(MAX_CACHED_PAIRS), draws(0), strict=True):
        assert np.array_equal(a, b)
