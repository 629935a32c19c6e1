"""What stands against the positives: exact, fresh, reproducible, and weighted as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from candidate_worlds import world

from twotower.data.dataset import Dataset
from twotower.data.pairs import Pairs
from twotower.data.splits import TRAIN, VALIDATION
from twotower.train.negatives.config import NegativesConfig
from twotower.train.order import Epoch
from twotower.train.samplers import PairSampler, PositiveSampler


def same(a: Epoch, b: Epoch) -> bool:
    return all(
        np.array_equal(getattr(a.all, n), getattr(b.all, n)) for n in ("user", "item", "label", "weight", "source")
    )


def met_in_training(data: Dataset) -> set[tuple[int, int]]:
    return set(zip(data.train.user.tolist(), data.train.item.tolist(), strict=True))


def only_positives(data: Dataset) -> Dataset:
    """The world without its dislikes."""
    keep = data.pairs.positive
    pairs = Pairs(data.pairs.user[keep], data.pairs.item[keep], np.ones(int(keep.sum()), bool))
    return replace(data, pairs=pairs, parts=data.parts[keep])


@pytest.mark.parametrize("random", [0, 1, 3])
def test_an_epoch_is_the_training_rows_and_so_many_negatives_for_each_positive(
    everything_data: Dataset, random: int
) -> None:
    data = everything_data
    sampler = PairSampler(data, NegativesConfig(random=random), seed=1)
    epoch = sampler.epoch(0)
    train = data.train
    assert len(epoch) == len(sampler) == len(train) + random * int(train.positive.sum())
    sampled = epoch.all.source < 0
    per_user = Counter(train.user[train.positive].tolist())
    assert Counter(epoch.all.user[sampled].tolist()) == {u: n * random for u, n in per_user.items() if random}
    assert not epoch.all.label[sampled].any()
    drawn = set(zip(epoch.all.user[sampled].tolist(), epoch.all.item[sampled].tolist(), strict=True))
    assert not drawn & met_in_training(data)


def test_a_source_number_points_at_the_training_row_with_the_same_user_item_and_label(
    everything_data: Dataset,
) -> None:
    data = everything_data
    epoch = PairSampler(data, NegativesConfig(random=2), seed=5).epoch(3)
    real = epoch.all.source >= 0
    source = epoch.all.source[real]
    assert np.array_equal(np.sort(source), np.flatnonzero(data.parts == TRAIN))
    assert np.array_equal(epoch.all.user[real], data.pairs.user[source])
    assert np.array_equal(epoch.all.item[real], data.pairs.item[source])
    assert np.array_equal(epoch.all.label[real], data.pairs.positive[source].astype(np.float32))


@pytest.mark.parametrize("shuffle", [True, False])
def test_negatives_are_fresh_every_epoch_and_the_same_for_the_same_seed_and_epoch(
    everything_data: Dataset, shuffle: bool
) -> None:
    config = NegativesConfig(random=1)
    sampler = PairSampler(everything_data, config, seed=1, shuffle=shuffle)
    first, second = sampler.epoch(0), sampler.epoch(1)
    assert not same(first, second)
    # Asked again, in another order, by another sampler: a resumed run sees the same pairs.
    again = PairSampler(everything_data, config, seed=1, shuffle=shuffle)
    assert same(again.epoch(1), second)
    assert same(again.epoch(0), first)
    assert not same(PairSampler(everything_data, config, seed=2, shuffle=shuffle).epoch(0), first)

    def drawn(epoch: Epoch) -> Counter[tuple[int, int]]:
        sampled = epoch.all.source < 0
        return Counter(zip(epoch.all.user[sampled].tolist(), epoch.all.item[sampled].tolist(), strict=True))

    assert drawn(first) != drawn(second)


def test_without_shuffling_the_training_rows_keep_the_order_of_the_table(everything_data: Dataset) -> None:
    table = np.flatnonzero(everything_data.parts == TRAIN)
    for random in (0, 2):
        config = NegativesConfig(random=random)
        kept = PairSampler(everything_data, config, seed=1, shuffle=False).epoch(4).all.source
        mixed = PairSampler(everything_data, config, seed=1, shuffle=True).epoch(4).all.source
        assert np.array_equal(kept[kept >= 0], table)
        assert not np.array_equal(mixed[mixed >= 0], table)


def test_shuffling_is_a_new_order_every_epoch_without_random_negatives_too(everything_data: Dataset) -> None:
    sampler = PairSampler(everything_data, NegativesConfig(random=0), seed=1)
    first, second = sampler.epoch(0).all.source, sampler.epoch(1).all.source
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))


# ---- weights


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("random", [1, 4])
def test_random_negatives_carry_their_share_of_the_weight_of_all_negatives(
    everything_data: Dataset, random: int, share: float
) -> None:
    epoch = PairSampler(everything_data, NegativesConfig(random={"n": random, "share": share}), seed=1).epoch(0)
    sampled, negative = epoch.all.source < 0, epoch.all.label == 0
    weight = epoch.all.weight.astype(np.float64)
    assert weight[sampled].sum() / weight[negative].sum() == pytest.approx(share, rel=1e-5)
    assert np.unique(weight[sampled]).size == 1
    assert (weight[~sampled] == 1).all()


def test_without_observed_negatives_every_random_one_weighs_one(everything_data: Dataset) -> None:
    epoch = PairSampler(only_positives(everything_data), NegativesConfig(random={"n": 3, "share": 0.9}), seed=1).epoch(
        0
    )
    assert (epoch.all.source < 0).sum() == 3 * (epoch.all.source >= 0).sum()
    assert (epoch.all.weight == 1).all()


# ---- a user who likes everything


def test_a_user_who_likes_the_whole_catalogue_gets_no_random_negative_and_the_others_do(
    board: Dataset,
) -> None:
    n_items = len(board.items)
    rows = [(0, i, True) for i in range(n_items)] + [(1, i, True) for i in range(n_items - 1)] + [(2, 4, False)]
    data = world(board, rows)
    sampler = PairSampler(data, NegativesConfig(random={"n": 2, "share": 0.25}), seed=1)
    epoch = sampler.epoch(0)
    sampled = epoch.all.source < 0
    assert len(epoch) == len(sampler) == len(rows) + 2 * (n_items - 1)
    assert set(zip(epoch.all.user[sampled].tolist(), epoch.all.item[sampled].tolist(), strict=True)) == {
        (1, n_items - 1)
    }
    weight = epoch.all.weight.astype(np.float64)
    assert weight[sampled].sum() / weight[epoch.all.label == 0].sum() == pytest.approx(0.25, rel=1e-5)


def test_if_every_user_likes_everything_there_are_no_random_negatives(board: Dataset) -> None:
    rows = [(u, i, True) for u in range(len(board.users)) for i in range(len(board.items))]
    data = world(board, rows)
    epoch = PairSampler(data, NegativesConfig(random=2), seed=1).epoch(0)
    assert len(epoch) == len(rows)
    assert epoch.all.label.all()


def test_only_training_pairs_are_spared_and_only_training_rows_are_given(board: Dataset) -> None:
    rows = [(0, i, True) for i in range(len(board.items))]
    parts = np.array([TRAIN] * 10 + [VALIDATION] * (len(rows) - 10), np.int8)
    data = replace(world(board, rows), parts=parts)
    epoch = PairSampler(data, NegativesConfig(random=50), seed=1).epoch(0)
    sampled = epoch.all.source < 0
    assert set(epoch.all.item[~sampled].tolist()) == set(range(10))
    # Sparing what is held out would tell the model about it.
    assert set(epoch.all.item[sampled].tolist()) == set(range(10, len(board.items)))


@pytest.mark.parametrize("by_user", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_every_training_positive_once(everything_data: Dataset, by_user: bool, shuffle: bool) -> None:
    data = everything_data
    source = PositiveSampler(data, seed=1, shuffle=shuffle, by_user=by_user)
    wanted = np.flatnonzero((data.parts == TRAIN) & data.pairs.positive)
    epochs = [source.epoch(n) for n in range(2)]
    assert len(source) == len(wanted)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch.all.source), wanted)
        assert np.array_equal(epoch.all.user, data.pairs.user[epoch.all.source])
        assert np.array_equal(epoch.all.item, data.pairs.item[epoch.all.source])
        assert (epoch.all.label == 1).all()
        assert (epoch.all.weight == 1).all()
        if by_user:
            changes = np.flatnonzero(np.diff(epoch.all.user))
            assert len(changes) + 1 == len(np.unique(epoch.all.user)), "the positives of a user are together"
            together = np.diff(epoch.all.user) == 0
            assert (np.diff(data.times[epoch.all.source])[together] >= 0).all(), "oldest first"
        elif not shuffle:
            assert np.array_equal(epoch.all.source, wanted)
    assert np.array_equal(epochs[0].all.source, epochs[1].all.source) is (not shuffle)
    again = PositiveSampler(data, seed=1, shuffle=shuffle, by_user=by_user)
    assert np.array_equal(again.epoch(1).all.source, epochs[1].all.source)
    other = PositiveSampler(data, seed=2, shuffle=shuffle, by_user=by_user).epoch(1).all.source
    assert np.array_equal(other, epochs[1].all.source) is (not shuffle)
