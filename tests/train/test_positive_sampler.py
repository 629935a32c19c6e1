"""Every training positive comes once an epoch, whole users together where histories are causal."""

from __future__ import annotations

import numpy as np
import pytest

from twotower.data.dataset import Dataset
from twotower.data.splits import TRAIN
from twotower.train.positive_sampler import PositiveSampler


@pytest.mark.parametrize("by_user", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_every_training_positive_once(everything_data: Dataset, by_user: bool, shuffle: bool) -> None:
    data = everything_data
    source = PositiveSampler(data, seed=1, shuffle=shuffle, by_user=by_user)
    wanted = np.flatnonzero((data.parts == TRAIN) & data.pairs.positive)
    epochs = [source.epoch(n) for n in range(2)]
    assert len(source) == len(wanted)
    assert data.times is not None
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch.source), wanted)
        assert np.array_equal(epoch.user, data.pairs.user[epoch.source])
        assert np.array_equal(epoch.item, data.pairs.item[epoch.source])
        assert (epoch.label == 1).all()
        assert (epoch.weight == 1).all()
        if by_user:
            changes = np.flatnonzero(np.diff(epoch.user))
            assert len(changes) + 1 == len(np.unique(epoch.user)), "the positives of a user are together"
            together = np.diff(epoch.user) == 0
            assert (np.diff(data.times[epoch.source])[together] >= 0).all(), "oldest first"
        elif not shuffle:
            assert np.array_equal(epoch.source, wanted)
    assert np.array_equal(epochs[0].source, epochs[1].source) is (not shuffle)
    again = PositiveSampler(data, seed=1, shuffle=shuffle, by_user=by_user)
    assert np.array_equal(again.epoch(1).source, epochs[1].source)
    other = PositiveSampler(data, seed=2, shuffle=shuffle, by_user=by_user).epoch(1).source
    assert np.array_equal(other, epochs[1].source) is (not shuffle)
