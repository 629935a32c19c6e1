"""Own items of histories, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twotower.arrays.ragged import Ragged, offsets_of
from twotower.evaluation.own_items import HistoryTerm, Recency, own_items

ROWS = np.array([-1, 2, 0, 1])
"""Item row of each code; code 0 is of no item."""
WEIGHTS = np.array([9.0, 1.0, 0.5, 0.25], np.float32)


@pytest.mark.parametrize("recency", [Recency(0.0), Recency(0.9), Recency(), Recency(1.0, 0.5), Recency(0.8, 2.0)])
def test_a_score_is_the_logarithm_of_the_sum_of_weights_times_recencies(recency: Recency) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([0, 5, 1, 0, 40])
    histories = Ragged(rng.integers(0, 4, lengths.sum()).astype(np.int32), offsets_of(lengths))
    offsets, own = own_items(histories, ROWS, HistoryTerm("", WEIGHTS, 3.0, recency), 4)
    assert offsets[-1] == len(own.rows) == len(own.scores)
    for user in range(len(lengths)):
        wanted = dict[int, float]()
        for n, code in enumerate(histories.row(user)[::-1].tolist(), 1):
            if code:
                wanted[int(ROWS[code])] = (
                    wanted.get(int(ROWS[code]), 0.0)
                    + float(WEIGHTS[code]) * recency.rate ** (n - 1) * n**-recency.exponent
                )
        part = slice(offsets[user], offsets[user + 1])
        assert own.rows[part].tolist() == sorted(wanted)
        np.testing.assert_allclose(
            own.scores[part], [3 * math.log(1 + wanted[row]) for row in sorted(wanted)], rtol=1e-6
        )


def test_no_history_has_no_items() -> None:
    offsets, own = own_items(Ragged(np.zeros(0, np.int32), np.zeros(3, np.int64)), ROWS, HistoryTerm("", WEIGHTS), 4)
    assert offsets.tolist() == [0, 0, 0]
    assert not len(own.rows)
